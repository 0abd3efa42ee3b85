"""What the trainers need of TRL and transformers is there, complete, and missed by name where it is not."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer
from trl import GRPOTrainer, SFTTrainer

from rl_lvr.errors import UserError
from rl_lvr.hooks import Hook, missing_hooks
from rl_lvr.training.grpo import LatentGRPOTrainer
from rl_lvr.training.runs.trl_hooks import GRPO_HOOKS, RUN_HOOKS, SFT_HOOKS, check_trl
from rl_lvr.training.sft import LatentSFTTrainer

ALL = (*RUN_HOOKS, *SFT_HOOKS, *GRPO_HOOKS)


def test_all_hooks_are_there() -> None:
    check_trl(SFT_HOOKS)
    check_trl(GRPO_HOOKS)


@pytest.mark.parametrize("hook", ALL, ids=lambda hook: hook[1])
def test_a_missing_hook_is_named(hook: Hook) -> None:
    module, name, parameters = hook
    assert missing_hooks([(module, f"{name}_gone", parameters)]) == [f"{module}.{name}_gone"]
    assert missing_hooks([(module, name, (*parameters, "gone"))]) == [f"{module}.{name}(gone)"]


def test_the_refusal_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(GRPOTrainer, "_generate_single_turn")
    with pytest.raises(UserError, match=r"^trl .* lack trl.trainer.grpo_trainer.GRPOTrainer._generate_single_turn,"):
        check_trl(GRPO_HOOKS)


@pytest.mark.parametrize(
    ("ours", "theirs", "hooks"),
    [(LatentGRPOTrainer, GRPOTrainer, GRPO_HOOKS), (LatentSFTTrainer, SFTTrainer, SFT_HOOKS)],
)
def test_every_override_is_listed(ours: type, theirs: type, hooks: tuple[Hook, ...]) -> None:
    """A method that takes the place of one of the parent's, here or in a base class of this package."""
    own = {
        name
        for kind in ours.__mro__
        if kind.__module__.startswith("rl_lvr.")
        for name, value in vars(kind).items()
        if inspect.isfunction(value) and not name.startswith("__") and hasattr(theirs, name)
    }
    listed = {name.rpartition(".")[2] for _, name, _ in (*RUN_HOOKS, *hooks)}
    assert own <= listed, sorted(own - listed)
    assert {name for name in listed if hasattr(Trainer, name) and name.startswith("_save")} <= own  # the control
