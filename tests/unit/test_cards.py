"""The model card of a run: it names what others can know, and no path of this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from rl_lvr.latents.format import get_format
from rl_lvr.training.runs.card import FILE, Card, Named, named_file, named_model


def test_models_have_the_names_that_others_know_them_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = "/somewhere/hub/models--Qwen--Qwen2.5-VL-3B-Instruct/snapshots/0123abc"
    assert named_model(cache) == Named("Qwen/Qwen2.5-VL-3B-Instruct", on_hub=True)
    assert named_model("Qwen/Qwen3-VL-8B-Instruct") == Named("Qwen/Qwen3-VL-8B-Instruct", on_hub=True)
    for inner in ("", "merged", "checkpoint-20", "checkpoint-20/merged"):
        (tmp_path / "my-model" / inner).mkdir(parents=True, exist_ok=True)
        assert named_model(str(tmp_path / "my-model" / inner)) == Named("my-model")
    monkeypatch.chdir(tmp_path / "my-model")
    assert named_model(".") == Named("my-model")
    assert named_model(str(tmp_path / "gone" / "model")) == Named("model")
    assert named_model("") is None
    assert named_model("/") is None


def test_data_files_have_the_name_of_their_folder_too(tmp_path: Path) -> None:
    assert named_file(str(tmp_path / "colours" / "train.jsonl")) == Named("colours/train.jsonl")
    assert named_file("") is None


CARD = Card(
    name="my-run",
    method="TRL's SFT on latents",
    base=Named("my-model"),
    data=Named("colours/train.jsonl"),
    latents=get_format("lvr", k=3),
    adapter=False,
    text_only=False,
    tags=("trl", "sft"),
)


def test_a_card_names_base_data_latents_and_use(tmp_path: Path) -> None:
    CARD.save(tmp_path)
    card = ModelCard.load(tmp_path / FILE)
    assert card.data.base_model == "my-model"
    assert card.data.library_name == "transformers"
    assert {"rl-lvr", "trl", "sft", "latent-reasoning"} <= set(card.data.tags)
    for words in (
        "`my-model`",
        "`colours/train.jsonl`",
        "exactly 3 latents",
        "`<|lvr_start|>`",
        "rl-lvr generate my-run",
    ):
        assert words in card.text, words
    assert "huggingface.co" not in card.text, "a folder here is nothing that the hub knows"


@pytest.mark.parametrize(
    ("changes", "there", "not_there"),
    [
        ({"latents": None}, "AutoModelForImageTextToText", "rl-lvr generate"),
        ({"latents": None, "text_only": True}, "AutoModelForCausalLM", "--image"),
        ({"text_only": True}, "rl-lvr generate my-run --question", "--image"),
        ({"adapter": True}, "rl-lvr generate my-run/merged", "fine-tuned version"),
        ({"base": Named("Qwen/Qwen3", True)}, "(https://huggingface.co/Qwen/Qwen3)", "None"),
        ({"base": None, "data": None}, "a model that was not loaded from a folder", "None"),
        ({"hub_id": "me/my-run"}, "rl-lvr serve me/my-run", "None"),
    ],
)
def test_what_a_card_says_of_other_runs(tmp_path: Path, changes: dict, there: str, not_there: str) -> None:
    replace(CARD, **changes).save(tmp_path)
    text = (tmp_path / FILE).read_text()
    assert there in text
    assert not_there not in text
