"""What a benchmark found is kept whole, and nothing of one that did not reach its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "record.py"


def record(said: str, out: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(RECORD), "scoring", "--out", str(out)]
    return subprocess.run(words, input=said, capture_output=True, text=True, check=False)


def test_the_last_line_is_kept_and_all_lines_are_shown(tmp_path: Path) -> None:
    out = tmp_path / "ratios.jsonl"
    said = 'tiny: parallel 1 ms\n{"ratio": 24.0}\n'
    for _ in range(2):
        assert record(said, out).stdout == said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["benchmark"], row["result"]) for row in rows] == [("scoring", {"ratio": 24.0})] * 2
    assert all(row["commit"] and row["timestamp"] and row["processor"][0].isdigit() for row in rows)


def test_a_benchmark_that_broke_off_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "ratios.jsonl"
    for said in ("", "tiny: parallel 1 ms\n", '{"ratio": 24.0}\nTraceback: it died\n', "[1]\n"):
        broken = record(said, out)
        assert broken.returncode == 1
        assert "nothing is kept" in broken.stderr
    assert not out.exists()
