"""`rl-lvr rewards list | test`: which rewards there are, and what one of them would give to recorded rollouts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rl_lvr.errors import UserError, exits_refused
from rl_lvr.piping import pipeable
from rl_lvr.printable import printable

if TYPE_CHECKING:
    from rl_lvr.rollout.record import RecordedRollout
    from rl_lvr.training.rewards.load import RewardSpec

HELP = "list the rewards that are installed, or try one on recorded rollouts"


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    listing = actions.add_parser("list", help="name, origin, signals and meaning of every installed reward")
    listing.add_argument("--json", action="store_true", help="print a JSON list")

    test = actions.add_parser("test", help="run a reward on recorded rollouts, without a model")
    test.add_argument("name", metavar="NAME", help="a listed name, package.module:function or path/file.py:function")
    test.add_argument("--data", required=True, metavar="PATH", help="a run's folder, or a .jsonl file of rollouts")
    test.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an option; may be repeated")
    test.add_argument(
        "--text",
        action="store_true",
        help="hand over text of lines written by hand as text, as TRL does for prompts that are text; else as messages",
    )
    test.add_argument("--step", type=int, metavar="N", help="only the rollouts of this step")
    test.add_argument("--limit", type=int, metavar="N", help="only the first N rollouts")
    test.add_argument("--on-error", choices=("stop", "exclude"), default="stop", help="on a faulty sample (stop)")
    test.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="for the whole call (300; none if the reward has its own)"
    )
    test.add_argument("--json", action="store_true", help="print one JSON object")


@pipeable
def run(args: argparse.Namespace) -> int:
    return {"list": _list, "test": _test}[args.action](args)


# ---- list


def _list(args: argparse.Namespace) -> int:
    from rl_lvr.plugins import installed, load_entry_point
    from rl_lvr.training.rewards.load import REWARD

    rows: list[dict[str, Any]] = []
    for name, points in installed(REWARD).items():
        for point in points:
            try:
                with exits_refused(f"reward {name!r}"):
                    found = load_entry_point(REWARD, point)
                    facts = _facts(found.target)
            except UserError as error:  # one broken package must not hide the others
                rows.append({"name": name, "from": point.value, "signals": [], "doc": "", "error": str(error)})
                continue
            rows.append({"name": name, "from": found.where, "error": None, **facts})
    if args.json:
        print(json.dumps(rows, ensure_ascii=False))
        return 0
    if not rows:
        print("no rewards are installed")
    for row in rows:
        print(printable(f"{row['name']:16} {row['error'] or row['doc']}"))
        signals = f"; signals: {', '.join(row['signals'])}" if row["signals"] else ""
        print(printable(f"{'':16}   {row['from']}{signals}"))
    return 0


def _facts(target: Any) -> dict[str, Any]:
    """Signals and meaning; of a class the signals that it needs with its default options."""
    import inspect

    from rl_lvr.training.rewards.load import first_line
    from rl_lvr.training.rewards.options import options_of, signal_names

    signals: Sequence[Any] = ()
    if not inspect.isclass(target):
        signals = getattr(target, "signals", ())
    elif all(parameter.default is not parameter.empty for parameter in options_of(target).values()):
        signals = getattr(target(), "signals", ())
    return {"signals": sorted(signal_names(signals)), "doc": first_line(target)}


# ---- test


def _test(args: argparse.Namespace) -> int:
    import asyncio
    import inspect
    import time
    from itertools import groupby

    from rl_lvr.rollout.record import read_rollouts, reward_columns
    from rl_lvr.training.rewards.load import load_rewards
    from rl_lvr.training.rewards.state import SharedReward, state_of

    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}; it must be at least 1.")
    entry = {"name": args.name, "options": _options(args.option), "on_error": args.on_error}
    if args.timeout is not None:
        entry["timeout"] = args.timeout
    (spec,) = load_rewards([entry])
    rollouts = read_rollouts(args.data)
    if args.step is not None:
        steps, rollouts = rollouts.steps, rollouts.of_step(args.step)
        if not rollouts:
            raise UserError(f"{args.data} has no step {args.step}; it has {some(steps)}.")
    chosen = list(rollouts[: args.limit])
    if not chosen:
        raise UserError(f"{args.data} holds no rollouts.")
    metrics: dict[str, float] = {}
    excluded = f"rewards/{spec.name}/excluded"

    def log_metric(name: str, value: float) -> None:
        metrics[name] = value + (metrics.get(name, 0.0) if name == excluded else 0.0)

    given = {"trainer_state": None, "log_extra": lambda column, values: None, "log_metric": log_metric}
    state = state_of(spec.function)
    # A reward that remembers is called as in training: step by step.
    parts = [chosen] if state is None else [list(part) for _, part in groupby(chosen, lambda rollout: rollout.step)]
    scores: list[float | None] = []
    began = time.perf_counter()
    for part in parts:
        found = spec.function(**reward_columns(part, conversational=not args.text), **given)
        scores += asyncio.run(_await(found)) if inspect.isawaitable(found) else found
        if isinstance(state, SharedReward):
            state.merge([state.pending()])
    _report(args, spec, chosen, scores, metrics, time.perf_counter() - began)
    return 0


async def _await(scores: Any) -> Any:
    return await scores


def _options(given: Sequence[str]) -> dict[str, Any]:
    import yaml

    from rl_lvr.settings_files import read_yaml

    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--option {text!r} is not of the form KEY=VALUE.")
        if name in options:
            raise UserError(f"--option {name} is given twice: keep one of the two.")
        try:
            options[name] = read_yaml(value, f"--option {name}")
        except yaml.YAMLError as error:
            raise UserError(f"--option {text!r} is no valid YAML.") from error
    return options


def some(steps: Sequence[int]) -> str:
    """The first few steps and the last, for a sentence."""
    return ", ".join(map(str, steps[:5])) + (f" ... {steps[-1]}" if len(steps) > 5 else "")


def _report(
    args: argparse.Namespace,
    spec: RewardSpec,
    rollouts: Sequence[RecordedRollout],
    scores: Sequence[float | None],
    metrics: dict[str, float],
    seconds: float,
) -> None:
    scored = [score for score in scores if score is not None]
    summary = {
        "reward": spec.name,
        "from": spec.where,
        "n": len(scores),
        "scored": len(scored),
        "excluded": int(metrics.pop(f"rewards/{spec.name}/excluded", 0)),
        "mean": sum(scored) / len(scored) if scored else None,
        "seconds": round(seconds, 3),
        "metrics": metrics,
    }
    if args.json:
        print(json.dumps({**summary, "scores": scores}))
        return
    import shutil

    from rich.cells import set_cell_size

    from rl_lvr.rollout.record import plain_text

    width = shutil.get_terminal_size((120, 24)).columns
    print(_short(f"{'step':>6} {'sample':>6} {'reward':>10}  {'answer':10}  completion", width))
    for rollout, score, number in zip(rollouts, scores, range(len(rollouts)), strict=True):
        shown = "not scored" if score is None else f"{score:.4g}"
        text = " ".join((rollout.marked or plain_text(rollout.completion)).split())
        answer = set_cell_size(_short(printable(" ".join((rollout.answer or "-").split())), 10), 10)
        print(_short(f"{rollout.step:6} {number:6} {shown:>10}  {answer}  {printable(text)}", width))
    mean = "-" if summary["mean"] is None else f"{summary['mean']:.4f}"
    print(
        f"{spec.name}: mean {mean} of {summary['scored']} scored of {summary['n']}, "
        f"{summary['excluded']} excluded for faults, {seconds:.2f} s"
    )
    for name, value in metrics.items():
        print(printable(f"{name}: {value:g}"))


def _short(text: str, width: int) -> str:
    """Cut to a terminal's cells, of which some characters take two."""
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"
