"""GRPO on a model that hardly ever opens a span: START forced, biased and forbidden in its rollouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_cases import FORMATS, LVR, MONET, generation, gradients, make_trainer, opening
from test_grpo_cuts import AfterTheCut, told_otherwise

from rl_lvr.errors import Fault, UserError
from rl_lvr.latents.format import get_format
from rl_lvr.latents.spans import find_spans
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.record import read_rollouts
from rl_lvr.rollout.types import Capability


def metrics(trainer: Any) -> dict[str, float]:
    return {name: values[0] for name, values in trainer._metrics["train"].items() if name.startswith("latent/")}


def rare(load_tiny: Any, folder: Path, start: str, latent_format: Any = LVR, **changes: Any) -> Any:
    """A trainer of untrained weights, which draw START once in some 300 tokens."""
    model, processor = load_tiny("qwen2_5_vl", latent_formats=FORMATS)
    folder.mkdir(exist_ok=True)
    return make_trainer(model, processor, folder, latent_format, latent_start=start, **changes)


@pytest.mark.parametrize("latent_format", [LVR, MONET], ids=["at_start", "before_start"])
def test_a_step_with_a_forced_start(load_tiny: Any, tmp_path: Path, latent_format: Any) -> None:
    trainer = rare(load_tiny, tmp_path, "forced", latent_format)
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "latent/rate" in row]
    assert row["latent/rate"] == 1.0
    assert row["latent/replay_logp_diff"] < 1e-4
    assert row["latent/replay_latent_diff"] < 1e-4
    assert row["latent/importance_ratio"] == pytest.approx(1.0, abs=1e-3)
    assert row["grad_norm"] > 0
    for rollout in read_rollouts(tmp_path / "run"):
        assert rollout.completion_ids is not None
        assert rollout.completion_ids[0] == trainer.markers.start

    control = rare(load_tiny, tmp_path / "free", "free", latent_format)
    generation(control)
    assert metrics(control)["latent/rate"] <= 0.25


def test_a_forced_start_has_no_loss_and_a_later_one_has(load_tiny: Any, tmp_path: Path) -> None:
    trainer = make_trainer(*opening(load_tiny), tmp_path, latent_start="forced", max_completion_length=20)
    made = generation(trainer)
    ids, seen = made["completion_ids"], made["tool_mask"].bool()
    starts = (ids == trainer.markers.start) & made["completion_mask"].bool()
    assert starts[:, 0].all()
    assert not seen[:, 0].any()
    assert starts[:, 1:].any()
    assert seen[:, 1:][starts[:, 1:]].all()
    # The loss does not change with what is taught about the masked tokens, and does with the others.
    made["advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    before = gradients(trainer, made)
    for column, same in ((0, True), (int(seen[0].nonzero()[0]), False)):
        old = made["old_per_token_logps"].clone()
        old[:, column] += 0.05
        after = gradients(trainer, {**made, "old_per_token_logps": old})
        assert all(torch.equal(after[name], before[name]) for name in before) == same


def test_a_bias_is_known_to_the_trainer(load_tiny: Any, tmp_path: Path) -> None:
    """Its log-probs are without the bias, as the engine's that it compares them with. Control: an engine that reports
    those of the draw."""
    trainer = rare(load_tiny, tmp_path, "bias 8")
    generation(trainer)
    found = metrics(trainer)
    assert found["latent/rate"] > 0.5
    assert found["latent/kept_mass"] == 1.0
    assert found["latent/replay_logp_diff"] < 1e-4
    assert found["latent/importance_ratio"] == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(Fault, match="do not agree with their replay: the largest difference of log-probs"):
        generation(rare(load_tiny, tmp_path / "draw", "bias 8", kind=AfterTheCut, parity_check=False))


def test_a_forbidden_start_is_out_of_the_softmax(load_tiny: Any, tmp_path: Path, caplog: Any) -> None:
    """Of a model that likes START. Control: a trainer that does not know, whose log-probs are off by START's share."""
    trainer = make_trainer(*opening(load_tiny), tmp_path, latent_start="forbidden")
    for _ in range(3):
        generation(trainer)
    found = metrics(trainer)
    assert found["latent/rate"] == 0.0
    assert found["latent/replay_logp_diff"] < 1e-4
    assert not caplog.records, "that no completion has latents is what was asked for"
    trainer.run.draws_start = True
    with pytest.raises(Fault, match="do not agree with their replay: the largest difference of log-probs"):
        generation(trainer)


def test_completions_without_latents_keep_their_first_pair(load_tiny: Any, tmp_path: Path) -> None:
    """`necessity`: the same seeds with an empty pair for every span, the forced one among them."""
    trainer = rare(load_tiny, tmp_path, "forced", reward_names=("needed",))
    turns: list[Any] = []
    honest = trainer.run.generator.completed
    trainer.run.generator.completed = lambda *asked: turns.append(honest(*asked)) or turns[-1]
    generation(trainer)
    for rollout in turns[-1]:
        assert rollout.completion_ids[:2] == (trainer.markers.start, trainer.markers.end)
        assert rollout.forced[:2].all()
        assert all(span.slots == 0 for span in find_spans(rollout.ids, trainer.markers).spans)


def test_what_cannot_be_is_refused(load_tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="latent_start is 'forced', but latent format 'lvr' generates no latents"):
        rare(load_tiny, tmp_path, "forced", get_format("lvr", feedback="none"))
    model, processor = opening(load_tiny)
    engine = HFRolloutEngine(model, processor, LVR)
    engine.capabilities -= {Capability.LATENT_START}
    with pytest.raises(UserError, match="has no control of START, which latent_start 'bias 2' needs"):
        make_trainer(model, processor, tmp_path, engine=engine, latent_start="bias 2")
    make_trainer(model, processor, tmp_path, engine=engine)  # nobody asks for it


def test_an_engine_that_does_not_force_is_found_out(load_tiny: Any, tmp_path: Path) -> None:
    """A START that counts as drawn has a log-prob, which the pass does not confirm."""
    Drawn = told_otherwise(lambda rollout: replace(rollout, forced=torch.zeros_like(rollout.forced)))
    with pytest.raises(Fault, match="do not agree with their replay"):
        generation(rare(load_tiny, tmp_path, "forced", kind=Drawn, parity_check=False))
