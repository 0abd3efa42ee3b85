"""`rl-lvr lab grpo`: what GRPO adds to a model whose supervised training was stopped early, by latent policy.

Per seed: pre-training (or the demo's), an SFT that stops once own latents give every second answer, one GRPO run per
policy from there, its twin with the attention reward, and one step with each engine. Stages are run by `runner.py`.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rl_lvr.data.puzzles import PuzzleConfig
from rl_lvr.errors import UserError
from rl_lvr.lab.config import LabConfig
from rl_lvr.lab.grpo_picture import draw
from rl_lvr.lab.runner import Runner, Stage, claim, say
from rl_lvr.rollout.record import read_rollouts

SETTINGS: dict[str, dict[str, Any]] = {
    "context": {"learning_rate": 2e-5},
    "unrolled": {},
    "gaussian": {"latent_sigma": 0.2, "latent_weight": 200, "learning_rate": 5e-5},
    "spherical": {"latent_sigma": 0.018, "latent_weight": 200, "learning_rate": 5e-5},
}
"""What each policy changes in recipes/lab/grpo.yaml; chosen on one or two seeds, with few tries. The noise of both
laws turns a latent by about 0.2 radians."""
ATTENTION: dict[str, Any] = {
    "rewards": ["accuracy", json.dumps({"name": "attention", "weight": 1, "options": {"layers": None}})],
    "multi_objective_aggregation": "normalize_then_sum",
}
"""What a twin changes. Within a group the masses differ by about a hundredth: beside right and wrong answers they count
only if each reward is normalised by itself."""
MASS = "attention_mass"
"""Attention of the text after the latents on the latents, all layers and heads: that reward's signal, held out."""
FIRST_STEP: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "record_rollouts": "true",
}
"""Of the comparison of engines: 8 puzzles, 8 completions each."""
HELD_OUT_SEED = 12
"""Of the puzzles that the result is measured on. No setting was chosen by them."""
VLLM_OPTIONS = {"max_model_len": 64, "gpu_memory_utilization": 0.1, "engine_args": {"enforce_eager": True}}
VLLM_ON_CPU = {"TRITON_INTERPRET": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
"""What vLLM's code for GPUs needs to run without one: its kernels interpreted, in the trainer's process."""


@dataclass(frozen=True)
class GRPOConfig:
    """What the experiment runs. A folder made with one config is not continued with another."""

    policies: tuple[str, ...] = ()
    puzzles: LabConfig = field(default_factory=LabConfig)
    source: str | None = None
    """A demo's folder whose pre-trained models are used, by seed."""
    attention: bool = True
    """Whether each policy has a twin with the attention reward."""
    gradient_clip: float | None = None
    """`latent_gradient_clip` of `unrolled`."""

    @property
    def sets(self) -> dict[str, PuzzleConfig]:
        return {name: self.puzzles.puzzles(name) for name in ("one_hop", "diagnostic")}

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))


def run_grpo(out: Path, seeds: int, config: GRPOConfig) -> dict[str, Any]:
    """Run or continue the experiment in `out`; returns and writes the summary."""
    if config.source is not None:
        _check_source(Path(config.source), seeds, config)
    claim(out, "grpo", config.to_json())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the children the way Ctrl-C does
    lab = GRPOLab(Runner(out, config.puzzles.max_steps), config)
    try:
        lab.draw_puzzles()
        results = lab.run(range(seeds))
        _write(out / "summary.json", summarise(results, [], config))
        engines = [lab.first_steps(seed) for seed in range(seeds)]
        summary = summarise(results, engines, config)
        _write(out / "summary.json", summary)
    finally:
        lab.runner.stop()
    draw(summary, out / "grpo.png")
    return summary


def _check_source(source: Path, seeds: int, config: GRPOConfig) -> None:
    for seed in range(seeds):
        if not (source / f"seed-{seed}" / "pretrain" / "trainer_state.json").is_file():
            raise UserError(
                f"{source} holds no pre-trained model of seed {seed}: run rl-lvr lab demo --seeds {seeds} there first, "
                "or leave --from out."
            )
    known = json.loads((source / "demo.json").read_text(encoding="utf-8"))
    theirs = {key: known[key] for key in ("family", "rows", "cols")}
    mine = {key: getattr(config.puzzles, key) for key in theirs}
    if theirs != mine:
        raise UserError(f"the models in {source} are of {theirs}, this experiment's of {mine}: leave --from out.")


