"""Every kernel compiles for three generations of GPUs, without spilling registers and within their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("ops_compile_worker.py")
SHARED_PER_PROGRAM = {
    80: 163 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # CUDA C++ programming guide, compute capabilities


def reports(capability: int, *more: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, str(WORKER), str(capability), *more]
    answer = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=280)
    assert answer.returncode == 0, answer.stderr[-4000:]
    return [json.loads(line) for line in answer.stdout.splitlines()]


def over_limit(report: dict[str, Any], capability: int) -> bool:
    return report["spilled"] > 0 or report["shared"] > SHARED_PER_PROGRAM[capability]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_PER_PROGRAM)
def test_kernels_fit(capability: int) -> None:
    found = reports(capability)
    for report in found:
        print(report)
    assert len(found) >= 8
    assert [report for report in found if over_limit(report, capability)] == []


@pytest.mark.slow
def test_what_the_gate_would_catch() -> None:
    (report,) = reports(90, "control")
    assert report["spilled"] > 0
    assert over_limit(report, 90)
