"""The lab from the outside: a short demo in real processes, cut off and continued, and the evaluation verb."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rl_lvr.data.puzzles import chance
from rl_lvr.lab.config import LabConfig
from rl_lvr.lab.picture import table


def demo(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rl_lvr.cli", "lab", "demo", "--out", str(out)]
    command += ["--train", "128", "--test", "16", "--max-steps", "6", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_demo_that_is_cut_off_goes_on_and_a_third_run_does_nothing(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    first = demo(out)
    deadline = time.monotonic() + 120
    while not (out / "seed-0" / "pretrain" / "run.json").is_file() and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)  # what Ctrl-C in a terminal does
    error = first.communicate(timeout=60)[1]
    assert first.returncode == 130, error
    assert "the same command goes on" in error
    assert "Traceback" not in error
    log = (out / "seed-0" / "pretrain.txt").read_text()
    steps = int(re.search(r"stopped at step (\d+) of 6", log)[1])
    kept = list((out / "seed-0" / "pretrain").glob("checkpoint-*/trainer_state.json"))
    assert [path.parent.name for path in kept] == ([f"checkpoint-{steps}"] if steps else [])
    alive = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True, check=False).stdout.split()
    assert alive == []  # no child is left behind

    second = demo(out)
    printed, error = second.communicate(timeout=600)
    assert second.returncode == 0, error
    assert (out / "demo.png").stat().st_size > 10_000
    summary = json.loads((out / "summary.json").read_text())
    for name in ("diagnostic", "weak"):
        kept = {"oracle", "own", "zeros", "noise", "swap", "direct", "chance", "n"}
        assert set(summary[name]) == kept
        assert summary[name]["n"] == 16
        assert summary["seeds"][0][name]["own"] == summary[name]["own"]
    assert summary["diagnostic"]["chance"] == pytest.approx(1 / 8)
    assert set(summary["grpo"]) == {"policy", "own_before", "own_after", "oracle_after", "seconds"}
    assert (out / "seed-0" / "grpo-unrolled" / "trainer_state.json").is_file()
    assert summary["seconds"]["total"] > 0
    assert table(summary) in printed

    began = time.monotonic()
    third = demo(out)
    assert third.communicate(timeout=60)[0] == printed
    assert third.returncode == 0
    assert time.monotonic() - began < 20

    other = demo(out, "--family", "qwen3_vl")
    assert other.wait(60) == 2
    assert "other settings" in other.communicate()[1]


def test_the_two_sets_ask_what_they_claim() -> None:
    """The weak targets are one cell whatever the puzzle; the diagnostic ones are the path."""
    from rl_lvr.data.puzzles import generate

    config = LabConfig()
    weak = generate(config.puzzles("weak"), 20, "test")
    assert {record.latents[0].cells for record in weak} == {(0,) * 5}
    assert all(record.meta["hops"] == 1 for record in weak)
    deep = generate(config.puzzles("diagnostic"), 20, "test")
    assert all(record.latents[0].cells == tuple(record.meta["cells"][:5]) for record in deep)
    assert chance(config.puzzles("diagnostic")) == pytest.approx(1 / 8)
