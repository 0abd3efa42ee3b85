"""From a parsed recipe to a finished run of latent SFT: checks, model, data, trainer, what is left on disk."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, set_seed
from trl import ModelConfig, get_peft_config

from rl_lvr import quiet
from rl_lvr.data.cache import cache_key, encoded_records
from rl_lvr.data.check import Report, require_valid
from rl_lvr.data.encoding import Encoded, Encoder
from rl_lvr.data.records import Records, load_records
from rl_lvr.data.sources import locate
from rl_lvr.errors import UserError
from rl_lvr.evaluation.accuracy import AnswerSet
from rl_lvr.latents.feedback import NAME as FEEDBACK
from rl_lvr.latents.feedback import attach_feedback
from rl_lvr.latents.format import FormatIds, LatentFormat
from rl_lvr.models import load_processor, load_weights
from rl_lvr.models.loading import checkpoint_folder
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.training.callbacks import Interrupt, LatentAccuracy, MetricsFile, Progress, StopAt
from rl_lvr.training.config import WITHOUT_EFFECT, LatentSFTConfig
from rl_lvr.training.run import clear_run, open_run, write_run
from rl_lvr.training.sft import LatentSFTTrainer

GATHER = "zero_optimization.stage3_gather_16bit_weights_on_model_save"


class LazyEncoded(Sequence[Encoded]):
    """Records encoded each time they are asked for: for data whose processed images would not fit on disk."""

    def __init__(self, records: Records, encoder: Encoder) -> None:
        self.records = records
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Encoded:  # type: ignore[override]
        return self.encoder.encode([self.records[index]])[0]


def train_sft(config: LatentSFTConfig, model_config: ModelConfig, given: dict[str, Any]) -> int:
    """Train as the recipe says; returns the exit code."""
    path, checkpoint, chosen = _check(config, model_config, given)
    quiet.transformers()
    if config.threads:
        torch.set_num_threads(config.threads)
    encoder = _encoder(path, config, chosen)
    checked = _checked(config, encoder)
    set_seed(config.seed)  # new tokens and projectors are drawn here, before TRL sets the seed
    model = _model(path, config, model_config, encoder)
    family, markers, processor = encoder.family, encoder.markers, encoder.processor
    with config.main_process_first(desc="processing records"):
        records = load_records(config.train_file, config.train_limit)
        train = _encoded(records, encoder, config, checked[config.train_file])
        evaluation: Sequence[Encoded] = ()
        questions = None
        if config.eval_file:
            records = load_records(config.eval_file)
            evaluation = _encoded(records, encoder, config, checked[config.eval_file])
            if config.latent_eval_steps:
                questions = _questions(records, evaluation, encoder, config)

    interrupt, bar = Interrupt(), Progress("training")
    callbacks = [MetricsFile(Path(config.output_dir) / "metrics.jsonl"), bar, interrupt]
    if config.stop_at:
        callbacks.append(StopAt(config.stop_at))
    try:
        trainer = LatentSFTTrainer(
            model,
            config,
            family=family,
            markers=markers,
            processor=processor,
            train=train,
            evaluation=evaluation if config.eval_strategy != "no" else (),
            callbacks=callbacks,
            peft_config=_peft(model_config, model, family, markers),
        )
    except ValueError as error:  # TRL's and PEFT's own checks of their settings, each a sentence for the user
        raise UserError(" ".join(str(error).split())) from error
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    if questions is not None and chosen is not None:
        engine = HFRolloutEngine(trainer.model, processor, chosen, batch_size=config.latent_eval_batch)
        trainer.add_callback(LatentAccuracy(questions, engine, trainer))
    interrupt.install()
    if trainer.is_world_process_zero():
        if config.overwrite and checkpoint is None:
            clear_run(config.output_dir, path, config.train_file, config.eval_file)
        write_run(config.output_dir, "sft", given, {"training": config.to_dict(), "model": vars(model_config)})
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        bar.close()
        interrupt.restore()
    return _finish(trainer, interrupt)


def _check(
    config: LatentSFTConfig, model_config: ModelConfig, given: dict[str, Any]
) -> tuple[str, str | None, LatentFormat | None]:
    """What can be refused before anything is read: the model's path, the checkpoint to resume from, the format."""
    path = model_config.model_name_or_path
    if not path:
        raise UserError("model_name_or_path is missing: name the model to start from.")
    path = str(checkpoint_folder(path))
    for name, why in WITHOUT_EFFECT.items():
        if given.get(name) not in (None, False, "false"):
            raise UserError(f"{name} has no effect here ({why}): leave it out.")
    if model_config.use_peft and not (config.freeze_vision_tower and config.freeze_merger):
        raise UserError("adapters leave the vision parts frozen: leave freeze_vision_tower and freeze_merger on.")
    if config.n_gpu > 1:
        raise UserError(
            f"{config.n_gpu} GPUs are visible to one process: start one process for each (torchrun --nproc_per_node "
            f"{config.n_gpu} -m rl_lvr.cli sft ...), or make one visible with CUDA_VISIBLE_DEVICES."
        )
    sharding = _sharding(config)
    if sharding is not None and sharding.get_value(GATHER) is not True:
        raise UserError(f"the DeepSpeed config would leave a run without a model to load: set {GATHER} to true.")
    if config.stop_at:
        StopAt(config.stop_at)  # refuses a rule that it cannot read
    checkpoint = open_run(config.output_dir, config.resume_from_checkpoint, config.overwrite)
    config.distributed_state.wait_for_everyone()  # nobody writes the folder while another still looks at it
    chosen = config.format_of(LatentFormat.load(path), path)
    stored = None if checkpoint is None else LatentFormat.load(checkpoint)
    if checkpoint is not None and stored != chosen:
        raise UserError(
            f"checkpoint {checkpoint} was trained {f'with {stored}' if stored else 'without latents'}, "
            f"this recipe asks for {chosen or 'none'}: resume with the settings that it was started with."
        )
    return path, checkpoint, chosen


