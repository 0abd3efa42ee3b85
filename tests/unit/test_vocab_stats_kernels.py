"""The Triton kernels of vocab_stats in Triton's interpreter, in a process of its own: it is chosen on import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
FILES = ("test_vocab_stats.py", "test_vocab_stats_gradient.py", "vocab_stats_kernel_cases.py")


def interpret(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=560)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_kernels_pass_what_plain_torch_passes() -> None:
    done = interpret(*(str(FOLDER / name) for name in FILES))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 60
    assert "skipped" not in done.stdout
