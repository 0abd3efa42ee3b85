"""The lab's GRPO experiment from the outside: a run of a few steps, resumed, and its refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rl_lvr import cli
from rl_lvr.lab.config import LabConfig
from rl_lvr.lab.grpo import MASS, GRPOConfig, summarise
from rl_lvr.lab.grpo_picture import draw, pairs, table


def row(before: float, after: float, mass: float | None = None) -> dict[str, Any]:
    made = {"own_before": before, "own_after": after, "oracle_after": 1.0, "seconds": 1.0, "wall_seconds": 2.0}
    made["attention_mass"] = {"with": mass, "without": 0.25}
    if mass is not None:
        made["with_attention"] = {"own_after": after, "oracle_after": 1.0, "seconds": 1.0}
    return made


def result(seed: int, **policies: dict[str, Any]) -> dict[str, Any]:
    return {"seed": seed, "start": {"oracle": 1.0, "steps": 9, MASS: 0.2}, "policies": policies}


def test_the_summary_holds_every_seed_and_judges_by_the_worst(tmp_path: Path) -> None:
    config = GRPOConfig(("unrolled", "gaussian"), LabConfig())
    results = [
        result(0, unrolled=row(0.5, 0.75), gaussian=row(0.5, 0.5, 0.5)),
        result(1, unrolled=row(0.6, 0.7), gaussian=row(0.6, 0.4, 0.2)),
    ]
    engines = [{"equal": True, "n": 64}, {"equal": False, "n": 64}]
    summary = summarise(results, engines, config)
    assert summary["policies"]["unrolled"]["gain"] == pytest.approx(0.175)
    assert summary["policies"]["unrolled"]["worst_gain"] == pytest.approx(0.1)
    assert summary["policies"]["gaussian"]["gain"] == pytest.approx(-0.1)
    assert [r["seed"] for r in summary["policies"]["unrolled"]["seeds"]] == [0, 1]
    assert summary["engines"]["equal"] is False  # one seed that differs is enough
    assert summary["engines"]["n"] == 128
    assert [r["attention_mass"]["with"] for r in pairs(summary)] == [0.5, 0.2]
    shown = table(summary)
    assert "+0.250" in shown
    assert "-0.200" in shown
    assert "DIFFERENT" in shown
    absent = summarise(results, [{"equal": None, "n": 0}], config)
    assert absent["engines"]["equal"] is None
    assert "not installed" in table(absent)
    draw(summary, tmp_path / "grpo.png")
    assert (tmp_path / "grpo.png").stat().st_size > 10_000


def test_what_cannot_run_is_refused_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["lab", "grpo", "--out", str(tmp_path / "out")]
    for words, said in (
        (["--policies", "context,monet"], "names 'monet'"),
        (["--policies", "context,context"], "each once"),
        (["--seeds", "0"], "at least 1"),
        (["--gradient-clip", "0"], "must be above 0"),
        (["--from", str(tmp_path)], "no pre-trained model of seed 0"),
    ):
        assert cli.main([*out, *words]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def lab(out: Path) -> subprocess.CompletedProcess[str]:
    words = ["lab", "grpo", "--out", str(out), "--train", "128", "--test", "16", "--max-steps", "1"]
    return subprocess.run(
        [sys.executable, "-m", "rl_lvr.cli", *words, "--policies", "gaussian"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_short_run_has_every_figure_and_a_second_one_repeats_nothing(tmp_path: Path) -> None:
    out = tmp_path / "lab-grpo"
    first = lab(out)
    assert first.returncode == 0, first.stderr
    summary = json.loads((out / "summary.json").read_text())
    (found,) = summary["policies"]["gaussian"]["seeds"]
    assert {"own_before", "own_after", "oracle_after", "attention_mass", "seconds"} <= set(found)
    assert set(found["attention_mass"]) == {"with", "without"}
    assert found["seconds"] > 1  # CPU seconds of a process that imported torch
    assert 0 <= found["own_after"] <= 1
    assert table(summary) in first.stdout
    assert (out / "grpo.png").stat().st_size > 10_000
    runs = json.loads((out / "seed-0" / "grpo-gaussian-attention" / "run.json").read_text())
    assert len(runs["starts"][-1]["resolved"]["training"]["rewards"]) == 2

    began = time.monotonic()
    second = lab(out)
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout
    assert time.monotonic() - began < 30
    assert json.loads((out / "summary.json").read_text()) == summary
