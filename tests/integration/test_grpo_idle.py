"""Rows without an advantage are not computed, and nobody can tell but by the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from grpo_cases import LOSSES, generation, gradients, logged, make_trainer, opening, rows
from helpers import noise_image

from rl_lvr.errors import UserError
from rl_lvr.training.grpo.filtering import Kept, level_rows

POLICIES = ("context", "unrolled", "gaussian", "spherical")


def loss_and_gradients(trainer: Any, made: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    return float(trainer._compute_loss(trainer.model, {**made}).detach()), gradients(trainer, made)


def differences(trainer: Any, made: dict[str, Any]) -> tuple[float, float]:
    """Of the loss and, relative to the largest element, of the gradients, with rows left out and without."""
    trainer.run.drops_idle = True
    loss, found = loss_and_gradients(trainer, made)
    trainer.run.drops_idle = False
    full_loss, full = loss_and_gradients(trainer, made)
    assert found.keys() == full.keys()
    most = max(float(gradient.abs().max()) for gradient in full.values())
    apart = max(float((gradient - found[name]).abs().max()) for name, gradient in full.items())
    return abs(loss - full_loss), apart / max(most, 1e-3)


@pytest.mark.parametrize("policy", POLICIES)
def test_loss_and_gradient_are_those_of_all_rows(
    load_tiny: Any, tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(*opening(load_tiny), tmp_path, latent_policy=policy)
    assert trainer.run.drops_idle
    made = generation(trainer)
    made["advantages"] = torch.tensor([1.0, 0.0, 0.0, -0.5])
    made["old_per_token_logps"] = made["old_per_token_logps"] - 0.05  # ratios that are not 1
    seen: list[int] = []
    trainer.model.model.register_forward_hook(lambda *parts: seen.append(len(parts[2].last_hidden_state)))
    for loss_type in LOSSES if policy == "gaussian" else ("dapo",):
        trainer.loss_type = loss_type
        of_loss, of_gradients = differences(trainer, made)
        assert of_loss < 1e-6, loss_type
        assert of_gradients < (1e-4 if policy == "unrolled" else 1e-6), loss_type  # rounding, latent after latent
    assert {2, 4} <= set(seen)
    assert trainer._metrics["train"]["frac_dropped"][0] == 0.5

    honest = Kept.of
    monkeypatch.setattr(Kept, "of", lambda inputs: honest({**inputs, "advantages": inputs["advantages"].clamp(min=0)}))
    assert max(differences(trainer, made)) > 1e-3  # the control: a row that has an advantage


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision"])
def test_images_go_with_their_rows(load_tiny: Any, tmp_path: Path, family: str) -> None:
    data = [{"prompt": row["prompt"], "images": [row["image"]]} for row in rows()]
    for row in data[1::2]:
        row["images"] = [*row["images"], noise_image(9, 56, 56)]
    trainer = make_trainer(*opening(load_tiny, family=family), tmp_path)
    made = trainer._generate_and_score_completions([dict(row) for row in Dataset.from_list(data)])
    made["advantages"] = torch.tensor([0.0, 1.0, -0.5, 0.0])
    assert max(differences(trainer, made)) < 2e-6
    assert trainer._metrics["train"]["frac_dropped"] == [0.5, 0.5]


def test_one_row_stays(load_tiny: Any, tmp_path: Path) -> None:
    trainer = make_trainer(*opening(load_tiny), tmp_path)
    made = generation(trainer)
    made["advantages"] = torch.zeros(4)
    loss, found = loss_and_gradients(trainer, made)
    assert loss == 0
    assert found
    assert all(not bool(gradient.any()) for gradient in found.values())
    assert trainer._metrics["train"]["frac_dropped"] == [0.75, 0.75]
    metric = trainer._metrics["train"]["entropy"]
    trainer.run.drops_idle = False
    trainer._compute_loss(trainer.model, {**made})
    assert metric[0] > 0
    assert len(metric) == 3


def test_a_row_with_images_stays() -> None:
    shared = {name: torch.ones(3, 2) for name in ("completion_mask", "tool_mask", "old_per_token_logps")}

    def kept(advantages: list[float], images: list[int] | None) -> list[int]:
        return Kept.of({**shared, "advantages": torch.tensor(advantages), "num_images": images}).rows.tolist()

    assert kept([0.0, 1.0, 0.0], None) == [1]
    assert kept([0.0, 1.0, 0.0], [0, 0, 0]) == [1]
    assert kept([0.0, 1.0, 0.0], [0, 2, 1]) == [1]
    assert kept([0.0, 1.0, 0.0], [0, 0, 1]) == [1, 2]
    assert kept([0.0, 0.0, 0.0], [0, 1, 1]) == [1]
    assert kept([0.0, 0.0, 0.0], None) == [0]


def test_a_group_is_level_where_no_rewards_differ() -> None:
    nan, one = float("nan"), torch.ones(2)

    def level(rewards: list[list[float]], weights: torch.Tensor = one, *, each: bool = False, size: int = 2) -> Any:
        return level_rows(torch.tensor(rewards), weights, size, each=each).tolist()

    assert level([[0.1]] * 7, torch.ones(1), size=7) == [True] * 7
    assert level([[0.1, 0.2], [0.1, 0.2], [0.1, 0.2], [0.1, 0.3]]) == [True, True, False, False]
    assert level([[0.1, 0.2], [0.2, 0.1]]) == [True, True]  # the sum is what counts
    assert level([[0.1, 0.2], [0.2, 0.1]], each=True) == [False, False]
    assert level([[0.1, 5.0], [0.1, 7.0]], torch.tensor([1.0, 0.0])) == [True, True]
    assert level([[0.1, 5.0], [0.1, 7.0]], torch.tensor([1.0, 0.0]), each=True) == [True, True]
    for each in (False, True):  # rows that are left out, and rewards that were not given
        assert level([[0.1, 0.2], [nan, nan]], each=each) == [True, True]
        assert level([[nan, nan], [nan, nan]], each=each) == [True, True]
        assert level([[0.1, nan], [0.3, nan]], each=each) == [False, False]
    assert level([[0.1, nan], [0.1, 0.2]]) == [False, False]
    assert level([[0.1, nan], [0.1, 0.2]], each=True) == [True, True]


@pytest.mark.parametrize("case", ["mean", "batch"])
def test_equal_rewards_are_no_advantage(load_tiny: Any, tmp_path: Path, case: str) -> None:
    """Seven times 0.1 has another mean in float32; normalize_then_sum takes the mean of the batch off at the end."""
    changes: dict[str, Any] = {"reward_names": ("tenth",), "num_generations": 7, "per_device_train_batch_size": 7}
    if case == "batch":
        changes = {
            "reward_names": ("first_half",),
            "per_device_train_batch_size": 8,
            "multi_objective_aggregation": "normalize_then_sum",
        }
    trainer = make_trainer(*opening(load_tiny), tmp_path, **changes)
    trainer.train()
    raw = torch.tensor(list(trainer._logs["advantages"]))
    half = 0 if case == "mean" else 4
    assert bool(raw[half:].any())  # the control: what TRL makes of them
    assert float(raw[half:].abs().max()) < 1e-2
    assert logged(trainer, "frac_dropped")[0] == pytest.approx(6 / 7 if case == "mean" else 0.5)
    assert logged(trainer, "rollouts/idle_batches") == [1.0 if case == "mean" else 0.0]
    assert (logged(trainer, "loss")[0] == 0) == (logged(trainer, "grad_norm")[0] == 0) == (case == "mean")


def test_entropy_is_that_of_the_kept_rows() -> None:
    weights = torch.tensor([[1, 1], [1, 0], [1, 1]])
    rows = torch.tensor([0, 1])
    kept = Kept(rows, torch.tensor([True, True, False]), torch.full((3, 2), -1.0), weights)
    logprobs, entropies = kept.spread_pass(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [6.0, 9.0]]))
    assert logprobs.tolist() == [[0, 0], [0, 0], [-1, -1]]
    assert float((entropies * weights).sum() / weights.sum()) == pytest.approx((1 + 2 + 6) / 3)


def test_only_where_it_changes_nothing(load_tiny: Any, tmp_path: Path) -> None:
    for changes in ({"beta": 0.1}, {"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}):
        model, processor = opening(load_tiny)
        assert not make_trainer(model, processor, tmp_path, **changes).run.drops_idle
        with pytest.raises(UserError, match=f"leaves out rows that {next(iter(changes))}"):
            make_trainer(model, processor, tmp_path, drop_idle_groups=True, **changes)
    assert not make_trainer(*opening(load_tiny), tmp_path, drop_idle_groups=False).run.drops_idle


def test_a_run_logs_it(load_tiny: Any, tmp_path: Path) -> None:
    trainer = make_trainer(*opening(load_tiny), tmp_path, reward_names=("same",))
    trainer.train()
    assert logged(trainer, "frac_dropped") == [0.75]
    assert logged(trainer, "loss") == [0.0]
