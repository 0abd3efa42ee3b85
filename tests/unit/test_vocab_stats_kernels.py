"""The Triton kernels of vocab_stats in Triton's interpreter, in a process of its own: it is chosen on import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
FILES = {"test_vocab_stats.py": 25, "test_vocab_stats_gradient.py": 30, "vocab_stats_kernel_cases.py": 5}
"""And how many tests each has at least."""


def interpret(file: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=560)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", FILES)
def test_the_kernels_pass_what_plain_torch_passes(file: str) -> None:
    done = interpret(file)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= FILES[file]
    assert "skipped" not in done.stdout
