"""Experiments of the lab as stages: each is the command that a user would type, in a process of its own.

A finished stage is kept, an interrupted one goes on from its checkpoint. No torch in this process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rl_lvr import progress
from rl_lvr.data.puzzles import PuzzleConfig
from rl_lvr.errors import UserError
from rl_lvr.locking import LOCK

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "lab"
SHOWN = (
    ("mean_token_accuracy", "accuracy"),
    ("latent/nmse", "nmse"),
    ("latent/accuracy_own", "own"),
    ("rewards/accuracy/mean", "reward"),
)


class Child:
    """One command, its output in `log`. Waited for by hand, because `Popen` drops the CPU seconds of the dead."""

    def __init__(self, arguments: Sequence[str], log: Path, variables: Mapping[str, str] | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.cpu_seconds = 0.0
        # One GPU is enough, and more than one asks for a launcher. A session of its own keeps the terminal's Ctrl-C
        # from the child: `Runner.stop` tells it once, and once means a checkpoint.
        environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ, **(variables or {})}
        command = [sys.executable, "-m", "rl_lvr.cli", *arguments]
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)

    @property
    def running(self) -> bool:
        return self._reap(os.WNOHANG)

    def _reap(self, options: int) -> bool:
        """Whether it still runs; takes note of its end."""
        if self.process.returncode is None:
            pid, status, usage = os.wait4(self.process.pid, options)
            if pid:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                self.cpu_seconds = usage.ru_utime + usage.ru_stime
        return self.process.returncode is None

    def end(self) -> None:
        """Ask it to stop (a training run writes a checkpoint first), and wait until it has."""
        if self.running:
            self.process.terminate()
        self._reap(0)

    def wait(self, what: str) -> None:
        """Wait for its end; an error that quotes the log if it failed."""
        self._reap(0)
        if self.process.returncode:
            tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
            raise UserError(f"{what} ended with exit code {self.process.returncode}; the end of {self.log}:\n{tail}")


@dataclass
class Stage:
    """One training run."""

    name: str
    recipe: str
    model: Path
    data: Path
    folder: Path
    seed: int
    threads: int
    verb: str = "sft"
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the recipe, changed."""
    variables: dict[str, str] = field(default_factory=dict)
    """Of its environment."""
    child: Child | None = None
    began: float = 0.0

    @property
    def finished(self) -> bool:
        return (self.folder / "trainer_state.json").is_file()

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".txt")

    def steps(self, max_steps: int | None) -> int:
        """Steps that this stage takes at most."""
        recipe = yaml.safe_load((RECIPES / f"{self.recipe}.yaml").read_text(encoding="utf-8"))
        return int(self.settings.get("max_steps") or max_steps or recipe["max_steps"])

    def command(self, max_steps: int | None) -> list[str]:
        settings = {
            "model_name_or_path": self.model,
            "train_file": self.data / "train.parquet",
            "output_dir": self.folder,
            "seed": self.seed,
            "threads": self.threads,
            **({} if max_steps is None else {"max_steps": max_steps}),
            **self.settings,
        }
        if any(self.folder.glob("checkpoint-*/trainer_state.json")):
            settings["resume_from_checkpoint"] = "latest"
        elif (self.folder / "run.json").is_file():
            settings["overwrite"] = "true"
        words = [self.verb, "--config", str(RECIPES / f"{self.recipe}.yaml")]
        for key, value in settings.items():
            words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        return words

    def step(self) -> tuple[int, dict[str, Any]]:
        """Steps done so far and the last logged row."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return 0, {}
        lines = path.read_text(encoding="utf-8").splitlines()
        try:
            row = json.loads(lines[-1]) if lines else {}
        except json.JSONDecodeError:  # read while the last line was being written
            row = json.loads(lines[-2]) if len(lines) > 1 else {}
        return row.get("step", 0), row

    # ---- time

    def begin(self, max_steps: int | None) -> None:
        self.began = time.monotonic()
        self.child = Child(self.command(max_steps), self.log, self.variables)

    def note_time(self) -> None:
        """Add this process's seconds to those of the processes before it, which were interrupted."""
        if self.child is not None:
            spent = self.seconds
            spent["cpu"] += self.child.cpu_seconds
            spent["wall"] += time.monotonic() - self.began
            self._time.write_text(json.dumps(spent) + "\n", encoding="utf-8")

    @property
    def seconds(self) -> dict[str, float]:
        """What training took so far, all processes together: `cpu` and `wall`."""
        if not self._time.is_file():
            return {"cpu": 0.0, "wall": 0.0}
        found: dict[str, float] = json.loads(self._time.read_text(encoding="utf-8"))
        return found

    @property
    def _time(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}-seconds.json")


