"""`make bench-gpu`: the whole path on tiny shapes, what stands before it, and its targets."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    return gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    words = [sys.executable, str(FOLDER / "gpu.py")]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.startswith("bench-gpu: no CUDA GPU here: run it on a machine that has one")


def test_every_measurement_gets_a_row(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    assert bench.main(["--device", "cpu", "--small", "--out", str(tmp_path)]) == 0
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({(r["kernel"], r["provider"], r["mode"], r["x"], r["config"]) for r in rows})
    assert {"eager", "text_rows", "path_a", "path_b", "naive", "trl", "ours"} <= {row["provider"] for row in rows}
    for row in rows:
        assert 0 < float(row["y20"]) <= float(row["y50"]) <= float(row["y80"])
        assert row["gpu"] == "none: CPU"
        assert json.loads(row["versions"])["torch"] == torch.__version__
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_nothing_is_timed_after_a_wrong_result(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = bench.gpu_attention.attention_mass_reduced

    def wrong(*values: object, **options: object) -> object:
        sums = right(*values, **options)
        return replace(sums, per_head=1.001 * sums.per_head)

    monkeypatch.setattr(bench.gpu_attention, "attention_mass_reduced", wrong)
    assert bench.main(["--device", "cpu", "--small", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "sum over queries: error" in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_adds_to_the_table(bench: ModuleType, tmp_path: Path) -> None:
    row = bench.Row("k", "p", "m", "time", 1, 1.0, 1.0, 1.0, "{}", "", "", "")
    for _ in range(2):
        bench.write([row], tmp_path / "results.csv")
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0].startswith("kernel,provider,mode,metric,x,y50,y20,y80,config,gpu,timestamp,versions")
    assert lines[1] == lines[2]
    assert len(lines) == 3


def test_targets_compare_the_same_work(bench: ModuleType) -> None:
    def row(provider: str, mode: str, milliseconds: float, batch: int) -> object:
        config = json.dumps({"batch": batch})
        return bench.Row("attention_mass", provider, mode, "time", 4096, *[milliseconds] * 3, config, "", "", "")

    rows = [
        row("path_a", "span", 0.064, 64),
        row("scoring_layer", "forward", 4.0, 4),
        row("text_rows", "span", 19.2, 64),
    ]
    share, text, through, eager = bench.targets(rows)
    assert share.value == pytest.approx(0.1)
    assert share.met
    assert text.value == pytest.approx(300)
    assert text.met
    assert not through.met  # not measured
    assert not eager.met
