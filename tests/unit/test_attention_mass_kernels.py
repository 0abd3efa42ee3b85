"""test_attention_mass.py once more, on the Triton kernels: interpreted, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
def test_values_of_the_kernels() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_attention_mass.py")]
    answer = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=280)
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-1000:]
