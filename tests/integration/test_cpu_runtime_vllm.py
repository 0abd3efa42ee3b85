"""With the CPU runtime, stock vLLM keeps Triton on, and so takes Model Runner V2: the one that feeds latents back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="for machines without a GPU only")
ASK = "from vllm.triton_utils import HAS_TRITON; print('HAS_TRITON', HAS_TRITON)"
NO_BACKEND = "from triton.backends import backends; del backends['cpu']"
NO_MARKER = """
import importlib.metadata as metadata
known = metadata.version
def version(name):
    if name == "vllm":
        raise metadata.PackageNotFoundError(name)
    return known(name)
metadata.version = version
"""


@pytest.mark.parametrize(
    ("before", "answer"),
    [("", "True"), (NO_BACKEND, "False"), (NO_MARKER, "False")],
    ids=["complete", "no backend", "no marker"],
)
def test_vllm_keeps_triton_on(before: str, answer: str) -> None:
    words = [sys.executable, "-c", f"{before}\n{ASK}"]
    variables = {**os.environ, "TRITON_INTERPRET": "1"}
    told = subprocess.run(words, capture_output=True, text=True, env=variables, timeout=120)
    assert f"HAS_TRITON {answer}" in told.stdout, told.stdout + told.stderr
