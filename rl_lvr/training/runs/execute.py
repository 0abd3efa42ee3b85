"""From a trainer to a finished run, whatever the verb: callbacks, the run's folder, signals, what is left on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import ModelConfig

from rl_lvr.data.encoding import Encoder
from rl_lvr.errors import UserError
from rl_lvr.evaluation.accuracy import AnswerSet
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.training.runs.callbacks import Interrupt, LatentAccuracy, MetricsFile, Progress, StopAt
from rl_lvr.training.runs.folder import clear_run, write_run
from rl_lvr.training.runs.prepare import Start


@dataclass(frozen=True)
class Run:
    """What was asked for."""

    verb: str
    config: Any
    model_config: ModelConfig
    given: dict[str, Any]
    start: Start


def conduct(
    run: Run, build: Callable[[list[TrainerCallback]], Any], encoder: Encoder, questions: AnswerSet | None
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
        trainer.add_callback(LatentAccuracy(questions, engine, trainer))
    interrupt.install(trainer)
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


def _finish(trainer: Any, interrupt: Interrupt) -> int:
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
    where = trainer.save_merged()
    if speaks:
        print(f"{step} steps; model in {where}", file=sys.stderr)
    return 0
