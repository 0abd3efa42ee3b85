"""The demo: a model whose latents carry the answer, and one whose latents are idle, from nothing, on two cores.

Then GRPO on one that was trained too short (`grpo.py`). The stages are run by `runner.py`; a second run goes on where
the first one stopped. No torch in this process.
"""

from __future__ import annotations

import json
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rl_lvr.data.puzzles import chance
from rl_lvr.lab.config import LabConfig
from rl_lvr.lab.grpo import GRPOConfig, GRPOLab
from rl_lvr.lab.picture import draw, number
from rl_lvr.lab.runner import Runner, Stage, claim, say

GRPO_POLICY = "unrolled"
"""The latent policy that the demo shows; rl-lvr lab grpo compares all."""
GRADIENT_CLIP = 1.0
"""Its exact gradient ruined one start in four (docs/lab.md)."""
CONDITIONS = ("oracle", "own", "zeros", "noise", "swap")


def run_demo(out: Path, seeds: int, config: LabConfig) -> dict[str, Any]:
    """Run or continue the demo in `out`; returns and writes the summary."""
    claim(out, "demo", asdict(config))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the children the way Ctrl-C does
    demo = _Demo(out, config)
    results = []
    try:
        sets = {name: config.puzzles(name) for name in ("one_hop", "diagnostic", "weak")}
        demo.runner.draw_puzzles(sets, {"train": config.train, "test": config.test})
        demo.grpo.draw_held_out()
        for seed in range(seeds):
            results.append(demo.run_seed(seed))
            summary = demo.summary(results)
            (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    finally:
        demo.runner.stop()
    draw(summary, out / "demo.png")
    return summary


class _Demo:
    def __init__(self, out: Path, config: LabConfig) -> None:
        self.out = out
        self.config = config
        self.runner = Runner(out, config.max_steps)
        grpo = GRPOConfig((GRPO_POLICY,), config, attention=False, gradient_clip=GRADIENT_CLIP)
        self.grpo = GRPOLab(self.runner, grpo)

    def run_seed(self, seed: int) -> dict[str, Any]:
        """All models and tables of one seed."""
        path = self.out / f"seed-{seed}" / "result.json"
        result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else self._supervised(seed)
        if "grpo" not in result:
            clock = time.monotonic()
            result["grpo"] = self.grpo.run([seed])[0]["policies"][GRPO_POLICY]
            result["seconds"]["grpo"] = round(time.monotonic() - clock, 1)
            result["seconds"]["total"] = round(result["seconds"]["total"] + result["seconds"]["grpo"], 1)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    def _supervised(self, seed: int) -> dict[str, Any]:
        """The models of the two sets and the twin without latents."""
        folder, runner = self.out / f"seed-{seed}", self.runner
        clock = time.monotonic()
        grid = f"{self.config.rows}x{self.config.cols}"
        pretrain = runner.pretrain_stage(folder, self.config.family, grid, seed, runner.cores)
        start = pretrain.folder
        runner.train([[pretrain]])
        seconds = {"pretrain": time.monotonic() - clock}

        half = max(runner.cores // 2, 1)
        deep, idle = runner.data("diagnostic"), runner.data("weak")
        diagnostic = Stage("diagnostic", "diagnostic", start, deep, folder / "diagnostic", seed, half)
        weak = Stage("weak", "weak", start, idle, folder / "weak", seed, half)
        direct = Stage("direct", "direct", start, deep, folder / "direct", seed, half)
        result: dict[str, Any] = {"seed": seed}

        def tables(stage: Stage) -> None:
            if stage is weak:
                result["weak"] = runner.evaluate(stage, CONDITIONS, idle / "test.parquet")
                result["weak"]["direct"] = runner.evaluate(pretrain, ("none",), idle / "test.parquet")["none"]
                _show("weak", result["weak"], seed)
            elif stage is diagnostic:
                result["diagnostic"] = runner.evaluate(stage, CONDITIONS, deep / "test.parquet")
                _show("diagnostic", result["diagnostic"], seed)
            else:
                result["direct"] = runner.evaluate(stage, ("none",), deep / "test.parquet")["none"]
            seconds[stage.name] = time.monotonic() - clock

        runner.train([[diagnostic], [weak, direct]], tables)
        result["diagnostic"]["direct"] = result.pop("direct")
        result["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
        result["seconds"]["total"] = round(time.monotonic() - clock, 1)
        (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    def summary(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """Means over seeds at the top, each seed's figures under `seeds`."""
        summary: dict[str, Any] = {"config": asdict(self.config)}
        for name in ("diagnostic", "weak"):
            tables = [r[name] for r in results]
            for t in tables:
                t["chance"] = chance(self.config.puzzles(name))
            summary[name] = {key: _mean([t[key] for t in tables]) for key in (*CONDITIONS, "direct")}
            summary[name] |= {key: tables[0][key] for key in ("chance", "n")}
        keys = ("own_before", "own_after", "oracle_after")
        summary["grpo"] = {key: _mean([r["grpo"][key] for r in results]) for key in keys}
        summary["grpo"] |= {"policy": GRPO_POLICY, "seconds": _mean([r["grpo"]["seconds"] for r in results])}
        keys = results[0]["seconds"]
        summary["seconds"] = {key: round(sum(r["seconds"][key] for r in results) / len(results), 1) for key in keys}
        summary["seeds"] = results
        return summary


def _mean(values: list[float | None]) -> float | None:
    """None if a seed has no figure: a model cut short may make no latents, and then there is none to swap."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _show(name: str, table: dict[str, Any], seed: int) -> None:
    """One line as soon as a model is measured; the whole table comes at the end."""
    figures = "  ".join(f"{key} {number(table[key])}" for key in CONDITIONS)
    say(f"seed {seed}, {name} set ({table['n']} held-out puzzles): {figures}")
