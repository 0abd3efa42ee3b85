"""Every fault of a reward, stopped by default and excluded where that is asked for."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import sys
import threading
import time

import numpy as np
import pytest
import torch

from rewards.accuracy import accuracy
from rl_lvr.errors import UserError
from rl_lvr.training.rewards.call import RewardError, guard

ROWS = ["good", "bad", "good"]


def call(function, *, on_error="stop", timeout=30.0, signals=(), rows=ROWS, **columns):
    """The guarded reward on three rows, synchronous or not, and the metrics that it logged."""
    metrics: dict[str, float] = {}
    guarded = guard(function, "mine", signals=signals, on_error=on_error, timeout=timeout)
    columns = {"completions": rows, "log_metric": metrics.__setitem__, "trainer_state": None, **columns}
    scores = guarded(**columns)
    return (asyncio.run(scores) if inspect.iscoroutine(scores) else scores), metrics


def per_sample(value):
    return lambda completions, **_: [value if c == "bad" else 1.0 for c in completions]


def raising(completions, **_):
    if "bad" in completions:
        raise ValueError("no such word")
    return [1.0] * len(completions)


BAD_VALUES = [float("nan"), float("inf"), "1.0", [1.0], torch.tensor([1.0, 2.0]), object()]


@pytest.mark.parametrize("value", BAD_VALUES, ids=[type(v).__name__ + str(i) for i, v in enumerate(BAD_VALUES)])
def test_a_bad_value_names_its_sample_or_is_excluded_alone(value) -> None:
    with pytest.raises(RewardError, match=r"reward 'mine' returned .* on sample 1 of the batch: fix it") as caught:
        call(per_sample(value))
    assert (caught.value.reward, caught.value.sample) == ("mine", 1)
    assert call(per_sample(value), on_error="exclude") == ([1, None, 1], {"rewards/mine/excluded": 1})


@pytest.mark.parametrize("value", [0, True, 2.5, np.float32(2.5), np.int64(2), torch.tensor(2.5), None])
def test_numbers_of_every_kind_are_taken(value) -> None:
    scores, metrics = call(per_sample(value))
    assert scores == [1, None if value is None else float(value), 1]
    assert scores[1] is None or type(scores[1]) is float
    assert metrics == {}  # nothing to count where nothing is excluded
    assert call(per_sample(value), on_error="exclude")[1] == {"rewards/mine/excluded": 0}


@pytest.mark.parametrize("output", [torch.ones(3), np.ones(3), (1, 1, 1)])
def test_vectors_are_taken(output) -> None:
    assert call(lambda completions, **_: output)[0] == [1, 1, 1]


def test_a_sample_that_raises_is_found_by_calling_it_alone() -> None:
    with pytest.raises(
        RewardError, match=r"raised ValueError \(no such word\) at test_rewards_guard.py:\d+ on sample 1 of"
    ):
        call(raising)
    assert call(raising, on_error="exclude") == ([1, None, 1], {"rewards/mine/excluded": 1})


def test_what_a_reward_logs_of_a_part_of_the_batch_is_dropped() -> None:
    logged = []

    def logging(completions, log_extra, **_):
        log_extra("column", [len(c) for c in completions])
        return raising(completions)

    call(logging, on_error="exclude", log_extra=lambda name, values: logged.append(values))
    assert logged == [[4, 3, 4]]


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda completions, **_: 1 / 0, "raised ZeroDivisionError"),
        (lambda completions, **_: sys.exit(0), r"raised RuntimeError \(it asked to exit, SystemExit\(0\)\)"),
        (lambda completions, **_: [1.0], "returned 1 values for 3 completions"),
        (lambda completions, **_: [], "returned 0 values for 3 completions"),
        (lambda completions, **_: 1.0, "returned a float"),
        (lambda completions, **_: None, "returned a NoneType"),
        (lambda completions, **_: dict.fromkeys(range(3)), "returned a dict"),
        (lambda completions, **_: (c for c in completions), "returned a generator"),
        (lambda completions, **_: asyncio.sleep(0), "returned a coroutine"),
    ],
)
def test_where_no_sample_can_be_blamed_the_batch_is(function, problem) -> None:
    with pytest.raises(RewardError, match=problem) as caught:
        call(function)
    assert caught.value.sample is None
    assert call(function, on_error="exclude") == ([None] * 3, {"rewards/mine/excluded": 3})


def test_a_group_reward_is_called_again_with_the_others_and_not_row_by_row() -> None:
    def rank(completions, **_):
        if "bad" in completions:
            raise ValueError
        return list(range(len(completions)))

    assert call(rank, on_error="exclude", rows=["a", "bad", "b", "c"])[0] == [0, None, 1, 2]


@pytest.mark.parametrize("on_error", ["stop", "exclude"])
def test_a_reward_that_hangs_is_left_behind(on_error) -> None:
    release = threading.Event()

    def hanging(completions, **_):
        release.wait(60)
        return [1.0] * len(completions)

    began = time.perf_counter()
    if on_error == "stop":
        with pytest.raises(RewardError, match=r"did not end within 0.3 s"):
            call(hanging, timeout=0.3)
    else:
        assert call(hanging, timeout=0.3, on_error="exclude")[0] == [None] * 3
    assert time.perf_counter() - began < 20
    release.set()


def test_the_line_that_raised_is_named() -> None:
    def deep(completions, **_):
        return [json.loads(text) for text in completions]

    def strange(completions, **_):
        return wraps(completions)

    def uncallable(completions, *, option=1):
        return completions / option

    wraps = functools.partial(np.linalg.inv)
    line = deep.__code__.co_firstlineno + 1
    # The deepest line of the reward's own file, and not json's.
    with pytest.raises(RewardError, match=rf"raised JSONDecodeError \(.*\) at test_rewards_guard.py:{line}[: ]"):
        call(deep)
    for reward in (strange, uncallable):
        line = reward.__code__.co_firstlineno + 1
        with pytest.raises(RewardError, match=rf"at test_rewards_guard.py:{line}[: ]"):
            call(reward)

    def picky(completions, /, **_):
        return completions

    with pytest.raises(RewardError, match=r"raised TypeError \(.*picky\(\).*\)(?! at guard.py)"):
        call(picky)


def test_a_timeout_of_its_own_is_not_a_hang() -> None:
    def timing_out(completions, **_):
        raise TimeoutError("the disk")

    with pytest.raises(RewardError, match=r"raised TimeoutError \(the disk\)"):
        call(timing_out)


def test_async_rewards() -> None:
    calls = []

    async def good(completions, **_):
        calls.append(asyncio.get_running_loop())
        await asyncio.sleep(0.01)
        return [1.0] * len(completions)

    async def bad(completions, **_):
        calls.append(None)
        raise ValueError("down")

    guarded = guard(good, "mine", timeout=30)
    assert inspect.iscoroutinefunction(guarded)

    async def both():
        return await asyncio.gather(guarded(completions=ROWS), guarded(completions=ROWS))

    assert asyncio.run(both()) == [[1, 1, 1]] * 2
    asyncio.run(guarded(completions=ROWS))
    assert len(calls) == 3
    assert len(set(calls)) == 1  # one event loop for all calls: clients belong to one

    calls.clear()
    with pytest.raises(RewardError, match=r"raised ValueError \(down\) at test_rewards_guard.py:\d+: fix it"):
        call(bad)
    assert len(calls) == 1  # not called again for each row
    assert call(bad, on_error="exclude")[0] == [None] * 3


@pytest.mark.parametrize("blocking", [True, False])
def test_an_async_reward_that_hangs_does_not_hang_the_next_call(blocking) -> None:
    release, hang = threading.Event(), [True]

    async def reward(completions, **_):
        if hang[0]:
            if blocking:
                release.wait(60)
            await asyncio.sleep(60)
        return [1.0] * len(completions)

    guarded = guard(reward, "mine", timeout=0.5)
    with pytest.raises(RewardError, match="did not end within"):
        asyncio.run(guarded(completions=ROWS))
    hang[0] = False
    assert asyncio.run(guarded(completions=ROWS)) == [1, 1, 1]
    release.set()


def test_callable_objects_keep_being_async() -> None:
    class Reward:
        async def __call__(self, completions, **_):
            return [2.0] * len(completions)

    assert inspect.iscoroutinefunction(guard(Reward(), "mine"))
    assert call(Reward())[0] == [2, 2, 2]


def test_only_what_the_reward_takes_is_passed() -> None:
    def narrow(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    assert call(narrow, answer=ROWS, meta=[1, 2, 3])[0] == [1, 1, 1]


def test_a_column_never_overwrites_an_option() -> None:
    def reward(completions, *, kind="option", **_):
        return [float(kind == "option")] * len(completions)

    assert call(reward, kind=["column"] * 3)[0] == [1, 1, 1]


def test_a_signal_behind_the_star_is_no_option() -> None:
    def reward(completions, *, mass=None, **_):
        return mass

    assert call(reward, mass=[1, 2, 3], signals=["mass"])[0] == [1, 2, 3]
    with pytest.raises(UserError, match="needs the signal 'mass', which was not measured"):
        call(reward, signals=["mass"])


@pytest.mark.parametrize("on_error", ["stop", "exclude"])
def test_a_missing_column_is_never_a_samples_fault(on_error) -> None:
    def reward(completions, answer):
        return [1.0] * len(completions)

    with pytest.raises(UserError, match=r"needs 'answer': the data has no such column \(it has meta\)"):
        call(reward, on_error=on_error, meta=[1, 2, 3])


def test_the_thread_inherits_what_torch_keeps_per_thread() -> None:
    seen = []

    def reward(completions, **_):
        seen.append(torch.is_grad_enabled())
        return [1.0] * len(completions)

    with torch.no_grad():
        call(reward)
    call(reward)
    assert seen == [False, True]


@pytest.mark.parametrize("leaves", [SystemExit(0), GeneratorExit(), KeyboardInterrupt()])
def test_an_async_reward_that_asks_to_exit_is_an_error(leaves: BaseException) -> None:
    calls = []

    async def reward(completions, **_):
        calls.append(1)
        if len(calls) == 1:
            raise leaves
        return [1.0] * len(completions)

    guarded = guard(reward, "mine", timeout=10.0)
    columns = {"completions": ROWS, "trainer_state": None}
    with pytest.raises(RewardError, match=f"it asked to exit, {type(leaves).__name__}"):
        asyncio.run(guarded(**columns))
    assert asyncio.run(guarded(**columns)) == [1, 1, 1]  # its loop has survived


def test_a_reward_learns_its_own_label() -> None:
    logged: dict[str, float] = {}
    columns = {"completions": ["B", "I don't know"], "answer": ["B", "B"], "log_metric": logged.__setitem__}
    assert guard(accuracy, "letters")(**columns) == [1, 0]
    assert logged == {"rewards/letters/unreadable": 0.5}
