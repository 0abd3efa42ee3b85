"""`rl-lvr rollouts show`: page through what a run generated, with latents, rewards and signals."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from rl_lvr.commands.rewards import some
from rl_lvr.errors import UserError
from rl_lvr.piping import pipeable
from rl_lvr.printable import printable

if TYPE_CHECKING:
    from rl_lvr.rollout.record import RecordedRollout, Rollouts

HELP = "page through the rollouts that a run recorded"
KEYS = "Enter next, p previous, a number goes there, q quits"


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="one rollout after another; plain lines where there is no terminal")
    show.add_argument("folder", metavar="RUN", help="a run's folder, or a .jsonl file of rollouts")
    show.add_argument("--step", type=int, metavar="N", help="only this step")
    show.add_argument("--index", type=int, metavar="I", help="only this one, from 0; negative from the end")
    show.add_argument("--limit", type=int, metavar="N", help="only the first N")
    show.add_argument("--json", action="store_true", help="print one JSON object per line")


@pipeable
def run(args: argparse.Namespace) -> int:
    from rl_lvr.rollout.record import read_rollouts

    rollouts = read_rollouts(args.folder)
    if args.step is not None and rollouts:
        steps, rollouts = rollouts.steps, rollouts.of_step(args.step)
        if not rollouts:
            raise UserError(f"{args.folder} has no step {args.step}; it has {some(steps)}.")
    if args.limit is not None:
        if args.limit < 1:
            raise UserError(f"--limit is {args.limit}; it must be at least 1.")
        rollouts = rollouts[: args.limit]
    if not rollouts:
        raise UserError(f"{args.folder} holds no rollouts.")
    count, chosen = len(rollouts), range(len(rollouts))
    if args.index is not None:
        if not -count <= args.index < count:
            raise UserError(f"--index {args.index} is outside: they are numbered from 0 to {count - 1}.")
        chosen = chosen[args.index % count :][:1]
    if args.json:
        from dataclasses import asdict

        for number in chosen:
            print(json.dumps(asdict(rollouts[number])))
    elif sys.stdout.isatty() and sys.stdin.isatty() and len(chosen) > 1:
        _page(rollouts)
    else:
        for number in chosen:
            print(_shown(rollouts[number], number, count) + "\n")
    return 0


def _page(rollouts: Rollouts) -> None:
    """One rollout per screen. A line of input and no raw keys: it works over any connection and leaves no trace."""
    at = 0
    while True:
        print("\033[2J\033[H" + _shown(rollouts[at], at, len(rollouts)))
        print(f"\n[{at}/{len(rollouts) - 1}] {KEYS}: ", end="", flush=True)  # input() would write it to stderr
        try:
            key = input().strip().lower()
        except EOFError:
            return
        if key == "q":
            return
        step = {"": 1, "n": 1, "p": -1}.get(key)
        wanted = at + step if step is not None else int(key) if key.isdecimal() else at
        at = min(max(wanted, 0), len(rollouts) - 1)


def _shown(rollout: RecordedRollout, number: int, count: int) -> str:
    from rl_lvr.rollout.record import plain_text

    facts = [f"rollout {number} of {count}", f"step {rollout.step}"]
    if rollout.group is not None:
        facts.append(f"group {rollout.group}")
    if rollout.category is not None:
        facts.append(rollout.category)
    lines = [", ".join(facts)]
    lines += [f"image       {path}" for path in rollout.images]
    lines += _block("prompt", plain_text(rollout.prompt))
    lines += _block("completion", rollout.marked or plain_text(rollout.completion))
    if rollout.answer is not None:
        lines += _block("answer", rollout.answer)
    if rollout.stop_reason is not None:
        tokens = "" if rollout.completion_ids is None else f" after {len(rollout.completion_ids)} tokens"
        lines.append(f"stopped     {rollout.stop_reason}{tokens}")
    for span in rollout.spans or ():
        begin, stop = span.get("begin"), span.get("stop")
        lines.append(f"span        tokens {begin} to {stop}, {span.get('latents')} latents, {span.get('status')}")
    lines += [f"reward      {name} {_value(value)}" for name, value in rollout.rewards.items()]
    lines += [f"signal      {name} {_value(value)}" for name, value in rollout.signals.items()]
    columns = dict(rollout.columns)
    without = columns.pop("necessity_completions", None)
    if without is not None:
        lines += _block("no latents", plain_text(without))
    lines += [f"column      {name} {_value(value)}" for name, value in columns.items() if value is not None]
    return printable("\n".join(lines))


def _block(name: str, text: str) -> list[str]:
    first, *rest = text.splitlines() or [""]
    return [f"{name:12}{first}", *(" " * 12 + line for line in rest)]


def _value(value: Any) -> str:
    if value is None:
        return "not scored"
    if isinstance(value, list):
        return " ".join(_value(v) for v in value[:12]) + (f" ... ({len(value)})" if len(value) > 12 else "")
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