class Runner:
    """Runs stages, evaluations and other commands of an experiment below `out`, and ends them with it."""

    def __init__(self, out: Path, max_steps: int | None) -> None:
        self.out = out
        self.max_steps = max_steps
        self.cores = len(os.sched_getaffinity(0))
        self._children: list[Child] = []
        self._stages: list[Stage] = []

    def start(self, arguments: Sequence[str], log: Path) -> Child:
        self._children.append(Child(arguments, log))
        return self._children[-1]

    def call(self, arguments: Sequence[str], log: Path, what: str) -> None:
        self.start(arguments, log).wait(what)

    def stop(self) -> None:
        """End what is still running."""
        for child in self._children:
            child.end()
        for stage in self._stages:
            if stage.child is not None and stage.child.running:
                stage.child.process.terminate()
        for stage in self._stages:
            if stage.child is not None and stage.child.running:
                stage.child.end()
                stage.note_time()

    # ---- puzzles and models

    def data(self, name: str) -> Path:
        return self.out / "data" / name

    def draw_puzzles(self, sets: dict[str, PuzzleConfig], counts: dict[str, int]) -> None:
        """`data make` leaves a finished set alone."""
        started = []
        for name, puzzles in sets.items():
            words = ["data", "make", "pointers", "--out", str(self.data(name)), "--hops", str(puzzles.hops)]
            words += ["--grid", f"{puzzles.rows}x{puzzles.cols}", "--latents", puzzles.latents]
            words += ["--seed", str(puzzles.seed)]
            if puzzles.k is not None:
                words += ["--k", str(puzzles.k)]
            for split, count in counts.items():
                words += [f"--{split}", str(count)]
            started.append((self.start(words, self.out / "logs" / f"data-{name}.txt"), name))
        say("drawing puzzles")
        for child, name in started:
            child.wait(f"drawing the puzzles {name}")

    def pretrain_stage(self, folder: Path, family: str, grid: str, seed: int, threads: int) -> Stage:
        """The pre-training of a seed below `folder`, on a model that is built if it is not there."""
        base = folder / "base"
        stage = Stage("pretrain", "pretrain", base, self.data("one_hop"), folder / "pretrain", seed, threads)
        if not (base / "config.json").is_file() and not stage.finished:
            words = ["lab", "build", "--out", str(base), "--family", family, "--grid", grid, "--seed", str(seed)]
            self.call(words, folder / "build.txt", "building the model")
        return stage

    # ---- training and measuring

    def train(self, lanes: Sequence[Sequence[Stage]], finished: Callable[[Stage], None] | None = None) -> None:
        """Run lanes beside each other, the stages of a lane one after another, under one bar."""
        stages = [stage for lane in lanes for stage in lane]
        self._stages += stages
        waiting = [list(lane) for lane in lanes]
        running: list[Stage | None] = [None] * len(lanes)
        names = {id(stage): stage.name if len(stages) == 1 else f"{stage.name}-{stage.seed}" for stage in stages}
        left = {id(stage): stage.steps(self.max_steps) for stage in stages}
        seeds = sorted({stage.seed for stage in stages})
        title = f"seed {', '.join(map(str, seeds))}: {', '.join(dict.fromkeys(stage.name for stage in stages))}"
        with progress.task(title, total=sum(left.values()), unit="steps") as bar:
            done = dict.fromkeys(left, 0)
            while any(waiting) or any(running):
                for lane, queue in enumerate(waiting):
                    stage = running[lane]
                    if stage is None and queue:
                        running[lane] = stage = queue.pop(0)
                        if not stage.finished:
                            stage.begin(self.max_steps)
                    if stage is None:
                        continue
                    key = id(stage)
                    step, row = stage.step()
                    bar.advance(max(step - done[key], 0), **{names[key]: _figures(step, row)})
                    done[key] = step
                    if stage.child is None or not stage.child.running:
                        if stage.child is not None:
                            stage.note_time()
                            stage.child.wait(f"training {stage.name}")
                        running[lane] = None
                        bar.advance(left[key] - done[key])  # it may have stopped early
                        if finished is not None:
                            finished(stage)
                time.sleep(0.2)

    def evaluate(
        self, stage: Stage, conditions: Sequence[str], data: Path, *more: str, name: str | None = None
    ) -> dict[str, Any]:
        """A table of one model: accuracies by condition, None where there is none, means of signals, and `n`.

        The answers are kept beside the model; a second run makes those that are missing.
        """
        path = stage.folder.with_name(f"{stage.name}-on-{name or data.parent.name}.jsonl")
        arguments = ["evaluate", str(stage.folder), "--data", str(data), "--out", str(path)]
        arguments += ["--conditions", ",".join(conditions), "--format", "lvr", *more]
        arguments += ["--threads", str(max(self.cores // 2, 1))]  # the other lane goes on meanwhile
        if not _complete(path):
            self.call(arguments, stage.log, f"evaluating {stage.name}")
        summary = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        tables = summary["conditions"]
        accuracies = {
            condition: tables[condition]["accuracy"] if condition in tables else None for condition in conditions
        }
        return {"n": summary["records"], **accuracies, **tables.get("own", {}).get("signals", {})}


def _complete(answers: Path) -> bool:
    """Whether an evaluation has come to its figures."""
    summary = answers.with_suffix(".json")
    return summary.is_file() and "conditions" in json.loads(summary.read_text(encoding="utf-8"))


def claim(out: Path, kind: str, config: dict[str, Any]) -> None:
    """Bind the folder to this experiment and its config, or refuse one that was made with another."""
    if not RECIPES.is_dir():
        raise UserError(
            f"the lab reads its recipes from {RECIPES}, which is not there: run it in a clone of the repository."
        )
    path = out / f"{kind}.json"
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != config:
            raise UserError(f"{out} holds a {kind} with other settings ({path}): choose another --out, or delete it.")
        return
    if out.is_dir() and any(entry.name != LOCK for entry in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no {kind}: choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """A line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def _figures(step: int, row: dict[str, Any]) -> str:
    return " ".join([f"step {step}", *(f"{name} {row[key]:.2f}" for key, name in SHOWN if key in row)])
