"""The settings of `rl-lvr grpo`: the trainer's, and what a recipe says besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rl_lvr.errors import UserError
from rl_lvr.training.grpo.config import LatentGRPOConfig
from rl_lvr.training.grpo.engines import ENGINES
from rl_lvr.training.runs import settings
from rl_lvr.training.runs.settings import RunSettings, check_run, require_choice

WITHOUT_EFFECT = settings.WITHOUT_EFFECT | {
    "reward_weights": "every reward has its own weight: docs/rewards.md",
    "log_completions_hub_repo": "nothing is sent anywhere: see output_dir/rollouts",
}
"""Settings of TRL and transformers that this verb cannot honour, and why. They are refused, not ignored."""


@dataclass
class GRPORecipe(RunSettings, LatentGRPOConfig):
    """Everything of `LatentGRPOConfig` and of TRL's `GRPOConfig` works as well."""

    _VALID_DICT_FIELDS = [*LatentGRPOConfig._VALID_DICT_FIELDS, "engine_options"]  # noqa: RUF012, as transformers has it

    rewards: list[str] = field(
        default_factory=list, metadata={"help": "Rewards: names, or mappings with a name (docs/rewards.md)."}
    )
    engine: str = field(
        default="hf",
        metadata={"help": "What generates: hf, the model itself; vllm, in this process; server, over HTTP."},
    )
    engine_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the engine (docs/engines.md)."}
    )

    def __post_init__(self) -> None:
        check_run(self)
        require_choice(self, "engine", ENGINES)
        if not self.rewards:
            raise UserError("rewards is empty: name at least one (rl-lvr rewards list shows them).")
        super().__post_init__()
        if self.engine_options is not None and not isinstance(self.engine_options, Mapping):
            raise UserError(f"engine_options is {self.engine_options!r}; write name: value.")
