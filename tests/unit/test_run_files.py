"""Files of a run that a kill may leave half written: metrics.jsonl and run.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from rl_lvr.errors import UserError
from rl_lvr.training.runs.callbacks import MetricsFile
from rl_lvr.training.runs.folder import PARTIAL_FILE, RUN_FILE, open_run, write_run

ROWS = [json.dumps({"step": step, "loss": 1.0 / step}) for step in (1, 2, 3, 4)]


def resumed(path: Path, step: int) -> list[dict]:
    """What the file holds once a run has gone on at `step` and logged a row."""
    arguments = TrainingArguments(output_dir=str(path.parent), use_cpu=True, report_to="none")
    state, control, metrics = TrainerState(global_step=step), TrainerControl(), MetricsFile(path)
    metrics.on_train_begin(arguments, state, control)
    state.global_step += 1
    metrics.on_log(arguments, state, control, logs={"loss": 0.5})
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("cut", [1, 5, len(ROWS[3]) - 1])
def test_a_torn_last_row_does_not_stop_a_resumption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*ROWS[:3], ROWS[3][:-cut]]))
    rows = resumed(path, 3)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] == 0.5
    assert "its last line, 4, was cut off and is left out" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_whole_last_row_without_its_newline_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(ROWS))
    assert [row["step"] for row in resumed(path, 4)] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err == ""


def test_a_torn_character_is_a_torn_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes("\n".join([*ROWS[:2], '{"step": 3, "note": "\u00e9']).encode()[:-1])
    assert [row["step"] for row in resumed(path, 2)] == [1, 2, 3]


@pytest.mark.parametrize("damage", [ROWS[1][:-4], "[]", '{"loss": 1}', "\x00\x00"])
@pytest.mark.parametrize("place", [1, 3])
def test_a_bad_row_elsewhere_is_an_error(tmp_path: Path, damage: str, place: int) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [*ROWS[:place], damage, *ROWS[place:3]]
    before = "".join(line + "\n" for line in lines)  # at place 3 it is the last line, but one that ends
    path.write_text(before)
    with pytest.raises(UserError, match=f"line {place + 1} is damaged"):
        resumed(path, 3)
    assert path.read_text() == before


def test_rows_after_the_checkpoint_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(row + "\n" for row in ROWS))
    assert [row.get("loss") for row in resumed(path, 2)] == [1.0, 0.5, 0.5]


WRITER = """
import resource, signal, sys
from rl_lvr.training.runs.folder import write_run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
write_run(sys.argv[1], "grpo", {}, {"text": "x" * 100_000})
"""


def test_a_record_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    write_run(str(tmp_path), "sft", {}, {})
    before = (tmp_path / RUN_FILE).read_bytes()
    done = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert (tmp_path / RUN_FILE).read_bytes() == before
    write_run(str(tmp_path), "grpo", {}, {})
    assert len(json.loads((tmp_path / RUN_FILE).read_text())["starts"]) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == [RUN_FILE]


def test_a_kill_before_the_first_record_leaves_a_folder_to_begin_in(tmp_path: Path) -> None:
    (tmp_path / PARTIAL_FILE).write_text('{"starts": [')
    assert open_run(str(tmp_path), None, overwrite=False) is None
    assert not list(tmp_path.iterdir())
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds no run"):
        open_run(str(tmp_path), None, overwrite=False)


def test_starts_are_kept_and_a_damaged_record_is_named(tmp_path: Path) -> None:
    for resume in (False, True):
        write_run(str(tmp_path), "sft", {"resume": resume}, {})
    assert [start["given"]["resume"] for start in json.loads((tmp_path / RUN_FILE).read_text())["starts"]] == [
        False,
        True,
    ]
    (tmp_path / RUN_FILE).write_text('{"starts": [')
    with pytest.raises(UserError, match=r"run.json is damaged"):
        write_run(str(tmp_path), "sft", {}, {})
