"""A latent policy that the package does not know: defined here, trained with, and refused where it is wrong."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_cases import generation, gradients, logged, make_trainer, opening

from rl_lvr import plugins
from rl_lvr.errors import UserError
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.training.grpo.scoring import own_latents

REGRESSION = '''
import torch

from rl_lvr.errors import UserError
from rl_lvr.training.grpo.policies import LatentLoss, LatentPolicy


class Regression(LatentPolicy):
    """The mean moves to explored latents of good completions, and away from those of bad ones."""

    settings = ("latent_weight",)
    has_loss = True

    def __init__(self, config, strength: float = 1.0):
        super().__init__(config)
        self.strength = strength

    def check(self):
        if not self.config.latent_sigma:
            raise UserError("regression explores: set latent_sigma.")

    def loss(self, actions):
        apart = (actions.values - actions.means).square().sum(-1) * actions.chosen
        rows = apart.sum(1) / actions.chosen.sum(1).clamp(min=1)
        nothing = torch.zeros(())
        found = self.strength * (actions.advantages * actions.weights * rows).mean()
        return LatentLoss(found, actions.chosen.sum(), nothing, nothing, nothing)


class Other:
    def __init__(self, config):
        pass

'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "policies_of_test.py"
    path.write_text(REGRESSION)
    return path


def trainer_with(load_tiny: Any, folder: Path, policy: str, **changes: Any) -> Any:
    changes = {"latent_policy": policy, "latent_sigma": 0.2, **changes}
    return make_trainer(*opening(load_tiny), folder, **changes)


def test_it_trains(load_tiny: Any, tmp_path: Path, file: Path) -> None:
    trainer = trainer_with(load_tiny, tmp_path, f"{file}:Regression", max_steps=2, num_iterations=2)
    trainer.train()
    assert len(logged(trainer, "loss")) == 2
    assert max(logged(trainer, "latent/replay_latent_diff")) < 1e-3  # the noise that it asks for was drawn
    assert max(logged(trainer, "latent/rate")) > 0
    assert any(logged(trainer, "latent/loss"))


def test_its_loss_and_its_option_are_used(load_tiny: Any, tmp_path: Path, file: Path) -> None:
    def loss_of(strength: float) -> tuple[float, dict[str, Any], dict[str, torch.Tensor]]:
        options = {"strength": strength}
        trainer = trainer_with(load_tiny, tmp_path, f"{file}:Regression", latent_policy_options=options)
        made = generation(trainer)
        made["advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.5])
        return float(trainer._compute_loss(trainer.model, {**made}).detach()), made, gradients(trainer, made)

    with_term, made, gradient = loss_of(2.0)
    without, again, text = loss_of(0.0)
    assert torch.equal(made["latent_values"], again["latent_values"])
    latents = LatentBatch.from_tensors(made)
    own = own_latents(latents, made["prompt_ids"].shape[1])
    apart = (latents.values - made["latent_old_means"]).square().sum(-1) * own  # the model has not moved yet
    rows = apart.sum(1) / own.sum(1).clamp(min=1)
    assert float(own.sum()) > 0
    assert with_term - without == pytest.approx(2.0 * float((made["advantages"] * rows).mean()), rel=1e-3)
    assert any(not torch.equal(gradient[name], text[name]) for name in text)


def test_an_entry_point_names_it(load_tiny: Any, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(file.parent))
    point = EntryPoint("regression", f"{file.stem}:Regression", "rl_lvr.latent_policies")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == point.group else [])
    trainer = trainer_with(load_tiny, tmp_path, "regression")
    assert type(trainer.run.policy).__name__ == "Regression"
    with pytest.raises(UserError, match=r"no latent_policy 'regresion'; did you mean 'regression'\?"):
        trainer_with(load_tiny, tmp_path, "regresion")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "Regression",
            {"latent_policy_options": {"strenght": 1.0}},
            "has no option 'strenght'; did you mean 'strength'",
        ),
        ("Regression", {"latent_policy_options": {"strength": "much"}}, "strength is 'much'; it must be a number"),
        ("Regression", {"latent_policy_options": [1]}, r"latent_policy_options is \[1\]; write name: value"),
        ("Regression", {"latent_epsilon": 0.1}, "latent_epsilon cannot be used with latent_policy .*Regression"),
        ("Regression", {"latent_sigma": 0.0}, "regression explores: set latent_sigma"),
        ("Other", {}, "is not a subclass of LatentPolicy"),
        ("Missing", {}, "there is no 'Missing' in it"),
    ],
)
def test_what_is_wrong_with_it_is_said(
    load_tiny: Any, tmp_path: Path, file: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        trainer_with(load_tiny, tmp_path, f"{file}:{name}", **changes)
    with pytest.raises(UserError, match="latent_policy 'context' has no option 'strength'"):
        trainer_with(load_tiny, tmp_path, "context", latent_sigma=0.0, latent_policy_options={"strength": 1.0})
