"""What every verb that trains does before it has a trainer: checks, data report, model, adapter, questions.

What can be refused is refused here, before weights are read.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import set_seed
from trl import ModelConfig, get_peft_config

from rl_lvr.data.check import Judge, Report, require_valid
from rl_lvr.data.encoding import Encoded, Encoder
from rl_lvr.data.records import Records
from rl_lvr.errors import UserError
from rl_lvr.evaluation.questions import Question, Questions
from rl_lvr.evaluation.rows import Rule
from rl_lvr.latents.feedback import attach_feedback
from rl_lvr.latents.format import LatentFormat
from rl_lvr.models import Family, load_processor, load_weights
from rl_lvr.models.loading import checkpoint_folder
from rl_lvr.training.runs.callbacks import StopAt
from rl_lvr.training.runs.checkpoints import require_format
from rl_lvr.training.runs.folder import open_run
from rl_lvr.training.runs.settings import (
    OF_ADAPTERS,
    RUN_WITHOUT_LATENTS,
    WITHOUT_FORMAT,
    evaluates,
    freeze_vision,
    refuse_unused,
)

if TYPE_CHECKING:
    from rl_lvr.training.runs.settings import RunConfig

_log = logging.getLogger(__name__)
GATHER = "zero_optimization.stage3_gather_16bit_weights_on_model_save"


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    path: str
    """Folder of the model."""
    checkpoint: str | None
    """To resume from."""
    latent_format: LatentFormat | None


def check_start(
    config: RunConfig, model_config: ModelConfig, given: Mapping[str, Any], without_effect: Mapping[str, str]
) -> Start:
    """What can be refused before anything is read: the model's path, the checkpoint to resume from, the format."""
    path = model_config.model_name_or_path
    if not path:
        raise UserError("model_name_or_path is missing: name the model to start from.")
    path = str(checkpoint_folder(path))
    for name, why in without_effect.items():
        if given.get(name) not in (None, False, "false"):
            raise UserError(f"{name} has no effect here ({why}): leave it out.")
    if not model_config.use_peft:
        refuse_unused(model_config, OF_ADAPTERS, "while use_peft is false")
    if model_config.use_peft and not (config.freeze_vision_tower and config.freeze_merger):
        raise UserError("adapters leave the vision parts frozen: leave freeze_vision_tower and freeze_merger on.")
    if config.eval_file is not None and not evaluates(config) and config.process_index == 0:
        _log.warning("eval_file is set but nothing reads it: set latent_eval_steps or eval_strategy to evaluate.")
    if config.n_gpu > 1:
        raise UserError(
            f"{config.n_gpu} GPUs are visible to one process: start one process for each (--accelerate_config ddp, "
            "or zero2, zero3), or make one visible with CUDA_VISIBLE_DEVICES."
        )
    sharding = sharding_of(config)
    if sharding is not None and sharding.get_value(GATHER) is not True:
        raise UserError(f"the DeepSpeed config would leave a run without a model to load: set {GATHER} to true.")
    if config.stop_at:
        StopAt(config.stop_at)  # refuses a rule that it cannot read
    checkpoint = open_run(config.output_dir, config.resume_from_checkpoint, config.overwrite)
    chosen = config.format_of(LatentFormat.load(path), path)
    if chosen is None:
        refuse_unused(config, RUN_WITHOUT_LATENTS, WITHOUT_FORMAT)
    if checkpoint is not None:
        require_format(checkpoint, chosen)
    return Start(path, checkpoint, chosen)


def sharding_of(config: RunConfig) -> Any:
    """The DeepSpeed config if it is one of ZeRO-3, which spreads the weights over the processes."""
    plugin = config.deepspeed_plugin
    return plugin.hf_ds_config if plugin is not None and plugin.hf_ds_config.is_zero3() else None


def make_encoder(start: Start, config: RunConfig) -> Encoder:
    """The encoder of the model's processor and of the run's format."""
    family, processor = load_processor(start.path, trust_remote_code=config.trust_remote_code)
    markers = None
    if start.latent_format is not None:
        if config.add_marker_tokens:
            start.latent_format.add_tokens(getattr(processor, "tokenizer", processor))
        markers = family.bind(start.latent_format, processor)
    return Encoder(processor, family, markers, crops=config.oracle == "crop")


