"""The entropy's relative error at Qwen's vocabulary, beside TRL's formula and the textbook's."""

from __future__ import annotations

from pathlib import Path

import pytest

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
