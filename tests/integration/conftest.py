"""What the tests of latent SFT share: a tiny model and its puzzles on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from lab_tools import build_model, puzzles, write_puzzles

from rl_lvr.data.records import Record
from rl_lvr.data.writing import write_parquet


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    build_model(folder / "model")
    write_puzzles(folder / "data")
    return folder


def without_latents(record: Record) -> Record:
    plain = [{"type": "text", "text": record.answer}]
    return replace(record, messages=(*record.messages[:-1], {"role": "assistant", "content": plain}), latents=None)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records in blocks with targets, with spans but no targets, and without any span: whole batches of each kind."""
    folder = tmp_path_factory.mktemp("mixed")
    records = puzzles(24)
    records[8:16] = [replace(record, latents=None) for record in records[8:16]]
    records[16:] = [without_latents(record) for record in records[16:]]
    write_parquet(records, folder / "train.parquet")
    return folder
