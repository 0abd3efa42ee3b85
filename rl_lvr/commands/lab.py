"""`rl-lvr lab`: a tiny vision-language model from scratch, and experiments on it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_lvr.lab.config import LabConfig

HELP = "build a tiny model from scratch, and run experiments on it"
FAMILIES = ("qwen2_5_vl", "qwen3_vl")
POLICIES = ("context", "unrolled", "gaussian", "spherical")


def configure(parser: argparse.ArgumentParser) -> None:
    """The verbs of the lab."""
    verbs = parser.add_subparsers(dest="lab", metavar="EXPERIMENT", required=True)

    build = verbs.add_parser("build", help="a tiny untrained model with its tokenizer and processor")
    build.add_argument("--out", required=True, help="folder to write")
    build.add_argument("--family", choices=FAMILIES, default="qwen2_5_vl")
    build.add_argument("--grid", default="3x3", help="cells of the puzzles: their colours are words of the tokenizer")
    build.add_argument("--layers", type=int, default=3, help="text layers")
    build.add_argument("--hidden", type=int, default=128, help="width of the text model")
    build.add_argument("--seed", type=int, default=0)

    demo = verbs.add_parser("demo", help="a model whose latents carry the answer and one whose latents are idle")
    _experiment(demo, "runs/demo")

    grpo = verbs.add_parser("grpo", help="what GRPO adds to a model that was trained too short, by latent policy")
    _experiment(grpo, "runs/lab-grpo")
    grpo.add_argument("--policies", default=",".join(POLICIES), help="latent policies, separated by commas")
    grpo.add_argument(
        "--gradient-clip", type=float, metavar="X", help="latent_gradient_clip of unrolled (default: exact gradients)"
    )
    grpo.add_argument("--from", dest="source", metavar="DEMO", help="folder of a demo whose pre-trained models serve")


def _experiment(verb: argparse.ArgumentParser, out: str) -> None:
    verb.add_argument("--out", default=out, help="folder of models, tables and the picture")
    verb.add_argument("--seeds", type=int, default=1, help="how many models of each kind")
    verb.add_argument("--family", choices=FAMILIES, default="qwen2_5_vl")
    verb.add_argument("--train", type=int, default=24000, help="training puzzles per set")
    verb.add_argument("--test", type=int, default=1000, help="held-out puzzles per set")
    verb.add_argument("--max-steps", type=int, help="cut every training run short: a quick look, no result")


def run(arguments: argparse.Namespace) -> int:
    """Run one experiment."""
    return {"build": _build, "demo": _demo, "grpo": _grpo}[arguments.lab](arguments)


def _build(arguments: argparse.Namespace) -> int:
    from rl_lvr import quiet
    from rl_lvr.lab.models import build_lab_model

    quiet.transformers()
    folder = build_lab_model(
        arguments.out,
        family=arguments.family,
        grid=arguments.grid,
        layers=arguments.layers,
        hidden=arguments.hidden,
        seed=arguments.seed,
    )
    print(folder)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from rl_lvr.lab.demo import run_demo
    from rl_lvr.lab.picture import table

    out, puzzles = _start(arguments)
    return _finish(lambda: run_demo(out, arguments.seeds, puzzles), table, out, "demo.png")


def _grpo(arguments: argparse.Namespace) -> int:
    from rl_lvr.errors import UserError
    from rl_lvr.lab.grpo import GRPOConfig, run_grpo
    from rl_lvr.lab.grpo_picture import table

    policies = tuple(part.strip() for part in arguments.policies.split(","))
    for name in policies:
        if name not in POLICIES or policies.count(name) > 1:
            raise UserError(f"--policies names {name!r}; choose from {', '.join(POLICIES)}, each once.")
    out, puzzles = _start(arguments)
    clip = arguments.gradient_clip
    if clip is not None and not clip > 0:
        raise UserError(f"--gradient-clip is {clip}; it must be above 0.")
    config = GRPOConfig(policies, puzzles, arguments.source, gradient_clip=clip)
    return _finish(lambda: run_grpo(out, arguments.seeds, config), table, out, "grpo.png")


def _start(arguments: argparse.Namespace) -> tuple[Path, LabConfig]:
    from rl_lvr.errors import UserError
    from rl_lvr.lab.config import LabConfig

    if arguments.seeds < 1:
        raise UserError(f"--seeds is {arguments.seeds}; it must be at least 1.")
    config = LabConfig(
        family=arguments.family, train=arguments.train, test=arguments.test, max_steps=arguments.max_steps
    )
    return Path(arguments.out), config


def _finish(
    experiment: Callable[[], dict[str, Any]], table: Callable[[dict[str, Any]], str], out: Path, picture: str
) -> int:
    from rl_lvr.locking import folder_held

    try:
        with folder_held(out, "rl-lvr lab", "--out"):
            summary = experiment()
    except KeyboardInterrupt:
        print("rl-lvr: stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    print(table(summary))
    print(f"{out / 'summary.json'}\n{out / picture}")
    return 0
