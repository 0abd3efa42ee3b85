"""Keeps what a benchmark found: passes its output through, and adds its last line to ratios.jsonl.

    python benchmarks/signals.py --threads 2 | python benchmarks/record.py signals

A row holds the benchmark's JSON, when and at which commit it ran, and the processor; GPU, threads and versions are in
the JSON. Nothing is kept of a benchmark that did not reach its last line.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def processor() -> str:
    models = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} x {models[0] if models else 'unknown'}"


def _cpuinfo() -> list[str]:
    return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()


def commit() -> str:
    """Of the code that ran; with a plus sign if files that git tracks were changed."""
    words = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def result(lines: Iterable[str], echo: Any) -> dict[str, Any] | None:
    """The JSON of the last line, each line written to `echo` as it comes; None if that is no JSON object."""
    last = ""
    for line in lines:
        echo.write(line)
        echo.flush()
        last = line
    try:
        found = json.loads(last)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", help="the benchmark's")
    parser.add_argument("--out", type=Path, default=HERE / "ratios.jsonl")
    chosen = parser.parse_args(arguments)
    found = result(sys.stdin, sys.stdout)
    if found is None:
        print("record: the last line is not a benchmark's JSON, so nothing is kept.", file=sys.stderr)
        return 1
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    row = {"benchmark": chosen.name, "timestamp": stamp, "commit": commit(), "processor": processor(), "result": found}
    with chosen.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
