"""LatentSFTTrainer in place of TRL's: a model by path with records, and data sets of TRL without latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lab_tools import sft
from trl import SFTConfig, SFTTrainer

from rl_lvr.data.records import load_records
from rl_lvr.errors import UserError
from rl_lvr.latents.format import get_format
from rl_lvr.training.sft.trainer import LatentSFTTrainer

TALKS = [
    {"prompt": [{"role": "user", "content": f"{n} hops from red"}], "completion": [{"role": "assistant", "content": c}]}
    for n, c in ((1, "blue"), (2, "green is next"), (3, "yellow"), (1, "from blue"))
]
TEXTS = [{"text": f"from {c} {n} hops what is next"} for c in ("red", "blue", "green") for n in (1, 2)]


def plain(folder: Path, **changes: Any) -> SFTConfig:
    given = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, **changes}
    return SFTConfig(str(folder), report_to="none", save_strategy="no", use_cpu=True, bf16=False, **given)


def test_a_path_and_records_train_as_the_command_does(place: Path, tmp_path: Path) -> None:
    whole = {"freeze_vision_tower": False, "freeze_merger": False}
    assert sft(place / "model", place / "data", tmp_path / "command", gradient_checkpointing=True, **whole) == 0
    records = load_records(str(place / "data" / "train.parquet"))
    chosen = get_format("lvr", k=3)
    trainer = LatentSFTTrainer(str(place / "model"), plain(tmp_path), train_dataset=records, latent_format=chosen)
    trainer.train()
    lines = (tmp_path / "command" / "metrics.jsonl").read_text().splitlines()
    theirs = [row for row in map(json.loads, lines) if "loss" in row]
    mine = [row for row in trainer.state.log_history if "loss" in row]
    assert len(mine) == len(theirs) == 2
    for name in ("loss", "grad_norm", "latent/nmse"):
        assert [row[name] for row in mine] == [row[name] for row in theirs], name
    with pytest.raises(UserError, match="max_length cannot be used on records"):
        LatentSFTTrainer(
            str(place / "model"), plain(tmp_path, max_length=9), train_dataset=records, latent_format=chosen
        )


@pytest.mark.parametrize(
    ("data", "more"),
    [(TALKS, {"completion_only_loss": False, "pad_to_multiple_of": 8}), (TEXTS, {"max_length": 4, "packing": True})],
    ids=["talks", "packed texts"],
)
def test_a_data_set_of_trl_gives_trls_numbers(
    tmp_path: Path, tiny_folder: Any, data: list[dict[str, Any]], more: dict[str, Any]
) -> None:
    """Settings that records have no use for are TRL's here."""
    folder = tiny_folder("qwen2")

    def run(kind: type, **changes: Any) -> Any:
        given = plain(tmp_path, **more | changes)
        trainer = kind(str(folder), given, train_dataset=Dataset.from_list(data))
        trainer.train()
        return trainer

    one, two, other = run(SFTTrainer), run(LatentSFTTrainer), run(LatentSFTTrainer, max_length=5, packing=False)
    parameters = dict(two.model.named_parameters())
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in one.model.named_parameters())
    assert [row.get("loss") for row in one.state.log_history] == [row.get("loss") for row in two.state.log_history]
    losses = [row.get("loss") for row in other.state.log_history]
    assert [row.get("loss") for row in two.state.log_history] != losses  # the control: the settings matter
