"""Faults: kinds of rollouts and what is done with them, calls that all processes agree on, idle batches."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from rl_lvr.agreement import agree, agreed, from_first
from rl_lvr.errors import Fault, UserError
from rl_lvr.latents.format import FormatIds, LatentFormat
from rl_lvr.latents.interventions import Intervention
from rl_lvr.locking import folder_held
from rl_lvr.rollout.types import Rollout, StopReason
from rl_lvr.training.grpo.filtering import Idle, Unopened
from rl_lvr.training.grpo.rules import RULES, kinds_of, rules_of, sort_rollouts
from rl_lvr.training.rewards.call import watched
from rl_lvr.training.runs.folder import run_held

START, SLOT, END, TEXT, EOS = 11, 12, 13, 14, 15
MARKERS = FormatIds(LatentFormat("test", "o", "[", "]", k=2), START, SLOT, END)
CLOSED = (START, SLOT, SLOT, END, TEXT, EOS)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def rollout(*completion: int, prompt: tuple[int, ...] = (TEXT, TEXT)) -> Rollout:
    ids = prompt + completion
    positions = tuple(at for at, token in enumerate(ids) if token == SLOT)
    return Rollout(
        prompt_ids=prompt,
        completion_ids=completion,
        logprobs=torch.zeros(len(completion)),
        forced=torch.zeros(len(completion), dtype=torch.bool),
        latents=torch.zeros(len(positions), 4),
        latent_positions=positions,
        stop_reason=StopReason.EOS if completion[-1:] == (EOS,) else StopReason.LENGTH,
        seed=0,
        sigma=0.0,
        intervention=Intervention.OWN,
    )


@pytest.mark.parametrize(
    ("made", "kinds"),
    [
        (rollout(*CLOSED), []),
        (rollout(TEXT, EOS), ["without_latents"]),
        (rollout(EOS), ["without_latents", "empty"]),
        (rollout(), ["without_latents", "empty", "truncated"]),
        (rollout(TEXT, START, SLOT), ["unclosed", "truncated"]),
        (rollout(TEXT, START), ["without_latents", "unclosed", "truncated"]),
        (rollout(*CLOSED[:-1]), ["truncated"]),
        (rollout(TEXT, EOS, prompt=CLOSED[:-1]), ["without_latents"]),  # latents of the prompt are not its own
    ],
)
def test_kinds(made: Rollout, kinds: list[str]) -> None:
    assert kinds_of(made, MARKERS) == kinds


def test_rules_are_those_of_the_recipe() -> None:
    batch = [rollout(*CLOSED), rollout(EOS), rollout(TEXT, START, SLOT), rollout(TEXT, EOS)]
    kinds, excluded, problem = sort_rollouts(batch, MARKERS, rules_of(None))
    assert excluded == [False, True, True, False]
    assert [sum(kind in row for row in kinds) for kind in RULES] == [2, 1, 1, 1]
    assert problem is None
    _, excluded, _ = sort_rollouts(batch, MARKERS, rules_of('{"empty": "keep", "unclosed": "keep"}'))
    assert excluded == [False] * 4
    *_, problem = sort_rollouts(batch, MARKERS, rules_of({"truncated": "stop"}))
    assert problem == "completion 2 is truncated, and on_rollout says stop for 1 of 4 completions"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"emty": "keep"}, "on_rollout holds 'emty'; choose from without_latents"),
        ({"empty": "drop"}, "on_rollout of empty is 'drop'; choose keep, exclude, stop"),
        ("empty=keep", "write it as JSON"),
        ("[1]", "it must be a mapping"),
    ],
)
def test_wrong_rules_are_refused(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        rules_of(given)


def test_a_call_is_asked_again_as_often_as_it_may() -> None:
    calls: list[int] = []

    def flaky() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("gone")
        return "here"

    assert agreed("the engine failed", flaky, retries=2, pause=0.0) == "here"
    assert len(calls) == 3
    calls.clear()
    with pytest.raises(Fault, match=r"^the engine failed: ConnectionError: gone\.$") as caught:
        agreed("the engine failed", flaky, retries=1, pause=0.0)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert caught.value.exit_code == 1
    assert UserError("x").exit_code == 2
    with pytest.raises(Fault, match=r"^the engine failed: it said no\.$"):
        agreed("the engine failed", lambda: (_ for _ in ()).throw(UserError("it said no.")))


def asked_by_two(rank: int, port: int, place: Path, results: Any) -> None:
    """A process of two. The call is collective, and the first one fails in process 1 when it is over."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    PartialState._reset_state()
    AcceleratorState._reset_state(True)
    Accelerator(cpu=True)
    calls: list[int] = []

    def collective() -> int:
        calls.append(rank)
        total = torch.tensor([10 ** len(calls)])
        torch.distributed.all_reduce(total)
        if rank == 1 and len(calls) == 1:
            raise ConnectionError("gone")
        return int(total)

    def hold() -> None:
        with run_held(str(place), "another run"):
            raise AssertionError("the test holds it")

    def full() -> None:
        raise OSError("the disk is full")

    results.put((rank, agreed("the engine failed", collective, retries=1, pause=0.0), len(calls)))
    with pytest.raises(UserError, match="is in use"):
        hold()
    with pytest.raises(UserError if rank else OSError, match="the disk is full"):
        from_first(full)
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
def test_all_processes_ask_again_where_one_has_to(tmp_path: Path) -> None:
    """An engine that takes over weights under ZeRO-3 gathers them: who asks alone waits for the others.

    A folder that another run holds, and any other failure of the main process, also stops them together.
    """
    forked = torch.multiprocessing.get_context("fork")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    results = forked.SimpleQueue()
    processes = [forked.Process(target=asked_by_two, args=(rank, port, tmp_path, results)) for rank in range(2)]
    held = folder_held(tmp_path, "the test")
    held.__enter__()
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        held.__exit__(None, None, None)
        for process in processes:
            process.kill()
    assert sorted(results.get() for _ in range(2)) == [(0, 200, 2), (1, 200, 2)]


