"""The demo: a model whose latents carry the answer, and one whose latents are idle, from nothing, on two cores.

Each stage is the command that a user would type (`rl-lvr data make`, `lab build`, `sft`, `lab evaluate`), run as a
process of its own. A second run goes on where the first one stopped. No torch in this process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from rl_lvr import progress
from rl_lvr.data.puzzles import PuzzleConfig, chance
from rl_lvr.errors import UserError
from rl_lvr.lab.picture import draw, number

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "lab"
CONDITIONS = ("oracle", "own", "zeros", "noise", "swap")


@dataclass(frozen=True)
class DemoConfig:
    """What the demo builds. A folder made with one config is not continued with another."""

    family: str = "qwen2_5_vl"
    rows: int = 3
    cols: int = 3
    hops: int = 5
    train: int = 24000
    test: int = 1000
    max_steps: int | None = None
    """Steps of every training run, for a quick look; None takes the recipes'."""

    def puzzles(self, name: str) -> PuzzleConfig:
        """The puzzles of a set by name."""
        grid = {"rows": self.rows, "cols": self.cols}
        return {
            "one_hop": PuzzleConfig(**grid, hops=1, latents="none", seed=1),
            "diagnostic": PuzzleConfig(**grid, hops=self.hops, latents="path", seed=2),
            "weak": PuzzleConfig(**grid, hops=1, latents="decorative", k=self.hops, seed=3),
        }[name]


@dataclass
class Stage:
    """One training run of the demo."""

    name: str
    recipe: str
    model: Path
    data: Path
    folder: Path
    threads: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def finished(self) -> bool:
        return (self.folder / "trainer_state.json").is_file()

    def steps(self, max_steps: int | None) -> int:
        """Steps that this stage takes at most."""
        recipe = yaml.safe_load((RECIPES / f"{self.recipe}.yaml").read_text(encoding="utf-8"))
        return int(max_steps or recipe["max_steps"])

    def command(self, seed: int, max_steps: int | None) -> list[str]:
        more = [] if max_steps is None else ["--max_steps", str(max_steps)]
        if any(self.folder.glob("checkpoint-*/trainer_state.json")):
            more += ["--resume_from_checkpoint", "latest"]
        elif (self.folder / "run.json").is_file():
            more += ["--overwrite", "true"]
        return [
            *(
                "sft",
                "--config",
                str(RECIPES / f"{self.recipe}.yaml"),
                "--model_name_or_path",
                str(self.model),
            ),
            *("--train_file", str(self.data / "train.parquet"), "--output_dir", str(self.folder)),
            *("--seed", str(seed), "--threads", str(self.threads), *more),
        ]

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