class GRPOLab:
    """The stages of the experiment, for its own command and for the demo."""

    def __init__(self, runner: Runner, config: GRPOConfig) -> None:
        self.runner = runner
        self.config = config
        self.half = max(runner.cores // 2, 1)

    @property
    def data(self) -> Path:
        return self.runner.data("diagnostic")

    @property
    def validation(self) -> Path:
        """Pictures of neither training nor test: by them the SFT is stopped."""
        return self.runner.data("stop") / "val.parquet"

    @property
    def held_out(self) -> Path:
        """Puzzles by which no setting was chosen: the test puzzles of the diagnostic set are looked at all the time."""
        return self.runner.data("held_out") / "test.parquet"

    def draw_puzzles(self) -> None:
        sets = self.config.sets
        if self.config.source is not None:
            del sets["one_hop"]
        self.runner.draw_puzzles(sets, {"train": self.config.puzzles.train, "test": self.config.puzzles.test})
        self.draw_held_out()

    def draw_held_out(self) -> None:
        puzzles = self.config.puzzles.puzzles("diagnostic")
        self.runner.draw_puzzles({"stop": puzzles}, {"train": 0, "val": 300, "test": 0})
        fresh = replace(puzzles, seed=HELD_OUT_SEED)
        self.runner.draw_puzzles({"held_out": fresh}, {"train": 0, "val": 0, "test": self.config.puzzles.test})

    def run(self, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """All models and figures of these seeds, two processes beside each other."""
        starts = [self.start_stage(seed, folder) for seed, folder in zip(seeds, self._pretrained(seeds), strict=True)]
        tables: dict[Path, dict[str, Any]] = {}

        def measure(stage: Stage) -> None:
            tables[stage.folder] = found = self.measure(stage)
            say(f"seed {stage.seed}, {stage.name}: {_line(found)}")

        self.runner.train(_lanes(starts), measure)
        kinds = (False, True) if self.config.attention else (False,)
        runs = {
            (seed, policy, attention): self.stage(seed, policy, attention=attention)
            for seed in seeds
            for policy in self.config.policies
            for attention in kinds
        }
        self.runner.train(_lanes(list(runs.values())), measure)
        return [
            {
                "seed": seed,
                "start": {"own": tables[start.folder]["own"], "oracle": tables[start.folder]["oracle"]}
                | {"steps": start.step()[0], MASS: tables[start.folder][MASS]},
                "policies": {
                    policy: self._row(runs[seed, policy, False], start, runs.get((seed, policy, True)), tables)
                    for policy in self.config.policies
                },
            }
            for seed, start in zip(seeds, starts, strict=True)
        ]

    def _pretrained(self, seeds: Sequence[int]) -> list[Path]:
        """Their models, trained two beside each other if they are not there."""
        if self.config.source is not None:
            return [Path(self.config.source) / f"seed-{seed}" / "pretrain" for seed in seeds]
        puzzles = self.config.puzzles
        grid = f"{puzzles.rows}x{puzzles.cols}"
        threads = self.half if len(seeds) > 1 else self.runner.cores
        stages = [
            self.runner.pretrain_stage(self.runner.out / f"seed-{seed}", puzzles.family, grid, seed, threads)
            for seed in seeds
        ]
        self.runner.train(_lanes(stages))
        return [stage.folder for stage in stages]

    def _row(
        self, stage: Stage, start: Stage, attention: Stage | None, tables: dict[Path, dict[str, Any]]
    ) -> dict[str, Any]:
        mine = tables[stage.folder]
        row = {
            "own_before": tables[start.folder]["own"],
            "own_after": mine["own"],
            "oracle_after": mine["oracle"],
            "attention_mass": {"with": None, "without": mine[MASS]},
            "seconds": round(stage.seconds["cpu"], 1),
            "wall_seconds": round(stage.seconds["wall"], 1),
        }
        if attention is not None:
            theirs = tables[attention.folder]
            row["attention_mass"]["with"] = theirs[MASS]
            row["with_attention"] = {
                "own_after": theirs["own"],
                "oracle_after": theirs["oracle"],
                "seconds": round(attention.seconds["cpu"], 1),
            }
        return row

    # ---- stages

    def start_stage(self, seed: int, pretrained: Path) -> Stage:
        """The SFT that is stopped early."""
        folder = self.runner.out / f"seed-{seed}" / "grpo-start"
        settings = {"eval_file": self.validation}
        return Stage("start", "grpo_start", pretrained, self.data, folder, seed, self.half, settings=settings)

    def stage(self, seed: int, policy: str, *, attention: bool = False, **settings: Any) -> Stage:
        """One GRPO run from there."""
        name = f"{policy}-attention" if attention else policy
        home = self.runner.out / f"seed-{seed}"
        chosen = {"latent_policy": policy, **SETTINGS[policy], **settings}
        if policy == "unrolled" and self.config.gradient_clip is not None:
            chosen["latent_gradient_clip"] = self.config.gradient_clip
        if attention:
            chosen |= ATTENTION
        return Stage(
            name, "grpo", home / "grpo-start", self.data, home / f"grpo-{name}", seed, self.half, "grpo", chosen
        )

    def measure(self, stage: Stage) -> dict[str, Any]:
        """Held-out accuracies with own and oracle latents, and the attention on own ones."""
        return self.runner.evaluate(stage, ("own", "oracle"), self.held_out, "--signals", MASS)

    def first_steps(self, seed: int) -> dict[str, Any]:
        """The rewards of one step with each engine: same start, same seed."""
        if find_spec("vllm") is None:
            return {"equal": None, "n": 0, "why": "vLLM is not installed"}
        found = {}
        for engine in ("hf", "vllm"):
            options: dict[str, Any] = {"engine_options": json.dumps(VLLM_OPTIONS)} if engine == "vllm" else {}
            stage = self.stage(seed, "context", engine=engine, **FIRST_STEP, **options)
            stage.name = f"first step, {engine}"
            stage.folder = stage.folder.with_name(f"first-step-{engine}")
            if engine == "vllm" and _on_cpu():
                stage.variables = VLLM_ON_CPU
            self.runner.train([[stage]])
            found[engine] = _recorded(stage.folder)
        (rewards, tokens), (theirs, drawn) = found["hf"], found["vllm"]
        return {
            "equal": rewards == theirs,
            "tokens_equal": tokens == drawn,
            "n": len(rewards),
            "right": {"hf": rewards.count(1.0), "vllm": theirs.count(1.0)},
        }


def _lanes(stages: Sequence[Stage]) -> list[Sequence[Stage]]:
    return [stages[0::2], stages[1::2]]


def _on_cpu() -> bool:
    """Whether the vLLM that is installed is the one for CPUs."""
    return any(found.metadata["Name"] == "vllm-cpu" for found in distributions())


def _recorded(folder: Path) -> tuple[list[float | None], list[list[int] | None]]:
    """Accuracy rewards and tokens of the rollouts of a run, in order."""
    rollouts = read_rollouts(folder)
    return [r.rewards["accuracy"] for r in rollouts], [r.completion_ids for r in rollouts]


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def summarise(results: list[dict[str, Any]], engines: list[dict[str, Any]], config: GRPOConfig) -> dict[str, Any]:
    """Per policy the means over seeds and each seed's row; the pair with and without attention; the engines."""
    policies = {}
    for policy in config.policies:
        rows = [{"seed": r["seed"], **r["policies"][policy]} for r in results]
        gains = [row["own_after"] - row["own_before"] for row in rows]
        policies[policy] = {
            "gain": sum(gains) / len(gains),
            "worst_gain": min(gains),
            "seeds": rows,
        }
    known = [e["equal"] for e in engines if e["equal"] is not None]
    return {
        "config": config.to_json(),
        "n": config.puzzles.test,
        "policies": policies,
        "start": [r["start"] for r in results],
        "engines": {"equal": all(known) if known else None, "n": sum(e["n"] for e in engines), "seeds": engines},
    }


def _line(table: dict[str, Any]) -> str:
    mass = table[MASS]
    return f"own {table['own']:.3f}  oracle {table['oracle']:.3f}  mass {'-' if mass is None else format(mass, '.3f')}"
