"""test_attention_mass.py once more, on the Triton kernels: interpreted, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.parametrize("part", ["plain_torch", "not plain_torch"])
def test_values_of_the_kernels(part: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", part]
    words.append(str(HERE / "test_attention_mass.py"))
    answer = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=280)
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", answer.stdout)[1]) >= 24
    assert "skipped" not in answer.stdout
