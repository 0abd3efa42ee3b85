"""The rule that chooses a backend, and its refusals."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from rl_lvr.errors import UserError
from rl_lvr.ops.backends import BACKENDS, RULE, choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_rule() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choose("op", CUDA, dtype) == "triton"
        assert choose("op", CPU, dtype) == "torch"
    assert choose("op", CUDA, torch.float64) == "torch"
    assert all(backend in RULE for backend in BACKENDS)


@pytest.mark.parametrize("asked", ["reference", "torch"])
def test_what_is_asked_for_is_taken(asked: str) -> None:
    assert choose("op", CPU, torch.float32, asked) == choose("op", CUDA, torch.bfloat16, asked) == asked


def test_what_cannot_run_is_refused_with_its_cure() -> None:
    with pytest.raises(UserError, match=r"op: there is no backend 'cuda': choose one of auto"):
        choose("op", CPU, torch.float32, "cuda")
    with pytest.raises(UserError, match=r"no kernel for float64.*backend='torch'"):
        choose("op", CUDA, torch.float64, "triton")


@pytest.mark.parametrize(("interpret", "answer"), [("0", "refused"), ("1", "triton")])
def test_triton_on_the_cpu_needs_the_interpreter(interpret: str, answer: str) -> None:
    code = (
        "import torch\nfrom rl_lvr.ops.backends import choose\nfrom rl_lvr.errors import UserError\n"
        "try:\n    print(choose('op', torch.device('cpu'), torch.float32, 'triton'))\n"
        "except UserError as error:\n    assert 'TRITON_INTERPRET=1' in str(error)\n    print('refused')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == answer, done.stderr


def test_import_is_light() -> None:
    code = "import sys, rl_lvr.ops.backends\nprint(*{'torch', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "", done.stderr
