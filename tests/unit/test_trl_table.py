"""Every argument of TRL's trainers and every field of their configs: the same here, replaced, or refused."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from rl_lvr.errors import UserError
from rl_lvr.training.grpo import config as grpo_config
from rl_lvr.training.grpo.config import ARGUMENTS_WITH_LATENTS, WITH_LATENTS, LatentGRPOConfig
from rl_lvr.training.grpo.trainer import LatentGRPOTrainer
from rl_lvr.training.runs import settings
from rl_lvr.training.runs.arguments import config_of, refuse_arguments
from rl_lvr.training.runs.settings import ARGUMENTS_ON_LATENTS, ON_LATENTS, WITH_FORMAT, refuse_unused
from rl_lvr.training.sft import config as config_module
from rl_lvr.training.sft.config import ARGUMENTS_WITH_RECORDS, ON_RECORDS, WITH_RECORDS, LatentSFTConfig
from rl_lvr.training.sft.trainer import LatentSFTTrainer

OF_TRAINERS = """
model args train_dataset eval_dataset processing_class callbacks optimizers peft_config
"""
SAME_ARGUMENTS = {
    GRPOTrainer: {*OF_TRAINERS.split(), "reward_funcs", "reward_processing_classes"},
    SFTTrainer: {*OF_TRAINERS.split(), "optimizer_cls_and_kwargs"},
}
REFUSED_ARGUMENTS = {
    GRPOTrainer: ARGUMENTS_WITH_LATENTS | ARGUMENTS_ON_LATENTS,
    SFTTrainer: ARGUMENTS_WITH_RECORDS | ARGUMENTS_ON_LATENTS,
}
OF_TRANSFORMERS = """
accelerator_config adam_beta1 adam_beta2 adam_epsilon auto_find_batch_size average_tokens_across_devices
batch_eval_metrics bf16 bf16_full_eval data_seed dataloader_drop_last dataloader_in_order
dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters
ddp_static_graph ddp_timeout debug deepspeed disable_tqdm do_eval do_predict do_train enable_jit_checkpoint
eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_steps eval_strategy
eval_use_gather_object fp16 fp16_full_eval fsdp_config full_determinism gradient_accumulation_steps
gradient_checkpointing gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id hub_private_repo
hub_revision hub_strategy hub_token ignore_data_skip include_for_metrics include_num_input_tokens_seen learning_rate
liger_kernel_config load_best_model_at_end local_rank log_level log_level_replica log_on_each_node
logging_first_step logging_nan_inf_filter logging_steps logging_strategy lr_scheduler_kwargs lr_scheduler_type
max_grad_norm max_steps metric_for_best_model model_init_kwargs neftune_noise_alpha num_train_epochs optim optim_args
optim_target_modules output_dir per_device_eval_batch_size per_device_train_batch_size project push_to_hub report_to
restore_callback_states_from_checkpoint resume_from_checkpoint router_aux_loss_coef run_name save_on_each_node
save_only_model save_steps save_strategy save_total_limit seed skip_memory_metrics tf32 torch_compile_backend
torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id
trust_remote_code use_cache use_cpu use_liger_kernel warmup_steps weight_decay
"""
OF_GRPO = """
beta cast_lm_head_to_fp32 chat_template_kwargs delta disable_dropout ds3_gather_for_generation entropy_coef
entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target epsilon epsilon_high generation_batch_size
importance_sampling_level label_names label_smoothing_factor length_column_name log_completions
log_completions_hub_repo log_multimodal log_unique_prompts loss_type mask_truncated_completions max_completion_length
min_p multi_objective_aggregation num_completions_to_print num_generations num_generations_eval num_iterations
off_policy_mask_threshold pad_to_multiple_of prediction_loss_only ref_model_mixup_alpha ref_model_sync_steps
remove_unused_columns repetition_penalty reward_weights sapo_temperature_neg sapo_temperature_pos scale_rewards
shuffle_dataset steps_per_generation sync_ref_model temperature top_entropy_quantile top_k top_p
train_sampling_strategy use_adaptive_entropy use_bias_correction_kl vespo_k_neg vespo_k_pos vespo_lambda_neg
vespo_lambda_pos vllm_importance_sampling_cap vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
vllm_importance_sampling_correction vllm_importance_sampling_mode
"""
OF_SFT = "activation_offloading loss_type"
SAME = {
    GRPOConfig: {*OF_TRANSFORMERS.split(), *OF_GRPO.split()},
    SFTConfig: {*OF_TRANSFORMERS.split(), *OF_SFT.split()},
}
REPLACED = {
    GRPOConfig: {"vllm_max_model_length": "max_model_len of the engine vllm; refused with other engines"},
    SFTConfig: {
        "prediction_loss_only": "true on records: logits are never kept",
        "remove_unused_columns": "false on records: the data set holds row numbers",
    },
}
REFUSED = {GRPOConfig: WITH_LATENTS, SFTConfig: WITH_RECORDS | ON_LATENTS}
OURS = {GRPOConfig: (LatentGRPOConfig, GRPOConfig), SFTConfig: (LatentSFTConfig, SFTConfig)}
VALUES = {
    # Of fields whose type does not say what may stand in them.
    "cache_implementation": "static",
    "chat_template_path": "template.jinja",
    "dataset_kwargs": {"add_special_tokens": False},
    "fsdp": "full_shard",
    "label_names": ["labels"],
    "packing_strategy": "wrapped",
    "padding_free": True,
    "parallelism_config": "any",
    "train_sampling_strategy": "sequential",
    "truncation_mode": "keep_end",
    "vllm_mode": "server",
    "vllm_model_impl": "transformers",
}


def changed(kind: type, name: str) -> Any:
    """A value of a field that is not its default."""
    if name in VALUES:
        return VALUES[name]
    entry = next(entry for entry in fields(kind) if entry.name == name)
    if isinstance(entry.default, bool):
        return not entry.default
    if isinstance(entry.default, int | float):
        return entry.default + 1
    kinds = {"dict": {"a": 1}, "bool": True, "int": 8}
    return next((value for word, value in kinds.items() if word in str(entry.type)), "other")


@pytest.mark.parametrize(("theirs", "ours"), [(GRPOTrainer, LatentGRPOTrainer), (SFTTrainer, LatentSFTTrainer)])
def test_every_argument_has_a_row(theirs: type, ours: type) -> None:
    """A new one of TRL's fails here until it has one; TRL's come first, in TRL's order, and with TRL's defaults."""
    known = list(inspect.signature(theirs).parameters.values())
    mine = list(inspect.signature(ours).parameters.values())
    same, refused = SAME_ARGUMENTS[theirs], set(REFUSED_ARGUMENTS[theirs])
    assert not same & refused
    assert same | refused == {entry.name for entry in known}
    assert [(p.name, p.default) for p in known] == [(p.name, p.default) for p in mine[: len(known)]]
    assert all(p.kind is p.KEYWORD_ONLY for p in mine[len(known) :])


@pytest.mark.parametrize("kind", [GRPOConfig, SFTConfig])
def test_every_setting_has_a_row(kind: type) -> None:
    same, replaced, refused = SAME[kind], set(REPLACED[kind]), set(REFUSED[kind])
    assert len(same) + len(replaced) + len(refused) == len(same | replaced | refused)
    names = {entry.name for entry in fields(kind)}
    assert sorted(same | replaced | refused) == sorted(names)
    for mine in OURS[kind]:
        assert names <= {entry.name for entry in fields(mine)}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in (GRPOConfig, SFTConfig) for name in REFUSED[kind]])
def test_a_refused_setting_is_named_and_its_default_passes(tmp_path: Path, kind: type, name: str) -> None:
    for each in OURS[kind]:
        config = each(str(tmp_path), use_cpu=True, bf16=False)
        refuse_unused(config, REFUSED[kind], "here")
        setattr(config, name, changed(each, name))
        with pytest.raises(UserError, match=rf"^{name} cannot be used here \(.+\): leave it out\.$"):
            refuse_unused(config, REFUSED[kind], "here")


@pytest.mark.parametrize("trainer", [LatentGRPOTrainer, LatentSFTTrainer])
def test_settings_of_latents_are_refused_without_latents(tmp_path: Path, trainer: type) -> None:
    """Before the model is read. Every field that a config adds to TRL's has a row, or a meaning without latents too."""
    grpo = trainer is LatentGRPOTrainer
    kind: Any = LatentGRPOConfig if grpo else LatentSFTConfig
    table = grpo_config.WITHOUT_LATENTS if grpo else config_module.WITHOUT_LATENTS
    added = {entry.name for entry in fields(kind)} - {entry.name for entry in fields(GRPOConfig if grpo else SFTConfig)}
    assert added - set(table) <= {"on_nan_loss", "on_rollout", "max_idle_steps"}
    cases = [(name, changed(kind, name)) for name in table] + [("on_rollout", {"empty": "keep"})] * grpo
    rewards = {"reward_funcs": len} if grpo else {}
    for name, value in cases:
        config = kind(str(tmp_path), use_cpu=True, bf16=False)
        setattr(config, name, value)
        with pytest.raises(UserError, match=rf"^{name} cannot be used without a latent format \(.+\): leave it out\.$"):
            trainer(str(tmp_path / "nowhere"), args=config, latent_format=None, **rewards)
    with pytest.raises(Exception, match=r"nowhere|train_dataset"):  # the control: defaults get further
        trainer(
            str(tmp_path / "nowhere"), args=kind(str(tmp_path), use_cpu=True, bf16=False), latent_format=None, **rewards
        )


