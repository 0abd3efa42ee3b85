"""Fixtures shared by all tests: tiny real models of the four families. Batches for them are in helpers.py."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpu_runtime_env  # noqa: F401 - before all others
import pytest
from helpers import FAMILIES, WORDS
from hypothesis import HealthCheck, settings

from rl_lvr.lab.tiny import build_tiny
from rl_lvr.models import TinySpec

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts in the background that way, and the commands under test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says more about the machine than about the code; pytest's timeout bounds a test.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_folder(family, **changes of TinySpec)`: the saved model, built once per shape."""
    built: dict[TinySpec, Path] = {}

    def folder(family: str, **changes: Any) -> Path:
        spec = TinySpec(family, **{"words": WORDS, **changes})
        if spec not in built:
            built[spec] = build_tiny(spec, tmp_path_factory.mktemp("tiny") / family)
        return built[spec]

    return folder


@pytest.fixture(scope="session")
def load_tiny(tiny_folder: Callable[..., Path]) -> Callable[..., tuple[Any, Any]]:
    """`load_tiny(family, **changes)`: a fresh (model, processor), fp32, in evaluation mode."""
    import torch

    from rl_lvr.models import load_model

    def load(family: str, **changes: Any) -> tuple[Any, Any]:
        return load_model(tiny_folder(family, **changes), dtype=torch.float32)

    return load


@pytest.fixture(params=FAMILIES)
def family_name(request: pytest.FixtureRequest) -> str:
    """Runs a test once for each of the four families."""
    return request.param


@pytest.fixture
def tiny(load_tiny: Callable[..., tuple[Any, Any]], family_name: str) -> tuple[Any, Any]:
    """A fresh (model, processor) of every family."""
    return load_tiny(family_name)
