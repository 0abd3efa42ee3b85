"""From a parsed recipe to a finished run of GRPO."""

from __future__ import annotations

from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainerCallback
from trl import ModelConfig

from rl_lvr import quiet
from rl_lvr.data.check import Judge
from rl_lvr.data.encoding import Encoder, LazyEncoded
from rl_lvr.data.prompts import PromptJudge, prompt_rows
from rl_lvr.data.records import load_records
from rl_lvr.errors import UserError
from rl_lvr.latents.format import LatentFormat
from rl_lvr.signals import parse_signals
from rl_lvr.training.grpo.checks import check_settings, refuse_latents
from rl_lvr.training.grpo.config import WITHOUT_EFFECT, GRPORecipe
from rl_lvr.training.grpo.engines import check_engine, make_engine
from rl_lvr.training.grpo.policies import policy_of
from rl_lvr.training.grpo.trainer import LatentGRPOTrainer
from rl_lvr.training.rewards.load import MADE_BY_TRAINER, RewardSpec, load_rewards, signals_of
from rl_lvr.training.rewards.options import FROM_TRAINER
from rl_lvr.training.runs.execute import Run, execute
from rl_lvr.training.runs.prepare import (
    adapter_of,
    check_files,
    check_start,
    load_start,
    make_encoder,
    questions_of,
)
from rl_lvr.training.runs.settings import read_eval_file


def train_grpo(config: GRPORecipe, model_config: ModelConfig, given: dict[str, Any], recipe: Path | None) -> int:
    """Train as the recipe says; returns the exit code. Reward files may lie beside `recipe`."""
    start = check_start(config, model_config, given, WITHOUT_EFFECT)
    if "lora_dropout" not in given:
        model_config.lora_dropout = 0.0  # TRL's 0.05 makes the ratios of a fresh rollout other than 1
    if start.latent_format is not None and model_config.use_peft:
        policy_of(config).check_dropout("lora_dropout", model_config.lora_dropout)
    specs = load_rewards(config.rewards, None if recipe is None else recipe.parent)
    quiet.transformers()
    if config.threads:
        torch.set_num_threads(config.threads)
    encoder = make_encoder(start, config)
    _check_plan(config, specs, start.latent_format, encoder)
    judge = _judge(encoder, specs, config)
    _check_files(config, encoder, judge)
    model = load_start(start, config, model_config, encoder)
    train = prompt_rows(load_records(config.train_file, config.train_limit), judge.meta)
    evaluation = questions = None
    if (file := read_eval_file(config)) is not None:
        records = load_records(file)
        if config.eval_strategy != "no":
            evaluation = prompt_rows(records, judge.meta)
        if config.latent_eval_steps:
            questions = questions_of(records, LazyEncoded(records, encoder), encoder, config)

    engine, options = None, cast("dict[str, Any] | None", config.engine_options)
    if start.latent_format is not None:
        engine = make_engine(
            config.engine,
            options,
            folder=start.path,
            model=model,
            processor=encoder.processor,
            latent_format=start.latent_format,
            config=config,
        )

    def build(callbacks: list[TrainerCallback]) -> LatentGRPOTrainer:
        return LatentGRPOTrainer(
            model,
            specs,
            config,
            latent_format=start.latent_format,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=encoder.processor,
            engine=engine,
            callbacks=callbacks,
            peft_config=adapter_of(model_config, model, encoder.family),
        )

    with nullcontext() if engine is None else closing(engine):
        return execute(Run("grpo", config, model_config, given, start), build, encoder, questions)


def _check_plan(config: GRPORecipe, specs: list[RewardSpec], chosen: LatentFormat | None, encoder: Encoder) -> None:
    """What the trainer would refuse, before weights are read."""
    if chosen is not None:
        check_settings(config, chosen, encoder.family.hidden_size)
        check_engine(config.engine, cast("dict[str, Any] | None", config.engine_options), config)
        return
    refuse_latents(config, specs, parse_signals(signals_of(specs)), None)
    if config.engine != "hf" or config.engine_options:
        raise UserError("latent_format is none, and TRL generates by itself then: leave engine and its options out.")


def _judge(encoder: Encoder, specs: list[RewardSpec], config: GRPORecipe) -> PromptJudge:
    needed = {column: spec.name for spec in specs for column in spec.needs}
    made = {entry.name for entry in parse_signals(signals_of(specs))}
    options = cast("dict[str, Any]", config.engine_options or {})
    limit = options.get("max_model_len", config.vllm_max_model_length) if config.engine == "vllm" else None
    taken = [*made, *MADE_BY_TRAINER, *FROM_TRAINER]
    return PromptJudge(encoder, needed, taken, room=config.max_completion_length or 0, limit=limit)


def _check_files(config: GRPORecipe, encoder: Encoder, judge: PromptJudge) -> None:
    judges: dict[str, Judge] = {config.train_file: judge}
    answered = config.eval_strategy != "no"
    asked = partial(encoder.judge, learned=False, room=config.latent_eval_max_tokens)
    if (file := read_eval_file(config)) is not None and file not in judges:
        judges[file] = judge if answered else asked
    check_files(config, judges, [config.train_file, *([file] if file and answered else [])])
