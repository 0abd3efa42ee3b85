"""When `benchmarks/rollout.py` fails: wrong rollouts, or on a GPU with graphs a bar that is missed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "rollout.py"


@pytest.fixture(scope="module")
def rollout() -> Any:
    spec = importlib.util.spec_from_file_location("rollout_benchmark", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("right", "met", "code"), [(True, True, 0), (True, None, 0), (True, False, 1), (False, None, 1), (False, True, 1)]
)
def test_a_missed_bar_fails(rollout: Any, right: bool, met: bool | None, code: int) -> None:
    assert rollout.exit_code({"right": right, "met": met}) == code
