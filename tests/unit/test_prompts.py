"""Records as the rows of GRPO: columns, images, and what is refused before a run."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rl_lvr.data.check import require_valid
from rl_lvr.data.encoding import Encoder
from rl_lvr.data.prompts import PromptJudge, prompt_rows
from rl_lvr.data.record import Record
from rl_lvr.data.records import load_records
from rl_lvr.data.writing import write_jsonl
from rl_lvr.errors import UserError
from rl_lvr.models import family_of


def records(folder: Path) -> list[Record]:
    Image.new("RGB", (56, 56), "red").save(folder / "a.png")
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is next"}]}
    told = {"role": "assistant", "content": [{"type": "text", "text": "<latent> red"}]}
    row = {"messages": [question, told], "images": ["a.png"], "answer": "red", "category": "one"}
    rows = [{"id": "a", **row, "meta": {"hops": 3}}, {"id": "b", **row, "meta": {"source": "here"}}]
    return [Record.from_row(each, folder) for each in rows]


def judge(encoder: Encoder, *, needed: dict[str, str] | None = None) -> PromptJudge:
    return PromptJudge(encoder, needed or {"answer": "accuracy"}, ["spans", "prompts"])


@pytest.fixture
def encoder(load_tiny: Any) -> Encoder:
    model, processor = load_tiny("qwen2_5_vl")
    return Encoder(processor, family_of(model), None)


def written(folder: Path, *changed: Record) -> Path:
    path = folder / "train.jsonl"
    write_jsonl(changed, path)
    return path


def test_rows_hold_the_prompt_images_and_every_column(tmp_path: Path, encoder: Encoder) -> None:
    path = written(tmp_path, *records(tmp_path))
    asked = judge(encoder)
    require_valid(path, judge=asked)
    rows = prompt_rows(load_records(path), asked.meta)
    assert len(rows) == 2
    first = rows[0]
    assert list(first) == ["prompt", "images", "id", "answer", "category", "hops", "source"]
    assert [message["role"] for message in first["prompt"]] == ["user"]  # the assistant's turn is not read
    assert [image.size for image in first["images"]] == [(56, 56)]
    assert (first["hops"], first["source"], rows[1]["hops"], rows[1]["source"]) == (3, None, None, "here")
    group = rows[[1, 1]]
    assert group["images"][0] is group["images"][1]  # decoded once
    assert pickle.loads(pickle.dumps(rows))[1]["id"] == "b"  # as a data loader's workers get it


def test_a_record_that_no_reward_can_judge_is_named(tmp_path: Path, encoder: Encoder) -> None:
    good, other = records(tmp_path)
    with pytest.raises(UserError, match=r"line 2 .*answer: is missing, and reward 'accuracy' needs it"):
        require_valid(written(tmp_path, good, replace(other, answer=None)), judge=judge(encoder))
    with pytest.raises(UserError, match=r"meta\.hops: is missing, and reward 'mine' needs it"):
        require_valid(written(tmp_path, good, other), judge=judge(encoder, needed={"hops": "mine"}))
    require_valid(written(tmp_path, good), judge=judge(encoder, needed={"hops": "mine"}))  # the control


def test_a_column_that_would_hide_another_is_refused(tmp_path: Path, encoder: Encoder) -> None:
    good, _ = records(tmp_path)
    for name in ("spans", "images", "prompts"):
        with pytest.raises(UserError, match=rf"meta\.{name}: hides a column of that name"):
            require_valid(written(tmp_path, replace(good, meta={name: 1})), judge=judge(encoder))


def test_latents_in_a_prompt_are_refused(tmp_path: Path, encoder: Encoder) -> None:
    good, _ = records(tmp_path)
    asked, told = good.messages
    turns = (asked, told, {"role": "user", "content": [{"type": "text", "text": "and then"}]})
    with pytest.raises(UserError, match="has latents in the prompt"):
        require_valid(written(tmp_path, replace(good, messages=turns)), judge=judge(encoder))
