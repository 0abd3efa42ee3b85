"""From a trainer to a finished run, whatever the verb: callbacks, the run's folder, signals, what is left on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import ModelConfig

from rl_lvr.data.encoding import Encoder
from rl_lvr.errors import Fault, UserError
from rl_lvr.evaluation.evaluate import Judge
from rl_lvr.evaluation.questions import Questions
from rl_lvr.evaluation.rows import Rule
from rl_lvr.finite import first_not_finite
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.training.runs.callbacks import LatentAccuracy, MetricsFile, Progress, StopAt
from rl_lvr.training.runs.card import card_of
from rl_lvr.training.runs.folder import clear_run, write_run
from rl_lvr.training.runs.prepare import Start
from rl_lvr.training.runs.stopping import Interrupt

if TYPE_CHECKING:
    from rl_lvr.training.runs.resuming import Resumable
    from rl_lvr.training.runs.settings import RunConfig


@dataclass(frozen=True)
class Run:
    """What was asked for."""

    verb: str
    config: RunConfig
    model_config: ModelConfig
    given: dict[str, Any]
    start: Start


def execute(
    run: Run, build: Callable[[list[TrainerCallback]], Resumable], encoder: Encoder, questions: Questions | None
) -> int:
    """Train, and return the exit code. `build` makes the trainer with the callbacks that it is given."""
    config = run.config
    interrupt, bar = Interrupt(), Progress("training")
    callbacks = [MetricsFile(Path(config.output_dir) / "metrics.jsonl"), bar, interrupt]
    if config.stop_at:
        callbacks.append(StopAt(config.stop_at))
    try:
        trainer = build(callbacks)
    except ValueError as error:  # TRL's and PEFT's own checks of their settings, each a sentence for the user
        raise UserError(" ".join(str(error).split())) from error
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    if questions is not None and encoder.markers is not None:
        engine = HFRolloutEngine(
            trainer.model, encoder.processor, encoder.markers.format, batch_size=config.latent_eval_batch
        )
        trainer.add_callback(
            LatentAccuracy(questions, engine, Judge(encoder.tokenizer, encoder.markers, Rule()), trainer)
        )
    interrupt.install(trainer.stopping)
    if trainer.is_world_process_zero():
        if config.overwrite and run.start.checkpoint is None:
            clear_run(config.output_dir, run.start.path, config.train_file, config.eval_file)
        write_run(
            config.output_dir, run.verb, run.given, {"training": config.to_dict(), "model": vars(run.model_config)}
        )
    try:
        trainer.train(resume_from_checkpoint=run.start.checkpoint)
    finally:
        bar.close()
        interrupt.restore()
    return _finish(trainer, interrupt)


def _finish(trainer: Resumable, interrupt: Interrupt) -> int:
    step, last = trainer.state.global_step, trainer.state.max_steps
    speaks = trainer.is_world_process_zero()
    if interrupt.received is not None and step < last:
        if speaks:
            again = f"go on with the same command and --resume_from_checkpoint {'latest' if step else 'auto'}"
            print(f"stopped at step {step} of {last}; {again}", file=sys.stderr)
        return 128 + interrupt.received
    trainer.require_finite_weights("in the model that training ends with", "use an earlier checkpoint")
    trainer.save_model()
    trainer.save_state()
    where = _save_merged(trainer)
    if speaks:
        print(f"{step} steps; model in {where}", file=sys.stderr)
    return 0


def _save_merged(trainer: Resumable) -> str:
    """Beside an adapter, write the model with the adapter in it: what engines and evaluation load. Returns its folder.

    Nothing may be trained afterwards. DeepSpeed and FSDP hold parts of the weights elsewhere: there it is left out.
    """
    output_dir: str = trainer.args.output_dir
    if not isinstance(trainer.model, PeftModel) or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return output_dir
    folder = Path(output_dir) / "merged"
    if trainer.is_world_process_zero():
        card = replace(card_of(trainer), adapter=False)
        merged = trainer.model.merge_and_unload()
        name = first_not_finite(merged)  # a sum of finite weights may overflow
        if name is not None:
            raise Fault(f"parameter {name} is not finite once the adapter is merged: use a wider precision.")
        merged.save_pretrained(folder)
        card.save(folder)
        trainer.processing_class.save_pretrained(folder)
        if trainer.markers is not None:
            trainer.markers.format.save(folder)
    return str(folder)
