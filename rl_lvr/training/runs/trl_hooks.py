"""Methods of transformers' and TRL's trainers that the trainers here override or call: most of them are internal.

`check_trl` names those that an installed version lacks, before a run would find out in its middle.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

from rl_lvr.errors import UserError
from rl_lvr.hooks import Hook, missing_hooks

_TRAINER = "transformers.trainer"
_GRPO = "trl.trainer.grpo_trainer"
_TRL_UTILS = "trl.trainer.utils"

RUN_HOOKS: tuple[Hook, ...] = (
    (_TRAINER, "Trainer.train", ("resume_from_checkpoint",)),
    (_TRAINER, "Trainer._init_training_state", ("resume_from_checkpoint",)),
    (_TRAINER, "Trainer._maybe_log_save_evaluate", ("tr_loss", "grad_norm", "model")),
    (_TRAINER, "Trainer._save_rng_state", ("output_dir",)),
    (_TRAINER, "Trainer._load_rng_state", ("checkpoint",)),
    (_TRAINER, "Trainer._get_grad_norm", ("model", "grad_norm")),
    (_TRAINER, "Trainer._get_output_dir", ("trial",)),
    (_TRAINER, "Trainer._save_checkpoint", ("model", "trial")),
    (_TRAINER, "Trainer._push_from_checkpoint", ("checkpoint_folder",)),
    (_TRAINER, "Trainer._save", ("output_dir", "state_dict")),
    (_TRAINER, "Trainer.create_model_card", ("model_name", "tags")),
    (_TRAINER, "Trainer._load_from_checkpoint", ("resume_from_checkpoint", "model")),
    (_TRAINER, "Trainer._load_best_model", ()),
    (_TRL_UTILS, "create_model_from_path", ()),
    (_TRL_UTILS, "get_config_model_id", ()),
)
"""Of every run (`runs/resuming.py`, `runs/arguments.py`)."""

SFT_HOOKS: tuple[Hook, ...] = (
    ("trl.trainer.sft_trainer", "SFTTrainer.compute_loss", ("model", "inputs", "return_outputs", "num_items_in_batch")),
)

GRPO_HOOKS: tuple[Hook, ...] = (
    (_GRPO, "GRPOTrainer._prepare_inputs", ("generation_batch",)),
    (_GRPO, "GRPOTrainer._generate_and_score_completions", ("inputs",)),
    (_GRPO, "GRPOTrainer._tokenize_prompts", ("prompts",)),
    (_GRPO, "GRPOTrainer._generate", ("prompts",)),
    (
        _GRPO,
        "GRPOTrainer._generate_single_turn",
        ("prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"),
    ),
    (
        _GRPO,
        "GRPOTrainer._get_per_token_logps_and_entropies",
        ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "num_images"),
    ),
    (_GRPO, "GRPOTrainer._calculate_rewards", ("inputs", "prompts", "completions", "completion_ids_list")),
    (_GRPO, "GRPOTrainer._compute_loss", ("model", "inputs")),
    (_GRPO, "GRPOTrainer.training_step", ("model", "inputs", "num_items_in_batch")),
    (_GRPO, "GRPOTrainer.get_off_policy_mask", ("advantages", "per_token_logps", "sampling_per_token_logps", "mask")),
    (_GRPO, "GRPOTrainer._get_train_sampler", ("dataset",)),
    (_GRPO, "GRPOTrainer._log_completion_extra", ("column", "values")),
    ("trl.models.utils", "unwrap_model_for_generation", ("model", "accelerator")),
    (_TRL_UTILS, "split_pixel_values_by_grid", ()),
    (_TRL_UTILS, "unsplit_pixel_values_by_grid", ()),
    (_TRL_UTILS, "get_callable_name", ()),
)


def check_trl(hooks: Sequence[Hook]) -> None:
    """Refuse versions of TRL and transformers that lack some of `RUN_HOOKS` and `hooks`."""
    missing = missing_hooks([*RUN_HOOKS, *hooks])
    if missing:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("trl", "transformers"))
        raise UserError(
            f"{versions} lack {', '.join(missing)}, which training relies on: install the versions that rl-lvr asks "
            "for (pip install rl-lvr)."
        )
