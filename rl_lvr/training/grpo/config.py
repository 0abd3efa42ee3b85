"""The settings of GRPO with latents: TRL's GRPOConfig plus how latents are explored, priced and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from rl_lvr.errors import UserError
from rl_lvr.latents.starting import LatentStart
from rl_lvr.rollout.options import ENGINES
from rl_lvr.training.grpo.policies import policy_of
from rl_lvr.training.grpo.rules import rules_of
from rl_lvr.training.runs import settings
from rl_lvr.training.runs.settings import (
    ON_LATENTS,
    RunSettings,
    TrainerSettings,
    check_run,
    require_at_least,
    require_words,
)

TRL_CHOICES: dict[str, tuple[Any, ...]] = {
    "loss_type": ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "vllm_mode": ("colocate", "server"),
}
"""What TRL looks at in the first loss, after a whole generation batch."""
_ENGINE = "the trainer's engine generates: its options are in docs/engines.md"
WITH_LATENTS = ON_LATENTS | {
    "use_vllm": "it generates without latents: give the trainer an engine",
    "use_transformers_continuous_batching": "it generates without latents: give the trainer an engine",
    "use_transformers_paged": "it generates without latents: give the trainer an engine",
    "transformers_continuous_batching_config": "it generates without latents: give the trainer an engine",
    "cache_implementation": "only transformers' generate reads it",
    "generation_kwargs": "only transformers' generate reads them",
    "max_tool_calling_iterations": "there are no tools",
    "vllm_mode": _ENGINE,
    "vllm_model_impl": _ENGINE,
    "vllm_enable_sleep_mode": "the engine vllm sleeps by engine_sleep",
    "vllm_structured_outputs_regex": _ENGINE,
    "vllm_server_base_url": _ENGINE,
    "vllm_server_host": _ENGINE,
    "vllm_server_port": _ENGINE,
    "vllm_server_timeout": _ENGINE,
    "vllm_group_port": _ENGINE,
    "vllm_gpu_memory_utilization": _ENGINE,
    "vllm_tensor_parallel_size": _ENGINE,
}
"""Settings of TRL that cannot be used with a latent format, and why. They are refused, not ignored."""
ARGUMENTS_WITH_LATENTS = {
    "tools": "it is TRL's own way to generate",
    "rollout_func": "it is TRL's own way to generate",
    "environment_factory": "it is TRL's own way to generate",
}
"""The same for arguments of `GRPOTrainer`, beside `settings.ARGUMENTS_ON_LATENTS`."""
_TRL = "TRL generates and scores by itself"
WITHOUT_LATENTS = {
    **dict.fromkeys(
        (
            "latent_policy",
            "latent_policy_options",
            "latent_sigma",
            "latent_weight",
            "latent_gradient_clip",
            "latent_scale",
            "latent_epsilon",
            "latent_epsilon_high",
            "latent_start",
        ),
        "there are no latents",
    ),
    **dict.fromkeys(
        (
            "replay_tolerance",
            "parity_check",
            "engine_sleep",
            "engine_retries",
            "rollout_batch",
            "scoring_batch",
            "drop_idle_groups",
            "record_rollouts",
            "peak_tflops",
        ),
        _TRL,
    ),
}
"""Settings of `LatentGRPOConfig` that training without latents leaves nothing to read, and why."""

WITHOUT_EFFECT = settings.WITHOUT_EFFECT | {
    "reward_weights": "every reward has its own weight: docs/rewards.md",
    "log_completions_hub_repo": "nothing is sent anywhere: see output_dir/rollouts",
}
"""Settings of TRL and transformers that this verb cannot honour, and why. They are refused, not ignored."""


@dataclass
class LatentGRPOConfig(TrainerSettings, GRPOConfig):
    """Everything of TRL's `GRPOConfig` works as well, but for what the trainer refuses with the reason."""

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "latent_policy_options"]  # noqa: RUF012, as transformers has it

    latent_policy: str = field(
        default="context",
        metadata={
            "help": "context: latents are fixed inputs. unrolled: the gradient of the text also flows through the "
            "recurrence that made them. gaussian, spherical: latents are drawn with noise and priced by its density. "
            "One of your own: package.module:Class, path/file.py:Class, or an installed name (docs/grpo.md)."
        },
    )
    latent_policy_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of a latent policy of your own."}
    )
    latent_sigma: float = field(
        default=0.0, metadata={"help": "Standard deviation of the exploration noise on latents, per dimension."}
    )
    latent_weight: float = field(default=1.0, metadata={"help": "Weight of the latents' own loss term."})
    latent_gradient_clip: float | None = field(
        default=None,
        metadata={
            "help": "unrolled: a row's gradient on a latent is at most this many times the rows' median. Default: "
            "exact; 1 steadies a training whose grad_norm jumps."
        },
    )
    latent_scale: str = field(
        default="mean",
        metadata={"help": "mean or sum: log-densities of latents per dimension, or summed over thousands of them."},
    )
    latent_epsilon: float = field(default=0.2, metadata={"help": "Clip range of the latents' ratio."})
    latent_epsilon_high: float | None = field(
        default=None, metadata={"help": "Its upper side, if that differs from latent_epsilon."}
    )
    latent_start: str = field(
        default="free",
        metadata={
            "help": "The start token of spans in rollouts: free, drawn by the model. forced: the first token of every "
            "completion, without loss. forbidden: never drawn. 'bias X': X is added to its logit."
        },
    )

    replay_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Difference between the rollouts and their replay above which the run stops. Default: 1e-3 in "
            "float32, on the largest difference; in mixed or half precision 0.1 on the mean, and three times that on "
            "the mean within one rollout."
        },
    )
    parity_check: bool = field(
        default=True, metadata={"help": "Hold the engine against the model, with a control, before the first step."}
    )
    engine_sleep: bool | None = field(
        default=None,
        metadata={
            "help": "The engine vllm gives its memory to the trainer while it does not generate. Default: yes on a GPU."
        },
    )
    rollout_batch: int = field(default=16, metadata={"help": "Rows that the engine hf decodes together."})
    scoring_batch: int | None = field(
        default=None,
        metadata={
            "help": "Rows per forward of the scoring and reference passes. Default: per_device_train_batch_size."
        },
    )
    drop_idle_groups: bool | None = field(
        default=None,
        metadata={
            "help": "Leave rows without an advantage out of the policy pass. Default: wherever that changes nothing."
        },
    )
    on_rollout: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "keep, exclude or stop for each kind of rollout: without_latents (keep), unclosed (exclude), "
            "empty (exclude), truncated (keep)."
        },
    )
    engine_retries: int = field(
        default=0, metadata={"help": "How often an engine in another process is asked again after an error."}
    )
    max_idle_steps: int | None = field(
        default=None,
        metadata={"help": "Stop after so many generation batches in a row in which no group's rewards differ."},
    )
    record_rollouts: bool = field(default=True, metadata={"help": "Write rollouts below output_dir/rollouts."})
    peak_tflops: float | None = field(
        default=None,
        metadata={"help": "What the hardware does per second at most, in 1e12 operations. Default: a known GPU's."},
    )

    choices = TRL_CHOICES | {"latent_scale": ("mean", "sum")}

    def check(self) -> None:
        super().check()
        require_at_least(self, 0, "latent_sigma", "latent_weight", "latent_epsilon", "latent_epsilon_high", "beta")
        require_at_least(self, 0, "engine_retries")
        require_at_least(self, 1, "rollout_batch", "scoring_batch", "max_idle_steps")
        if self.replay_tolerance is not None and not self.replay_tolerance > 0:
            raise UserError(f"replay_tolerance is {self.replay_tolerance}; it must be above 0.")
        LatentStart.parse(self.latent_start)
        policy_of(self)  # refuses what does not go with it
        self.on_rollout = rules_of(self.on_rollout)


@dataclass
class GRPORecipe(RunSettings, LatentGRPOConfig):
    """The settings of `rl-lvr grpo`: the trainer's, and what a recipe says besides."""

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
        require_words(self, {"engine": ENGINES})
        if not self.rewards:
            raise UserError("rewards is empty: name at least one (rl-lvr rewards list shows them).")
        super().__post_init__()
        if self.engine_options is not None and not isinstance(self.engine_options, Mapping):
            raise UserError(f"engine_options is {self.engine_options!r}; write name: value.")
