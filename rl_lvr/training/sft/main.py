"""From a parsed recipe to a finished run of latent SFT."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback
from trl import ModelConfig

from rl_lvr import quiet
from rl_lvr.data.cache import cache_key, encoded_records
from rl_lvr.data.check import Report
from rl_lvr.data.encoding import Encoded, Encoder, LazyEncoded
from rl_lvr.data.records import Records, load_records
from rl_lvr.data.sources import locate
from rl_lvr.training.runs.execute import Run, execute
from rl_lvr.training.runs.prepare import (
    adapter_of,
    check_files,
    check_start,
    load_start,
    make_encoder,
    questions_of,
)
from rl_lvr.training.runs.settings import WITHOUT_FORMAT, read_eval_file, refuse_unused
from rl_lvr.training.sft.config import WITHOUT_EFFECT, WITHOUT_LATENTS, SFTRecipe
from rl_lvr.training.sft.trainer import LatentSFTTrainer


def train_sft(config: SFTRecipe, model_config: ModelConfig, given: dict[str, Any]) -> int:
    """Train as the recipe says; returns the exit code."""
    start = check_start(config, model_config, given, WITHOUT_EFFECT)
    if start.latent_format is None:
        refuse_unused(config, WITHOUT_LATENTS, WITHOUT_FORMAT)
    quiet.transformers()
    if config.threads:
        torch.set_num_threads(config.threads)
    encoder = make_encoder(start, config)
    checked = _checked(config, encoder)
    model = load_start(start, config, model_config, encoder)
    with config.main_process_first(desc="processing records"):
        records = load_records(config.train_file, config.train_limit)
        train = _encoded(records, encoder, config, checked[config.train_file])
        evaluation: Sequence[Encoded] = ()
        questions = None
        if (file := read_eval_file(config)) is not None:
            records = load_records(file)
            evaluation = _encoded(records, encoder, config, checked[file])
            if config.latent_eval_steps:
                questions = questions_of(records, evaluation, encoder, config)

    def build(callbacks: list[TrainerCallback]) -> LatentSFTTrainer:
        return LatentSFTTrainer(
            model,
            config,
            train_dataset=train,
            eval_dataset=evaluation if config.eval_strategy != "no" else None,
            processing_class=encoder.processor,
            latent_format=start.latent_format,
            callbacks=callbacks,
            peft_config=adapter_of(model_config, model, encoder.family),
        )

    return execute(Run("sft", config, model_config, given, start), build, encoder, questions)


def _checked(config: SFTRecipe, encoder: Encoder) -> dict[str, Report]:
    """The reports of the data files. Answers are learned from train_file, and losses of eval_file may be asked for."""
    learned = {config.train_file: True}
    if (file := read_eval_file(config)) is not None:
        learned[file] = learned.get(file, False) or config.eval_strategy != "no"
    judges = {
        file: partial(encoder.judge, learned=yes, room=config.latent_eval_max_tokens) for file, yes in learned.items()
    }
    return check_files(config, judges, [file for file, yes in learned.items() if yes])


def _encoded(records: Records, encoder: Encoder, config: SFTRecipe, report: Report) -> Sequence[Encoded]:
    if not config.processed_cache:
        return LazyEncoded(records, encoder)
    key = cache_key(report.path, report.image_files, len(records), encoder)
    return encoded_records(records, encoder, key, locate(report.path)[0].parent / "processed")
