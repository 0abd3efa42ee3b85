"""A prompt of a group is processed once, and nothing else is different for it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from grpo_cases import make_trainer, opening, rows
from helpers import noise_image
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

from rl_lvr.models import family_of
from rl_lvr.training import grpo
from rl_lvr.training.grpo_inputs import processed_once, same


def group(pictures: int) -> list[dict[str, Any]]:
    """Two prompts, three rows each, the first of which has another picture than the second."""
    data = [{"prompt": row["prompt"], "images": [row["image"], noise_image(7)][:pictures]} for row in rows(count=2)]
    loaded = Dataset.from_list(data)
    return [dict(loaded[number // 3]) for number in range(6)]


def both_calls(trainer: Any, inputs: list[dict[str, Any]]) -> list[Any]:
    """What TRL asks the processor for, in its two ways."""
    prompts = [prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in inputs]
    images = [row["images"] for row in inputs]
    ids, _, fields = trainer._tokenize_prompts(prompts)
    texts = [apply_chat_template({"prompt": p}, trainer.processing_class)["prompt"] for p in prompts]
    return [ids, fields, trainer.processing_class(images=images, text=texts, padding=True, return_tensors="pt")]


def equal(one: Any, other: Any) -> bool:
    if hasattr(one, "keys"):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(torch.equal(torch.as_tensor(one), torch.as_tensor(other)))


@pytest.mark.parametrize("pictures", [1, 2])
def test_every_family_gets_the_same_tensors(
    load_tiny: Any, tmp_path: Path, family_name: str, pictures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load_tiny(family_name, latent_formats=("lvr", "monet"))
    trainer = make_trainer(model, processor, tmp_path)
    inputs = group(pictures)
    plain = both_calls(trainer, inputs)
    seen: list[int] = []
    images = type(processor.image_processor)
    honest = images.__call__

    def counting(self: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(sum(len(row) if isinstance(row, list) else 1 for row in images))
        return honest(self, images, *args, **kwargs)

    monkeypatch.setattr(images, "__call__", counting)
    both_calls(trainer, inputs)
    assert seen == [6 * pictures, 6 * pictures]  # the control
    with processed_once(trainer, family_of(model), inputs):
        once = both_calls(trainer, inputs)
    assert seen[2:] == [2 * pictures, 2 * pictures]
    assert equal(plain, once)
    assert trainer.processing_class is processor


def test_a_generation_batch_is_the_same(load_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for once in (processed_once, lambda *_: nullcontext()):
        monkeypatch.setattr(grpo, "processed_once", once)
        trainer = make_trainer(*opening(load_tiny), tmp_path, per_device_train_batch_size=8)
        inputs = [dict(row) for row in rows(count=2) for _ in range(4)]
        found.append(trainer._generate_and_score_completions(inputs))
    assert equal(*found)


def test_only_what_is_surely_equal_counts() -> None:
    picture = noise_image(1)
    message = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "a"}]}]
    again = [{"role": "user", "content": [{"type": "image", "image": picture.copy()}, {"type": "text", "text": "a"}]}]
    assert same(message, again)
    again[0]["content"][1]["text"] = "b"
    assert not same(message, again)
    assert not same(picture, noise_image(2))
    assert not same(torch.ones(2), torch.ones(2))
    assert not same(1, 1.0)
    assert not same([1], [1, 2])
