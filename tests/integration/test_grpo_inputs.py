"""A prompt of a group is processed once, and nothing else is different for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from grpo_cases import LVR, make_trainer, opening, rows
from helpers import noise_image
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

from rl_lvr.errors import Fault
from rl_lvr.forward.batch import evaluating
from rl_lvr.forward.inject import inject
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.models import family_of
from rl_lvr.training.grpo import trainer as grpo
from rl_lvr.training.grpo.batch import GenerationBatch
from rl_lvr.training.grpo.inputs import OncePerPrompt, same


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
    trainer.batch = GenerationBatch(processor=OncePerPrompt(processor, family_of(model), inputs))
    once = both_calls(trainer, inputs)
    trainer.batch = None
    assert seen[2:] == [2 * pictures, 2 * pictures]
    assert equal(plain, once)
    assert trainer.processing_class is processor


def test_a_generation_batch_is_the_same(load_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for once in (OncePerPrompt, lambda processor, *_: processor):
        monkeypatch.setattr(grpo, "OncePerPrompt", once)
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


def mixed() -> list[dict[str, Any]]:
    """Prompts of different lengths, two rows each: without an image, with one, without, with one."""
    made = []
    for number, row in enumerate(rows(count=4)):
        made += [{**row, "image": row["image"] if number % 2 else None}] * 2
    return made


def test_rows_with_and_without_images_go_together(load_tiny: Any, tmp_path: Path, family_name: str) -> None:
    """One batch of both gives the log-probs of two batches of one kind each, and it trains."""
    data = mixed()
    trainer = make_trainer(
        *opening(load_tiny, family=family_name),
        tmp_path,
        reward_names=("letters", "looks"),
        per_device_train_batch_size=8,
        num_generations=2,
        temperature=0.9,
    )
    together = trainer._generate_and_score_completions([dict(row) for row in data])
    assert together["num_images"] == [0, 0, 1, 1, 0, 0, 1, 1]
    for chosen in ([0, 1, 4, 5], [2, 3, 6, 7]):
        ids, mask = (
            torch.cat([together[f"{part}_{what}"][chosen] for part in ("prompt", "completion")], 1)
            for what in ("ids", "mask")
        )
        images = [data[row] for row in chosen]
        prompts = [prepare_multimodal_messages(row["prompt"], images=_listed(row)) for row in images]
        _, _, fields = trainer._tokenize_prompts(prompts)
        family = family_of(trainer.model)
        inputs = family.image_inputs({**fields, "input_ids": ids}) if any(map(_listed, images)) else {}
        latents = LatentBatch.from_tensors(together).select(chosen)
        with torch.no_grad(), evaluating(trainer.model), inject(trainer.model, latents, trainer.markers):
            positions = family.positions(trainer.model, ids, mask, inputs).prefill
            logits = trainer.model(input_ids=ids, attention_mask=mask, position_ids=positions, **inputs).logits
        width = together["completion_ids"].shape[1]
        logits = logits[:, -width - 1 : -1].float() / 0.9
        logits[..., list(trainer.markers.never_sampled)] = -torch.inf
        wanted = logits.log_softmax(-1).gather(2, ids[:, -width:, None])[..., 0]
        counts = together["tool_mask"][chosen].bool()
        assert counts.any()
        assert torch.allclose(together["old_per_token_logps"][chosen][counts], wanted[counts], atol=1e-4)
    plain = trainer._generate_and_score_completions([dict(row) for row in data if not _listed(row)] * 2)
    assert "pixel_values" not in plain
    trainer._compute_loss(trainer.model, {**together}).backward()


def _listed(row: dict[str, Any]) -> list[Any]:
    return [] if row["image"] is None else [row["image"]]


@pytest.mark.parametrize("latent_format", [LVR, None])
def test_a_run_on_mixed_records_trains(load_tiny: Any, tmp_path: Path, latent_format: Any) -> None:
    data = [{**row, "images": [row.pop("image")] if number % 2 else []} for number, row in enumerate(rows(count=4))]
    trainer = make_trainer(
        *opening(load_tiny),
        tmp_path,
        latent_format,
        data=Dataset.from_list(data),
        num_generations=2,
        steps_per_generation=2,
    )
    trainer.train()
    assert trainer.state.global_step == 1


PARTS = [{"type": "text", "text": "<|image"}, {"type": "text", "text": "_pad|>"}]


@pytest.mark.parametrize("content", ["what is <|lvr_start|>", PARTS])
def test_a_prompt_that_holds_a_control_token_is_refused(load_tiny: Any, tmp_path: Path, content: Any) -> None:
    trainer = make_trainer(*opening(load_tiny), tmp_path)
    data = [{"id": "one", "prompt": [{"role": "user", "content": content}], "images": []}] * 4
    with pytest.raises(Fault, match=r"record 'one': prompt\[0\].content.* holds the control token"):
        trainer._generate_and_score_completions(data)