def test_a_call_that_returns_none_succeeded() -> None:
    assert agreed("the engine failed", lambda: None) is None


def test_agreeing_on_nothing_is_silent() -> None:
    agree(None)
    with pytest.raises(Fault, match=r"^a problem\.$"):
        agree("a problem")


def test_errors_of_rewards_wait(caplog: pytest.LogCaptureFixture) -> None:
    errors: list[Exception] = []

    def plain(completions: list[str]) -> list[float]:
        return [1 / len(text) for text in completions]

    async def slow(completions: list[str]) -> list[float]:
        return plain(completions)

    assert watched(plain, errors)(completions=["ab"]) == [0.5]
    assert asyncio.run(watched(slow, errors)(completions=["ab"])) == [0.5]
    assert not errors
    assert watched(plain, errors)(completions=["ab", ""]) == [None, None]
    assert asyncio.run(watched(slow, errors)(completions=[""])) == [None]
    assert [type(error) for error in errors] == [ZeroDivisionError] * 2
    assert watched(plain, errors).__name__ == "plain"


def test_idle_batches_are_counted_in_a_row(caplog: pytest.LogCaptureFixture) -> None:
    idle = Idle(3)
    for learns in (False, False, True, False, False):
        idle.note(learns)
    assert idle.count == 2
    assert len(caplog.records) == 1
    with pytest.raises(Fault, match="in 3 generation batches in a row"):
        idle.note(False)
    endless = Idle(None)
    for _ in range(50):
        endless.note(False)


def test_a_model_that_opens_no_span_is_named_once() -> None:
    never = Unopened()
    said = [never.note(0.0) for _ in range(5)]
    assert [bool(sentence) for sentence in said] == [False, True, False, False, False]
    assert "never starts a latent span: latent/rate was 0 in 2 generation batches" in str(said[1])
    later = Unopened()
    said = [later.note(rate) for rate in (0.0, 0.5, 0.0, 0.1, 0.0, 0.0, 0.0)]
    assert [bool(sentence) for sentence in said] == [False] * 5 + [True, False]
    assert "no longer starts" in str(said[5])
