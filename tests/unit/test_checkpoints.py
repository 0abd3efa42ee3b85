"""Checkpoints on disk: a seal that every change breaks, the newest whole one, rotation, what a kill leaves behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rl_lvr.errors import UserError
from rl_lvr.training.runs.checkpoints import (
    MANIFEST,
    PARTIAL,
    defect,
    newest_whole,
    publish,
    require_whole,
    rotate,
    seal,
    tidy,
)

FILES = {"model.safetensors": b"w" * 3000, "optimizer.pt": b"o" * 2000, "global_step1/shard.pt": b"s" * 500}


def checkpoint(run: Path, step: int, files: dict[str, bytes] = FILES) -> Path:
    """Written, sealed and moved as a trainer does it."""
    folder = run / PARTIAL / f"checkpoint-{step}"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    seal(folder)
    return publish(folder, run)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def steps(run: Path) -> list[int]:
    return sorted(int(folder.name[11:]) for folder in run.glob("checkpoint-*"))


def test_a_sealed_checkpoint_is_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    assert defect(folder) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    require_whole(folder)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(name=st.sampled_from(sorted(FILES)), at=st.integers(0, 499), cut=st.booleans())
def test_every_flipped_bit_and_every_cut_is_found_by_name(
    tmp_path_factory: pytest.TempPathFactory, name: str, at: int, cut: bool
) -> None:
    folder = checkpoint(tmp_path_factory.mktemp("run"), 1)
    if cut:
        os.truncate(folder / name, at)
    else:
        flip(folder / name, at)
    wrong = defect(folder)
    assert wrong is not None
    assert name in wrong
    if cut:
        assert f"{at} bytes" in wrong
    else:
        assert "altered" in wrong


def test_a_missing_file_and_a_missing_or_damaged_manifest_are_found(tmp_path: Path) -> None:
    for step, name in ((1, "optimizer.pt"), (2, MANIFEST)):
        folder = checkpoint(tmp_path, step)
        (folder / name).unlink()
        assert name in (defect(folder) or "")
    folder = checkpoint(tmp_path, 3)
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:50])
    assert "damaged manifest" in (defect(folder) or "")
    (folder / MANIFEST).write_text(json.dumps({"files": ["model.safetensors"]}))
    assert "damaged manifest" in (defect(folder) or "")
    assert defect(tmp_path / "nowhere") == "is no folder"


def test_the_newest_whole_one_is_taken_and_the_others_are_named(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    assert newest_whole(tmp_path) == (tmp_path / "checkpoint-6", [])
    os.truncate(tmp_path / "checkpoint-6" / "optimizer.pt", 5)
    (tmp_path / "checkpoint-4" / MANIFEST).unlink()
    found, passed = newest_whole(tmp_path)
    assert found == tmp_path / "checkpoint-2"
    assert any(clause.startswith("checkpoint-6 has a file optimizer.pt of 5 bytes") for clause in passed)
    assert any(clause.startswith("checkpoint-4 was not written to its end") for clause in passed)
    with pytest.raises(UserError, match=r"checkpoint-6 has a file optimizer\.pt.*: resume from .*/checkpoint-2\."):
        require_whole(tmp_path / "checkpoint-6")
    flip(tmp_path / "checkpoint-2" / "model.safetensors", 7)
    assert newest_whole(tmp_path)[0] is None
    with pytest.raises(UserError, match=r"altered file model\.safetensors: there is no whole one beside it"):
        require_whole(tmp_path / "checkpoint-2")


def test_newest_is_what_was_written_last_not_the_highest_step(tmp_path: Path) -> None:
    """A run that went back to an earlier checkpoint leaves later steps that it has given up."""
    for step in (10, 20, 12):
        checkpoint(tmp_path, step)
    assert newest_whole(tmp_path)[0] == tmp_path / "checkpoint-12"


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    os.truncate(tmp_path / "checkpoint-5" / "optimizer.pt", 5)
    folder = checkpoint(tmp_path, 5, {"other": b"x"})
    assert defect(folder) is None
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "other"]
    assert steps(tmp_path) == [5]


def test_rotation_keeps_the_newest_and_what_it_is_told_to(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        newest = checkpoint(tmp_path, step)
    rotate(tmp_path, None, newest)
    assert steps(tmp_path) == [1, 2, 3, 4]
    rotate(tmp_path, 2, newest, tmp_path / "checkpoint-1")
    assert steps(tmp_path) == [1, 4]
    rotate(tmp_path, 1, newest, None)
    assert steps(tmp_path) == [4]
    rotate(tmp_path, 1, newest, None)
    assert steps(tmp_path) == [4]


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    half = tmp_path / PARTIAL / "checkpoint-2"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    tidy(tmp_path / "no such run")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_kill_between_seal_and_move_loses_nothing(tmp_path: Path, replaced: bool) -> None:
    sealed = checkpoint(tmp_path, 2)
    (tmp_path / PARTIAL).mkdir()
    sealed.rename(tmp_path / PARTIAL / sealed.name)
    if replaced:  # killed between the two renames: the one before lies beside it
        (tmp_path / PARTIAL / "replaced").mkdir()
    tidy(tmp_path)
    assert defect(tmp_path / "checkpoint-2") is None
    assert not (tmp_path / PARTIAL).exists()