def run_demo(out: Path, seeds: int, config: DemoConfig) -> dict[str, Any]:
    """Run or continue the demo in `out`; returns and writes the summary."""
    if not RECIPES.is_dir():
        raise UserError(
            f"the demo reads its recipes from {RECIPES}, which is not there: run it in a clone of the repository."
        )
    _claim(out, config)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the children the way Ctrl-C does
    demo = _Demo(out, config)
    results = []
    try:
        demo.prepare_data()
        for seed in range(seeds):
            results.append(demo.run_seed(seed))
            summary = demo.summary(results)
            (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    finally:
        demo.stop()
    draw(summary, out / "demo.png")
    return summary


def _claim(out: Path, config: DemoConfig) -> None:
    """Bind the folder to this config, or refuse one that was made with another."""
    path = out / "demo.json"
    mine = asdict(config)
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != mine:
            raise UserError(f"{out} holds a demo with other settings ({path}): choose another --out, or delete it.")
        return
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no demo: choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")


class _Demo:
    def __init__(self, out: Path, config: DemoConfig) -> None:
        self.out = out
        self.config = config
        self.children: list[subprocess.Popen[bytes]] = []
        self.cores = len(os.sched_getaffinity(0))

    # ---- processes

    def _command(self, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        log.parent.mkdir(parents=True, exist_ok=True)
        # One GPU is enough, and more than one asks for a launcher. A session of its own keeps the terminal's Ctrl-C
        # from the child: `stop` tells it once, and once means a checkpoint.
        environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ}
        command = [sys.executable, "-m", "rl_lvr.cli", *arguments]
        with log.open("ab") as file:
            child = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        self.children.append(child)
        return child

    def stop(self) -> None:
        """End what is still running: a training run writes a checkpoint first."""
        for child in self.children:
            if child.poll() is None:
                child.terminate()
        for child in self.children:
            child.wait()

    def _wait(self, process: subprocess.Popen[bytes], log: Path, what: str) -> None:
        code = process.wait()
        if code:
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
            raise UserError(f"{what} ended with exit code {code}; the end of {log}:\n{tail}")

    def _call(self, arguments: Sequence[str], log: Path, what: str) -> None:
        self._wait(self._command(arguments, log), log, what)

    # ---- steps

    def data(self, name: str) -> Path:
        return self.out / "data" / name

    def prepare_data(self) -> None:
        """The three sets of puzzles; `data make` leaves a finished set alone."""
        started = []
        for name in ("one_hop", "diagnostic", "weak"):
            puzzles = self.config.puzzles(name)
            arguments = [
                "data",
                "make",
                "pointers",
                "--out",
                str(self.data(name)),
                "--hops",
                str(puzzles.hops),
            ]
            arguments += ["--grid", f"{puzzles.rows}x{puzzles.cols}", "--latents", puzzles.latents]
            if puzzles.k is not None:
                arguments += ["--k", str(puzzles.k)]
            arguments += [
                "--train",
                str(self.config.train),
                "--test",
                str(self.config.test),
                "--seed",
                str(puzzles.seed),
            ]
            log = self.out / "logs" / f"data-{name}.txt"
            started.append((self._command(arguments, log), log, name))
        _say("drawing puzzles")
        for process, log, name in started:
            self._wait(process, log, f"drawing the puzzles {name}")

    def run_seed(self, seed: int) -> dict[str, Any]:
        """All models and tables of one seed."""
        path = self.out / f"seed-{seed}" / "result.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        folder = path.parent
        clock = time.monotonic()
        base = folder / "base"
        grid = f"{self.config.rows}x{self.config.cols}"
        if not (base / "config.json").is_file():
            self._call(
                [
                    "lab",
                    "build",
                    "--out",
                    str(base),
                    "--family",
                    self.config.family,
                    "--grid",
                    grid,
                    "--seed",
                    str(seed),
                ],
                folder / "build.txt",
                "building the model",
            )
        pretrain = Stage("pretrain", "pretrain", base, self.data("one_hop"), folder / "pretrain", self.cores)
        self._train(seed, [[pretrain]])
        seconds = {"pretrain": time.monotonic() - clock}

        start = pretrain.folder
        half = max(self.cores // 2, 1)
        diagnostic = Stage("diagnostic", "diagnostic", start, self.data("diagnostic"), folder / "diagnostic", half)
        weak = Stage("weak", "weak", start, self.data("weak"), folder / "weak", half)
        direct = Stage("direct", "direct", start, self.data("diagnostic"), folder / "direct", half)
        result: dict[str, Any] = {"seed": seed}

        def tables(stage: Stage) -> None:
            if stage is weak:
                result["weak"] = self._evaluate(stage, CONDITIONS, "weak")
                result["weak"]["direct"] = self._evaluate(pretrain, ("none",), "weak")["none"]
                _show("weak", result["weak"], seed)
            elif stage is diagnostic:
                result["diagnostic"] = self._evaluate(stage, CONDITIONS, "diagnostic")
                _show("diagnostic", result["diagnostic"], seed)
            else:
                result["direct"] = self._evaluate(stage, ("none",), "diagnostic")["none"]
            seconds[stage.name] = time.monotonic() - clock

        self._train(seed, [[diagnostic], [weak, direct]], tables)
        result["diagnostic"]["direct"] = result.pop("direct")
        result["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
        result["seconds"]["total"] = round(time.monotonic() - clock, 1)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    def _train(self, seed: int, lanes: list[list[Stage]], finished: Any = None) -> None:
        """Run lanes beside each other, the stages of a lane one after another, under one bar."""
        stages = [stage for lane in lanes for stage in lane]
        waiting = [list(lane) for lane in lanes]
        running: list[Stage | None] = [None] * len(lanes)
        left = {stage.name: stage.steps(self.config.max_steps) for stage in stages}
        title = f"seed {seed}: {', '.join(left)}"
        with progress.task(title, total=sum(left.values()), unit="steps") as bar:
            done = dict.fromkeys(left, 0)
            while any(waiting) or any(running):
                for lane, queue in enumerate(waiting):
                    stage = running[lane]
                    if stage is None and queue:
                        running[lane] = stage = queue.pop(0)
                        if not stage.finished:
                            log = stage.folder.with_suffix(".txt")
                            stage.process = self._command(stage.command(seed, self.config.max_steps), log)
                    if stage is None:
                        continue
                    step, row = stage.step()
                    bar.advance(max(step - done[stage.name], 0), **{stage.name: _figures(step, row)})
                    done[stage.name] = step
                    if stage.process is None or stage.process.poll() is not None:
                        if stage.process is not None:
                            self._wait(stage.process, stage.folder.with_suffix(".txt"), f"training {stage.name}")
                        running[lane] = None
                        bar.advance(left[stage.name] - done[stage.name])  # it may have stopped early
                        if finished is not None:
                            finished(stage)
                time.sleep(0.2)

    def _evaluate(self, stage: Stage, conditions: Sequence[str], data: str) -> dict[str, Any]:
        """A table of one model; kept beside it, so that a second run does not answer everything again."""
        path = stage.folder.with_name(f"{stage.name}-on-{data}.json")
        if not path.is_file():
            arguments = ["lab", "evaluate", str(stage.folder), "--data", str(self.data(data) / "test.parquet")]
            arguments += ["--conditions", ",".join(conditions), "--format", "lvr", "--out", str(path)]
            arguments += ["--threads", str(max(self.cores // 2, 1))]  # the other lane goes on meanwhile
            self._call(arguments, stage.folder.with_suffix(".txt"), f"evaluating {stage.name}")
        return json.loads(path.read_text(encoding="utf-8"))

    def summary(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """Means over seeds at the top, each seed's figures under `seeds`."""
        summary: dict[str, Any] = {"config": asdict(self.config)}
        for name in ("diagnostic", "weak"):
            tables = [r[name] for r in results]
            for t in tables:
                t["chance"] = chance(self.config.puzzles(name))
            summary[name] = {key: _mean([t[key] for t in tables]) for key in (*CONDITIONS, "direct")}
            summary[name] |= {key: tables[0][key] for key in ("chance", "n")}
        keys = results[0]["seconds"]
        summary["seconds"] = {key: round(sum(r["seconds"][key] for r in results) / len(results), 1) for key in keys}
        summary["seeds"] = results
        return summary


def _mean(values: list[float | None]) -> float | None:
    """None if a seed has no figure: a model cut short may make no latents, and then there is none to swap."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _figures(step: int, row: dict[str, Any]) -> str:
    shown = [f"step {step}"]
    for key, name in (("mean_token_accuracy", "accuracy"), ("latent/nmse", "nmse")):
        if key in row:
            shown.append(f"{name} {row[key]:.2f}")
    return " ".join(shown)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _show(name: str, table: dict[str, Any], seed: int) -> None:
    """One line as soon as a model is measured; the whole table comes at the end."""
    figures = "  ".join(f"{key} {number(table[key])}" for key in CONDITIONS)
    _say(f"seed {seed}, {name} set ({table['n']} held-out puzzles): {figures}")
