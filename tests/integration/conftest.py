"""What integration tests share: tiny models with an engine, and for latent SFT a model and its puzzles on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_cases import FORMATS, Rig
from lab_tools import build_model, puzzles, write_puzzles

from rl_lvr.data.record import Record
from rl_lvr.data.writing import write_parquet
from rl_lvr.latents.format import get_format
from rl_lvr.models import load_model


@pytest.fixture(scope="module")
def rigs(load_tiny):
    made: dict[str, Rig] = {}

    def rig(family: str) -> Rig:
        if family not in made:
            made[family] = Rig(*load_tiny(family, latent_formats=FORMATS))
        return made[family]

    return rig


@pytest.fixture
def rig(rigs, family_name) -> Rig:
    return rigs(family_name)


@pytest.fixture
def qwen(rigs) -> Rig:
    return rigs("qwen2_5_vl")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    build_model(folder / "model")
    write_puzzles(folder / "data")
    return folder


@pytest.fixture(scope="session")
def opener(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in whose head START's row is long, so that it opens spans without having learned to."""
    folder = build_model(tmp_path_factory.mktemp("opener") / "model")
    model, processor = load_model(folder, dtype=torch.float32)
    start = processor.tokenizer.convert_tokens_to_ids(get_format("lvr").start)
    with torch.no_grad():
        model.get_output_embeddings().weight[start] *= 3
    model.save_pretrained(folder)
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