def _encoder(path: str, config: LatentSFTConfig, chosen: LatentFormat | None) -> Encoder:
    family, processor = load_processor(path, trust_remote_code=config.trust_remote_code)
    markers = None
    if chosen is not None:
        tokenizer = getattr(processor, "tokenizer", processor)
        if config.add_marker_tokens:
            chosen.add_tokens(tokenizer)
        markers = chosen.bind(tokenizer, family.placeholder_ids(tokenizer))
    return Encoder(processor, family, markers, crops=config.oracle == "crop")


def _checked(config: LatentSFTConfig, encoder: Encoder) -> dict[str, Report]:
    """The reports of the data files, which hold nothing that this run could not use."""
    files = {config.train_file: True}  # whether its answers are learned
    if config.eval_file:
        files[config.eval_file] = files.get(config.eval_file, False) or config.eval_strategy != "no"
    reports = {
        file: require_valid(file, judge=partial(encoder.judge, learned=learned)) for file, learned in files.items()
    }
    for file, learned in files.items():
        if learned and len(reports[file].shown) > 1 and _sharding(config) is not None:
            raise UserError(
                f"{file} holds records with and without images, and under ZeRO-3 all processes must use the vision "
                "tower at the same time: train on one kind of records, or use ZeRO-2."
            )
    return reports


def _sharding(config: LatentSFTConfig) -> Any:
    """The DeepSpeed config if it is one of ZeRO-3, which spreads the weights over the processes."""
    plugin = config.deepspeed_plugin
    return plugin.hf_ds_config if plugin is not None and plugin.hf_ds_config.is_zero3() else None


def _finish(trainer: LatentSFTTrainer, interrupt: Interrupt) -> int:
    step, last = trainer.state.global_step, trainer.state.max_steps
    speaks = trainer.is_world_process_zero()
    if interrupt.received is not None and step < last:
        if speaks:
            again = "go on with the same command and --resume_from_checkpoint latest"
            print(f"stopped at step {step} of {last}; {again}", file=sys.stderr)
        return 128 + interrupt.received
    trainer.save_model()
    trainer.save_state()
    where = trainer.save_merged()
    if speaks:
        print(f"{step} steps; model in {where}", file=sys.stderr)
    return 0


def _model(path: str, config: LatentSFTConfig, model_config: ModelConfig, encoder: Encoder) -> Any:
    dtype = model_config.dtype or "float32"
    model = load_weights(
        path,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        trust_remote_code=config.trust_remote_code,
        attn_implementation=model_config.attn_implementation,
    )
    if encoder.markers is not None:
        if config.add_marker_tokens and len(encoder.tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(encoder.tokenizer))
        attach_feedback(model, encoder.markers.format, path)
    return model


def _encoded(records: Records, encoder: Encoder, config: LatentSFTConfig, report: Report) -> Sequence[Encoded]:
    if not config.processed_cache:
        return LazyEncoded(records, encoder)
    key = cache_key(report.path, report.image_files, len(records), encoder)
    return encoded_records(records, encoder, key, locate(report.path)[0].parent / "processed")


def _questions(records: Records, evaluation: Sequence[Encoded], encoder: Encoder, config: LatentSFTConfig) -> AnswerSet:
    if encoder.markers is None:
        raise UserError("latent_eval_steps is set but latent_format is none: there are no latents to intervene on.")
    count = min(config.latent_eval_samples, len(records))
    chosen = [i for i in range(len(records)) if i < count]
    answers = [records[i].answer for i in chosen]
    missing = [records[i].id for i, answer in zip(chosen, answers, strict=True) if answer is None]
    if missing:
        raise UserError(f"record {missing[0]!r} of eval_file has no answer, which latent_eval_steps needs.")
    encoded = [evaluation[i] for i in chosen]
    for record, row in zip((records[i] for i in chosen), encoded, strict=True):
        if any(target.position < row.prompt_length for target in row.targets):
            raise UserError(
                f"record {record.id!r} of eval_file has latents in its prompt, which cannot be answered under "
                "interventions: give records whose spans stand in the last answer."
            )
    if "oracle" in config.latent_eval_conditions and not all(e.targets for e in encoded):
        raise UserError(
            "eval_file has records without latent targets: take oracle out of latent_eval_conditions, or add targets."
        )
    return AnswerSet(
        encoded,
        [a for a in answers if a is not None],
        encoder.family,
        encoder.tokenizer,
        config.latent_eval_batch,
    )


def _peft(model_config: ModelConfig, model: torch.nn.Module, family: Any, markers: FormatIds | None) -> Any:
    """TRL's adapter config, kept off the vision parts; the feedback map is trained whole beside the adapter."""
    peft_config = get_peft_config(model_config)
    if peft_config is None:
        return None
    frozen = {id(module) for part in family.vision_parts(model).values() for module in part}
    names = [name for name, module in model.named_modules() if id(module) in frozen]
    peft_config.exclude_modules = "|".join(rf"{name.replace('.', chr(92) + '.')}(\..*)?" for name in names)
    if markers is not None and hasattr(model, FEEDBACK):
        peft_config.modules_to_save = [*(peft_config.modules_to_save or []), FEEDBACK]
    return peft_config
