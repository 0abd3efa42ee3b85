"""From a parsed recipe to a finished run of latent SFT: checks, model, data, trainer, what is left on disk."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, set_seed
from trl import ModelConfig, get_peft_config

from rl_lvr import quiet
from rl_lvr.data.cache import encoded_records, file_digest
from rl_lvr.data.check import require_valid
from rl_lvr.data.encoding import Encoded, Encoder, check_spans
from rl_lvr.data.records import Records, load_records
from rl_lvr.errors import UserError
from rl_lvr.evaluation.accuracy import AnswerSet
from rl_lvr.latents.feedback import NAME as FEEDBACK
from rl_lvr.latents.feedback import attach_feedback
from rl_lvr.latents.format import FormatIds, LatentFormat
from rl_lvr.models import family_of, load_model
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.training.callbacks import Interrupt, LatentAccuracy, MetricsFile, Progress, StopAt
from rl_lvr.training.config import LatentSFTConfig
from rl_lvr.training.run import clear_run, open_run, write_run
from rl_lvr.training.sft import LatentSFTTrainer


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
    path = model_config.model_name_or_path
    if not path:
        raise UserError("model_name_or_path is missing: name the model to start from.")
    stop_at = [StopAt(config.stop_at)] if config.stop_at else []
    checkpoint = open_run(config.output_dir, config.resume_from_checkpoint, config.overwrite)
    chosen = _format(config, path)
    for file in filter(None, (config.train_file, config.eval_file)):
        require_valid(file)
        if chosen is not None:
            check_spans(load_records(file), chosen)

    quiet.transformers()
    if config.threads:
        torch.set_num_threads(config.threads)
    set_seed(config.seed)  # new tokens and projectors are drawn here, before TRL sets the seed
    model, processor, markers = _model(path, config, model_config, chosen)
    family = family_of(model)
    encoder = Encoder(processor, family, model, markers, crops=config.oracle == "crop")
    train = _encoded(load_records(config.train_file, config.train_limit), encoder, config, config.train_file)
    evaluation: Sequence[Encoded] = ()
    questions = None
    if config.eval_file:
        records = load_records(config.eval_file)
        evaluation = _encoded(records, encoder, config, config.eval_file)
        if config.latent_eval_steps:
            questions = _questions(records, evaluation, encoder, config)

    interrupt, bar = Interrupt(), Progress("training")
    trainer = LatentSFTTrainer(
        model,
        config,
        family=family,
        markers=markers,
        processor=processor,
        train=train,
        evaluation=evaluation if config.eval_strategy != "no" else (),
        callbacks=[MetricsFile(Path(config.output_dir) / "metrics.jsonl"), bar, interrupt, *stop_at],
        peft_config=_peft(model_config, model, family, markers),
    )
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    if questions is not None and chosen is not None:
        engine = HFRolloutEngine(trainer.model, processor, chosen, batch_size=config.latent_eval_batch)
        trainer.add_callback(LatentAccuracy(questions, engine, trainer))
    if trainer.is_world_process_zero():
        if config.overwrite and checkpoint is None:
            clear_run(config.output_dir)
        write_run(config.output_dir, "sft", given, {"training": config.to_dict(), "model": vars(model_config)})
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        bar.close()
        interrupt.restore()
    step = trainer.state.global_step
    if interrupt.received is not None:
        if trainer.is_world_process_zero():
            print(
                f"stopped at step {step} of {trainer.state.max_steps}; go on with the same command and "
                "--resume_from_checkpoint latest",
                file=sys.stderr,
            )
        return 128 + interrupt.received
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"{step} steps; model in {config.output_dir}", file=sys.stderr)
    return 0


def _format(config: LatentSFTConfig, path: str) -> LatentFormat | None:
    stored = LatentFormat.load(path)
    chosen = config.format_of(stored)
    if stored is not None and chosen is not None:
        chosen.check_against(stored, path)
    return chosen


def _model(
    path: str, config: LatentSFTConfig, model_config: ModelConfig, chosen: LatentFormat | None
) -> tuple[Any, Any, FormatIds | None]:
    dtype = model_config.dtype or "float32"
    model, processor = load_model(
        path,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        trust_remote_code=config.trust_remote_code,
        attn_implementation=model_config.attn_implementation,
    )
    if chosen is None:
        return model, processor, None
    tokenizer = getattr(processor, "tokenizer", processor)
    if config.add_marker_tokens and chosen.add_tokens(tokenizer):
        model.resize_token_embeddings(max(len(tokenizer), model.get_input_embeddings().num_embeddings))
    markers = chosen.bind(tokenizer, family_of(model).placeholder_ids(tokenizer))
    attach_feedback(model, chosen, path)
    return model, processor, markers


def _encoded(records: Records, encoder: Encoder, config: LatentSFTConfig, path: str) -> Sequence[Encoded]:
    if not config.processed_cache:
        return LazyEncoded(records, encoder)
    source = Path(path.partition(":")[0])
    key = {
        "data": file_digest(source),
        "split": path.partition(":")[2],
        "records": len(records),
        "processor": _processor_key(encoder.processor),
        "format": repr(encoder.markers),
        "crops": encoder.crops,
    }
    return encoded_records(records, encoder, key, source.parent / "processed")


def _processor_key(processor: Any) -> str:
    """Everything of a processor that shapes its output: tokenizer, template and image settings."""
    tokenizer = getattr(processor, "tokenizer", processor)
    image = getattr(processor, "image_processor", None)
    return repr((tokenizer.backend_tokenizer.to_str(), processor.chat_template, image and image.to_json_string()))


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
