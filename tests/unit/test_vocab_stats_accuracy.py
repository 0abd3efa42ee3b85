"""The entropy's relative error at Qwen's vocabulary, beside TRL's formula and the textbook's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_lvr.ops.vocab_stats import VocabStats, vocab_stats

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("nats", [10.0, 1e-2, 1e-5, 1e-7])
def test_entropy(monkeypatch: pytest.MonkeyPatch, nats: float) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import entropy

    errors = entropy.errors_at(nats)
    assert errors.nats == pytest.approx(nats, rel=0.1)
    assert errors.largest["ours"] <= 1e-5
    if nats <= 1e-5:  # control: the test sees the digits that the others lose
        assert min(errors.largest["trl"], errors.largest["plain"]) > 1e-3


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_vocab

    return gpu_vocab


def test_gate_of_the_gpu_benchmark(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert bench.gate(cpu, small=True) == []

    def off_by_an_id(hidden: Tensor, weight: Tensor, **asked: Any) -> VocabStats:
        if asked.get("backend") != "reference":
            weight = torch.cat([weight[:-1], torch.zeros_like(weight[:1])])
        return vocab_stats(hidden, weight, **asked)

    monkeypatch.setattr(bench, "vocab_stats", off_by_an_id)
    assert any("entropy" in fault for fault in bench.gate(cpu, small=True))


def test_measurements_of_the_gpu_benchmark(bench: Any) -> None:
    cells = [cell for cell in bench.measurements(torch.device("cpu"), small=True) if cell.provider != "trl"]
    assert {(cell.provider, cell.mode) for cell in cells} == {
        (provider, mode) for provider in ("naive", "ours") for mode in ("forward", "all", "backward")
    }
    for cell in cells:
        cell.run()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_kernels_on_a_gpu(bench: Any) -> None:
    assert bench.gate(torch.device("cuda"), small=True) == []