def check_files(config: RunConfig, judges: Mapping[str, Judge], trained: Sequence[str]) -> dict[str, Report]:
    """The reports of the data files, which hold nothing that this run could not use. `trained`: those of its steps."""
    reports = {file: require_valid(file, judge=judge) for file, judge in judges.items()}
    for file in trained:
        if len(reports[file].shown) > 1 and sharding_of(config) is not None:
            raise UserError(
                f"{file} holds records with and without images, and under ZeRO-3 all processes must use the vision "
                "tower at the same time: train on one kind of records, or use ZeRO-2."
            )
    return reports


def load_start(start: Start, config: RunConfig, model_config: ModelConfig, encoder: Encoder) -> Any:
    """The model with its feedback map, in the precision of the recipe, and frozen as that says."""
    set_seed(config.seed)  # new tokens and projectors are drawn here, before TRL sets the seed
    dtype = model_config.dtype or "float32"
    model = load_weights(
        start.path,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        trust_remote_code=config.trust_remote_code,
        attn_implementation=model_config.attn_implementation,
    )
    if encoder.markers is not None:
        if config.add_marker_tokens and len(encoder.tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(encoder.tokenizer))
        attach_feedback(model, encoder.markers.format, start.path)
    freeze_vision(encoder.family, model, tower=config.freeze_vision_tower, merger=config.freeze_merger)
    return model


def questions_of(records: Records, encoded: Sequence[Encoded], encoder: Encoder, config: RunConfig) -> Questions:
    """The records of eval_file that are answered under interventions during training."""
    if encoder.markers is None:
        raise UserError("latent_eval_steps is set but latent_format is none: there are no latents to intervene on.")
    count = min(config.latent_eval_samples, len(records))
    chosen = [records[i] for i in range(count)]
    missing = [record.id for record in chosen if record.answer is None]
    if missing:
        raise UserError(f"record {missing[0]!r} of eval_file has no answer, which latent_eval_steps needs.")
    rows = [encoded[i] for i in range(count)]
    for record, row in zip(chosen, rows, strict=True):
        if any(target.position < row.prompt_length for target in row.targets):
            raise UserError(
                f"record {record.id!r} of eval_file has latents in its prompt, which cannot be answered under "
                "interventions: give records whose spans stand in the last answer."
            )
    if "oracle" in config.latent_eval_conditions and not all(row.targets for row in rows):
        raise UserError(
            "eval_file has records without latent targets: take oracle out of latent_eval_conditions, or add targets."
        )
    questions = [Question(record.id, record.answer) for record in chosen if record.answer is not None]
    Rule().require_readable(question.answer for question in questions)
    return Questions(questions, lambda chosen: [rows[row] for row in chosen], encoder.family)


def adapter_of(model_config: ModelConfig, model: nn.Module, family: Family) -> Any:
    """TRL's adapter config, kept off the vision parts.

    Without target modules it takes all linear layers of the text model, which leaves the output head out.
    """
    peft_config = get_peft_config(model_config)
    if peft_config is None:
        return None
    if not (peft_config.target_modules or peft_config.target_parameters):
        peft_config.target_modules, kinds, layers = _text_targets(model, family)
        if PartialState().is_main_process:
            print(
                f"adapters of rank {peft_config.r} on {', '.join(kinds)} of {layers} text layers; lora_target_modules "
                "names others",
                file=sys.stderr,
            )
    frozen = {id(module) for part in family.vision_parts(model).values() for module in part}
    names = [name for name, module in model.named_modules() if id(module) in frozen]
    peft_config.exclude_modules = "|".join(rf"{name.replace('.', chr(92) + '.')}(\..*)?" for name in names)
    return peft_config


def _text_targets(model: nn.Module, family: Family) -> tuple[str, list[str], int]:
    """A pattern of the names of the text model's linear layers for PEFT, their kinds, and the number of layers."""
    layers = family.text_layers(model)
    (prefix,) = (name for name, module in model.named_modules() if module is layers)
    names = [name for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    if not kinds:
        raise UserError(f"{family.name}'s text layers hold no linear layers: name lora_target_modules.")
    return rf"{re.escape(prefix)}\.\d+\.(.*\.)?({'|'.join(map(re.escape, kinds))})", kinds, len(layers)
