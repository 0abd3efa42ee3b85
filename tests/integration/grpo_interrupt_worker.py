"""Runs `rl-lvr` commands in processes forked from this warm one, and strikes some of them with a signal.

Every line on stdin is a `Leg` in JSON; the answer is a line with the exit codes of its processes, negative for a
signal. It stands in for a launcher: with several ranks it sets their environment, and ends the others once one died.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from transformers import Trainer
from trl import GRPOTrainer

from rl_lvr import cli
from rl_lvr.accelerated import group_ended
from rl_lvr.latents.interventions import Intervention
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.training.grpo import LatentGRPOTrainer, main, rewarding  # noqa: F401, the verb imports it late
from rl_lvr.training.grpo import resuming as grpo_resuming
from rl_lvr.training.rewards import call
from rl_lvr.training.runs import resuming

GRACE = 20.0


@dataclass(frozen=True)
class Leg:
    words: list[str]
    log: str
    place: str | None = None
    """Where the signal comes: a name of `PLACES`."""
    nth: int = 1
    signal: int = 0
    struck: int = 0
    """The rank that gets it."""
    lost: str | None = None
    """What is not restored, or what process 1 lacks: a name in `lose`."""
    ranks: int = 1
    port: int = 0


PLACES: dict[str, tuple[Any, str]] = {
    "forward": (torch.nn.Embedding, "forward"),
    "reward": (call._Guarded, "__call__"),
    "backward": (torch.Tensor, "backward"),
    "optimizer": (importlib.import_module("torch.optim.adam"), "adam"),  # hidden behind the class of that name
    "checkpoint": (torch, "save"),
    "sealed": (resuming, "publish"),
}


def lose(what: str, rank: int) -> None:
    if what == "random":
        Trainer._load_rng_state = lambda self, checkpoint: None
    elif what == "order":
        LatentGRPOTrainer._init_training_state = GRPOTrainer._init_training_state
    elif what == "buffer":
        grpo_resuming.load_batches = lambda path, device: None
    elif what == "reference":
        grpo_resuming.Reference.load = lambda self, folder, moment: None
    elif what == "rewards":
        rewarding.unpack = lambda text, states: []
    elif what in ("latents", "spans"):
        if rank == 1:
            HFRolloutEngine.generate = other_rollouts(HFRolloutEngine.generate, what)
    else:
        raise ValueError(what)


def other_rollouts(generate: Callable[..., Any], lost: str) -> Callable[..., Any]:
    """An engine that returns other latents than it fed, or one that never opens a span."""

    def made(self: Any, requests: Any, sampling: Any) -> Any:
        if lost == "spans":
            requests = [replace(request, intervention=Intervention.NONE) for request in requests]
        rollouts = generate(self, requests, sampling)
        return rollouts if lost == "spans" else [replace(rollout, latents=-rollout.latents) for rollout in rollouts]

    return made


def arm(place: str, nth: int, number: int) -> None:
    owner, name = PLACES[place]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def struck(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        after = place == "optimizer"  # parameters are new, and the step is not counted yet
        result = original(*args, **more) if after else None
        if calls == nth:
            os.kill(os.getpid(), number)
        return result if after else original(*args, **more)

    setattr(owner, name, struck)


def be(leg: Leg, rank: int) -> None:
    """The life of one process."""
    with open(f"{leg.log}.{rank}", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 70
    try:
        code = lived(leg, rank)
    except BaseException:  # noqa: BLE001, the process ends here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def lived(leg: Leg, rank: int) -> int:
    with group_ended():
        if leg.ranks > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(leg.ranks),
                "LOCAL_WORLD_SIZE": str(leg.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(leg.port),
            }
            # Plain gloo: DeepSpeed would compile a shared-memory reduction first.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.init_distributed(dist_backend="gloo")
        if leg.lost is not None:
            lose(leg.lost, rank)
        if leg.place is not None and rank == leg.struck:
            arm(leg.place, leg.nth, leg.signal)
        return cli.main(leg.words)


def launch(leg: Leg) -> list[int]:
    processes = []
    for rank in range(leg.ranks):
        process = os.fork()
        if process == 0:
            be(leg, rank)
        processes.append(process)
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(processes):
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            codes[process] = os.waitstatus_to_exitcode(status)
            if codes[process] < 0:
                deadline = 0.0  # as a launcher does, and no sooner than the dead one is known
            elif codes[process]:
                deadline = min(deadline, time.monotonic() + GRACE)
        elif time.monotonic() > deadline:
            for other in set(processes) - set(codes):
                os.kill(other, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.02)
    return [codes[process] for process in processes]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(launch(Leg(**json.loads(line)))), flush=True)
