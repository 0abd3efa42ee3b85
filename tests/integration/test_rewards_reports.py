"""What `report_to` sends elsewhere: the same figures as metrics.jsonl, for every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from grpo_cases import make_trainer, opening, rows

NAMES = ("latent/rate", "latent/replay_logp_diff", "signal/attention_mass", "rewards/looks/mean", "phase/score_seconds")


@pytest.mark.parametrize("where", ["tensorboard", "none"])
def test_tensorboard_gets_every_figure(load_tiny: Any, tmp_path: Path, where: str) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model, processor = opening(load_tiny)
    data = rows(images=False)
    trainer = make_trainer(
        model, processor, tmp_path, reward_names=("looks",), data=data, report_to=where, max_steps=2, parity_check=False
    )
    trainer.train()
    files = list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert len(files) == (where == "tensorboard")
    for name in NAMES:
        # A signal has no mean in a step whose text did not come to the latents.
        kept = {row["step"]: row[name] for row in trainer.state.log_history if name in row}
        assert 2 in kept
        for file in files:
            events = accumulators.EventAccumulator(str(file)).Reload().Scalars(f"train/{name}")
            assert {event.step: event.value for event in events} == pytest.approx(kept)