@pytest.mark.parametrize("kind", [GRPOTrainer, SFTTrainer])
def test_a_refused_argument_is_named(kind: type) -> None:
    table = REFUSED_ARGUMENTS[kind]
    refuse_arguments(table, "here", **dict.fromkeys(table))
    for name in table:
        with pytest.raises(UserError, match=rf"^{name} cannot be used here"):
            refuse_arguments(table, "here", **{**dict.fromkeys(table), name: "given"})


def test_the_command_line_refuses_known_settings() -> None:
    """What it refuses is a field of some config, and its tables hold those of the trainers."""
    from trl import ModelConfig

    from rl_lvr.training.grpo import config as grpo_recipe
    from rl_lvr.training.sft import config

    known = {entry.name for kind in (GRPOConfig, SFTConfig, ModelConfig) for entry in fields(kind)}
    assert set(settings.WITHOUT_EFFECT) | set(config.WITHOUT_EFFECT) | set(grpo_recipe.WITHOUT_EFFECT) <= known
    assert set(WITH_RECORDS) <= set(config.WITHOUT_EFFECT)
    assert (ON_RECORDS, WITH_FORMAT) == ("on records", "with a latent format")


@pytest.mark.parametrize(("plain", "kind"), [(GRPOConfig, LatentGRPOConfig), (SFTConfig, LatentSFTConfig)])
def test_a_plain_config_keeps_every_value(tmp_path: Path, plain: type, kind: type) -> None:
    given: dict[str, Any] = {"bf16": False, "use_cpu": True, "learning_rate": 0.5, "gradient_accumulation_steps": 4}
    if plain is GRPOConfig:
        given |= {"generation_batch_size": 32, "scale_rewards": False, "reward_weights": [2.0]}
    theirs = plain(str(tmp_path), **given)
    mine: Any = config_of(theirs, kind, plain, "unused")
    assert isinstance(mine, kind)
    for entry in fields(plain):
        assert getattr(mine, entry.name) == getattr(theirs, entry.name), entry.name
    assert mine.latent_weight == 1.0
    assert config_of(mine, kind, plain, "unused") is mine
    default: Any = config_of(None, kind, plain, str(tmp_path / "a name"))
    assert isinstance(default, kind)
    assert default.output_dir == str(tmp_path / "a name")
    with pytest.raises(TypeError, match=plain.__name__):
        config_of({"output_dir": "x"}, kind, plain, "unused")
