"""What a run writes and hears: metrics.jsonl, progress, early stopping, Ctrl-C, accuracy under interventions."""

from __future__ import annotations

import json
import math
import operator
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rl_lvr import progress
from rl_lvr.errors import UserError
from rl_lvr.evaluation.conditions import parse_conditions
from rl_lvr.evaluation.evaluate import Judge, collapse_of
from rl_lvr.evaluation.plan import Plan
from rl_lvr.evaluation.questions import Questions
from rl_lvr.evaluation.report import OWN, summarise
from rl_lvr.rollout.types import RolloutEngine, Sampling


class MetricsFile(TrainerCallback):
    """Appends every logged row to `metrics.jsonl`; a resumed run drops the rows after its checkpoint first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and self.path.is_file():
            kept = [json.dumps(row) + "\n" for row in _whole_rows(self.path) if row["step"] <= state.global_step]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(self.path)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if state.is_world_process_zero and more["logs"]:
            row = {"step": state.global_step, **more["logs"], "seconds": round(time.monotonic() - self.began, 3)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file whose last line may have been cut off, as by a kill or a full disk; that one is left out."""
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    last = len(lines) if lines[-1] else 0  # a line that ends was written whole
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "step" not in row:
                raise ValueError("it is no row of a step")
        except ValueError as error:
            if number == last:
                print(f"{path}: its last line, {number}, was cut off and is left out", file=sys.stderr)
                break
            raise UserError(f"{path}, line {number} is damaged ({error}): mend or remove it.") from error
        rows.append(row)
    return rows


class Progress(TrainerCallback):
    """One bar for the run, with the latest figures; plain lines where the output is no terminal."""

    SHOWN = (
        "loss",
        "mean_token_accuracy",
        "reward",
        "latent/nmse",
        "latent/rate",
        "latent/replay_logp_diff",
        "latent/accuracy_own",
        "learning_rate",
    )

    def __init__(self, description: str) -> None:
        self.description = description
        self.task: Any = None
        self.bar: Any = None
        self.figures: dict[str, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.task = progress.task(self.description, total=state.max_steps, unit="steps")
            self.bar = self.task.__enter__()
            self.bar.advance(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.advance(1, **self.figures)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        for key in self.SHOWN:
            if key in more["logs"]:
                self.figures[key.rpartition("/")[2]] = more["logs"][key]

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar down; also called when training ends by an error."""
        if self.task is not None:
            self.task.__exit__(None, None, None)
            self.task = self.bar = None


class StopAt(TrainerCallback):
    """Ends training once a logged metric passes a bound: ``mean_token_accuracy>0.99``."""

    COMPARE: ClassVar = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}

    def __init__(self, rule: str) -> None:
        found = re.fullmatch(r"\s*([\w/]+)\s*(>=|<=|>|<)\s*([-+.\deE]+)\s*", rule)
        if found is None:
            raise UserError(f"stop_at is {rule!r}; write a metric, a comparison and a number: loss<0.01.")
        self.metric = found[1]
        self.passes: Callable[[float, float], bool] = self.COMPARE[found[2]]
        try:
            self.bound = float(found[3])
        except ValueError as error:
            raise UserError(f"stop_at is {rule!r}: {found[3]!r} is no number.") from error
        if not math.isfinite(self.bound):
            raise UserError(f"stop_at is {rule!r}: {found[3]} is not finite.")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        logs = more["logs"]
        if "loss" in logs and self.metric not in logs and not self.metric.startswith(("eval_", "latent/", "signal/")):
            raise UserError(f"stop_at names {self.metric!r}, which is not logged; there are {', '.join(sorted(logs))}.")
        value = logs.get(self.metric)
        if value is not None and self.passes(value, self.bound):
            control.should_training_stop = True


class LatentAccuracy(TrainerCallback):
    """Answers eval records under interventions every so many steps and logs `latent/accuracy_<condition>`.

    Every process answers the same records: under ZeRO-3 each forward pass needs all of them.
    """

    def __init__(self, questions: Questions, engine: RolloutEngine, judge: Judge, trainer: Trainer) -> None:
        self.questions = questions
        self.engine = engine
        self.judge = judge
        self.trainer: Any = trainer
        self.every: int = trainer.args.latent_eval_steps
        self.conditions = parse_conditions(trainer.args.latent_eval_conditions)
        self.sampling = Sampling(
            max_tokens=trainer.args.latent_eval_max_tokens, temperature=0.0, seed=trainer.args.seed
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        plan = Plan(
            self.questions,
            self.conditions,
            self.sampling,
            oracles=lambda rows: self.questions.oracles(self.trainer.model, rows),
            at_once=self.trainer.args.latent_eval_batch,
        )
        with self.trainer.accelerator.autocast():
            answered = [one for call in plan.run(self.engine) for one in call]
        tables = summarise([self.judge.row(self.questions, one) for one in answered])["conditions"]
        figures = {f"latent/accuracy_{name}": table["accuracy"] for name, table in tables.items()}
        figures |= {f"latent/unreadable_{name}": table["unreadable"] for name, table in tables.items()}
        if OWN in tables:
            figures["latent/rate"] = tables[OWN]["trigger_rate"]
            own = [(one.item.question, one.latents) for one in answered if one.item.condition.name == OWN]
            collapse = collapse_of(own)
            if collapse is not None:
                figures["latent/collapse_own"] = collapse
        if state.is_world_process_zero:
            for name, why in plan.undefined.items():
                print(f"step {state.global_step}: no accuracy under {name}: {why}", file=sys.stderr)
        # TRL averages what stands here into the step's own row: a row of its own would empty that one.
        for name, figure in figures.items():
            self.trainer._metrics["train"][name].append(figure)
        control.should_log = True
