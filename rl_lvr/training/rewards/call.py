"""One call of a reward, with everything that can go wrong in it: it raises, hangs, or returns what is no reward.

`stop` (the default) is a `RewardError` that names the reward and the sample. `exclude` leaves out what is at fault: the
samples whose values are bad, the samples for which it raises when called with them alone (an async reward is not called
again: it may cost money), or, where no sample can be blamed (it hangs, returns another type or another number of
values), the whole batch of this reward. Left out is None, TRL's "not scored"; `rewards/NAME/excluded` counts it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import inspect
import logging
import math
import numbers
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from rl_lvr.answers import text_of
from rl_lvr.errors import Fault, UserError
from rl_lvr.training.rewards.isolating import isolated
from rl_lvr.training.rewards.options import FROM_TRAINER, signal_names, taken

OnError = Literal["stop", "exclude"]
Scores = list[float | None]
_log = logging.getLogger(__name__)


class RewardError(Fault):
    """A reward failed; `sample` is the index in the batch, None where no single sample can be blamed."""

    def __init__(self, reward: str, problem: str, sample: int | None = None) -> None:
        at = "" if sample is None else f" on sample {sample} of the batch"
        super().__init__(
            f"reward {reward!r} {problem}{at}: fix it, or set on_error: exclude to leave such samples out."
        )
        self.reward, self.sample = reward, sample


class _HangError(Exception):
    """The call did not end in time."""


class _FaultError(Exception):
    """No single sample can be blamed."""


def guard(
    reward: Callable[..., Any],
    name: str,
    *,
    signals: Sequence[Any] = (),
    on_error: OnError = "stop",
    timeout: float | None = None,
) -> Callable[..., Any]:
    """`reward` with the signature of TRL, called `name`, that keeps to the rules above; async if `reward` is.

    Columns that the reward does not take are kept from it, and so are columns that would overwrite an option. Each call
    gets copies (`isolating.py`), so a reward that changes its arguments changes nobody else's. It runs in a thread of
    its own, since nothing else can be left behind when it hangs.
    """
    call = _Guarded(reward, name, signals, on_error, timeout)
    if call.is_async:

        async def guarded_async(**columns: Any) -> Scores:
            return await asyncio.to_thread(call, columns)

        return _named(guarded_async, name, reward)

    def guarded(**columns: Any) -> Scores:
        return call(columns)

    return _named(guarded, name, reward)


def _named(guarded: Any, name: str, reward: Callable[..., Any]) -> Callable[..., Any]:
    guarded.__name__ = guarded.__qualname__ = name
    guarded.guarded_reward = reward
    return cast("Callable[..., Any]", guarded)


def watched(reward: Callable[..., Any], errors: list[Exception]) -> Callable[..., Any]:
    """A reward whose exceptions wait in `errors` until all processes can agree on them.

    It is given its own copies of its arguments, unless a guard around it sees to that.
    """
    own = dict if hasattr(reward, "guarded_reward") else isolated
    named = functools.wraps(reward)

    def failed(error: Exception, columns: dict[str, Any]) -> list[None]:
        errors.append(error)
        return [None] * len(columns["completions"])

    if _is_async(reward):

        @named
        async def call_async(**columns: Any) -> Any:
            try:
                return await reward(**own(columns))
            except Exception as error:  # noqa: BLE001, raised again by the trainer
                return failed(error, columns)

        return call_async

    @named
    def call(**columns: Any) -> Any:
        try:
            return reward(**own(columns))
        except Exception as error:  # noqa: BLE001, raised again by the trainer
            return failed(error, columns)

    return call


class _Guarded:
    def __init__(
        self, reward: Callable[..., Any], name: str, signals: Sequence[Any], on_error: OnError, timeout: float | None
    ) -> None:
        self.reward, self.name, self.on_error, self.timeout = reward, name, on_error, timeout
        self.signals = signal_names(signals)
        bare = getattr(reward, "func", reward)  # of functools.partial
        self.is_async = _is_async(bare)
        code = getattr(bare, "__code__", None) or getattr(getattr(bare, "__call__", None), "__code__", None)  # noqa: B004
        self.file = None if code is None else code.co_filename
        self.taken = taken(reward, self.signals)
        self.loop = _Loop(name) if self.is_async else None

    def __call__(self, columns: dict[str, Any]) -> Scores:
        rows = len(columns["completions"])
        arguments = self._arguments(columns)
        try:
            scores, problems = self._scores(arguments, rows, range(rows))
        except (_HangError, _FaultError) as error:
            scores, problems = [None] * rows, {row: str(error) for row in range(rows)}
            if self.on_error == "stop":
                raise RewardError(self.name, str(error)) from error.__cause__
        if problems:
            sample, problem = next(iter(problems.items()))
            if self.on_error == "stop":
                raise RewardError(self.name, problem, sample)
            _log.warning(
                "reward %r: %d of %d samples excluded; sample %d: it %s",
                self.name,
                len(problems),
                rows,
                sample,
                problem,
            )
        log_metric = columns.get("log_metric")
        if self.on_error == "exclude" and log_metric is not None:
            log_metric(f"rewards/{self.name}/excluded", float(len(problems)))
        return scores

    def _arguments(self, columns: dict[str, Any]) -> dict[str, Any]:
        """What the reward is called with. A column that is missing is the recipe's fault, and not a sample's."""
        columns = {**columns, "reward_name": self.name}
        lacking = sorted(self.signals - set(columns))
        if lacking:
            raise UserError(
                f"reward {self.name!r} needs the signal {lacking[0]!r}, which was not measured: a run measures and "
                "records the signals of its own rewards."
            )
        if "texts" not in columns:  # a trainer that makes none has no spans either
            columns = {**columns, "texts": [text_of(completion) for completion in columns["completions"]]}
        known, everything = self.taken.names, self.taken.everything
        arguments = {
            name: value
            for name, value in columns.items()
            if name in known or (everything and name not in self.taken.options)
        }
        missing = [name for name in self.taken.needed if name not in arguments]
        if missing:
            raise UserError(
                f"reward {self.name!r} needs {missing[0]!r}: the data has no such column "
                f"(it has {', '.join(sorted(set(columns) - FROM_TRAINER)) or 'none'}), and the recipe no such option."
            )
        return arguments

    def _scores(self, arguments: dict[str, Any], rows: int, kept: Sequence[int]) -> tuple[Scores, dict[int, str]]:
        """Scores of all rows, and what is wrong with which; only the rows `kept` are passed to the reward."""
        whole = len(kept) == rows
        try:
            output = self._run(arguments if whole else _select(arguments, kept, rows))
        except _HangError:
            raise
        except Exception as error:
            problem = self._raised(error)
            blamed = self._blame(arguments, rows) if whole and not self.is_async else {}
            if not blamed or len(blamed) == rows > 1:
                raise _FaultError(problem) from error
            if self.on_error == "stop" or rows == 1:
                return [None] * rows, blamed
            scores, problems = self._scores(arguments, rows, [row for row in range(rows) if row not in blamed])
            return scores, blamed | problems
        scores = [None] * rows
        problems = {}
        for row, value in zip(kept, self._values(output, len(kept)), strict=True):
            try:
                scores[row] = _number(value)
            except ValueError as error:
                problems[row] = str(error)
        return scores, problems

    def _blame(self, arguments: dict[str, Any], rows: int) -> dict[int, str]:
        """The rows for which the reward raises when it is called with them alone."""
        blamed: dict[int, str] = {}
        for row in range(rows):
            try:
                self._run(_select(arguments, [row], rows))
            except _HangError:
                raise
            except Exception as error:  # noqa: BLE001, a user's function may raise anything
                blamed[row] = self._raised(error)
        return blamed

    def _raised(self, error: Exception) -> str:
        """What it raised, and at which of its lines; the deepest, if none is in the reward's own file."""
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == self.file] or frames
        known = own and own[-1].filename != __file__  # else it could not even be called
        at = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if known else ""
        return f"raised {type(error).__name__} ({error}){at}"

    def _values(self, output: Any, rows: int) -> Sequence[Any]:
        if hasattr(output, "tolist"):  # a tensor or an array
            output = output.tolist()
        if inspect.iscoroutine(output):
            output.close()
            raise _FaultError("returned a coroutine; declare it with async def")
        if not isinstance(output, list | tuple):
            raise _FaultError(
                f"returned a {type(output).__name__}; it must return a list with one number per completion"
            )
        if len(output) != rows:
            raise _FaultError(f"returned {len(output)} values for {rows} completions")
        return output

    def _run(self, arguments: dict[str, Any]) -> Any:
        """The reward's own result or exception, or `_HangError`."""
        own = isolated(arguments)
        done = self.loop.start(self.reward, own) if self.loop else _in_thread(self.name, self.reward, own)
        # Not result(timeout): a TimeoutError may as well be the reward's own.
        if not concurrent.futures.wait([done], self.timeout).done:
            done.cancel()
            if self.loop:
                self.loop = _Loop(self.name)  # the old one may be blocked
            raise _HangError(f"did not end within {self.timeout:g} s")
        return done.result()


def _is_async(reward: Callable[..., Any]) -> bool:
    call = getattr(reward, "__call__", None)  # noqa: B004, not whether it can be called but whether that is async
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(call)


class _Loop:
    """An event loop in a thread of its own, the same for every call: clients and sessions belong to one loop."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting = threading.Lock()

    def start(self, reward: Callable[..., Any], arguments: dict[str, Any]) -> concurrent.futures.Future[Any]:
        with self._starting:  # calls that run side by side share one loop
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name=f"reward {self._name}", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(_without_exit(reward, arguments), self._loop)


async def _without_exit(reward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """asyncio would pass `sys.exit` on, which ends the loop and, where the result is asked for, the training."""
    try:
        return await reward(**arguments)
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as error:
        raise RuntimeError(f"it asked to exit, {error!r}") from error


def _in_thread(name: str, reward: Callable[..., Any], arguments: dict[str, Any]) -> concurrent.futures.Future[Any]:
    """A daemon thread: one that hangs must not keep the process from ending."""
    done: concurrent.futures.Future[Any] = concurrent.futures.Future()
    context = contextvars.copy_context()
    torch = sys.modules.get("torch")
    gradients = torch is not None and torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch is not None and torch.cuda.is_initialized() else None

    def work() -> None:
        try:
            if torch is not None:  # both are kept per thread
                torch.set_grad_enabled(gradients)
                if device is not None:
                    torch.cuda.set_device(device)
            result = context.run(reward, **arguments)
        except BaseException as error:  # noqa: BLE001, it is raised where the result is asked for
            if done.set_running_or_notify_cancel():  # else nobody waits any more
                ends = not isinstance(error, Exception)  # sys.exit in a reward must not end the training
                done.set_exception(RuntimeError(f"it asked to exit, {error!r}") if ends else error)
        else:
            if done.set_running_or_notify_cancel():
                done.set_result(result)

    threading.Thread(target=work, name=f"reward {name}", daemon=True).start()
    return done


def _select(arguments: dict[str, Any], kept: Sequence[int], rows: int) -> dict[str, Any]:
    """The arguments of some rows. What is logged from a part of a batch would stand beside the wrong rows."""
    silent: dict[str, Any] = {name: lambda *_: None for name in ("log_extra", "log_metric") if name in arguments}
    selected = {
        name: [value[row] for row in kept] if isinstance(value, list | tuple) and len(value) == rows else value
        for name, value in arguments.items()
    }
    return selected | silent


def _number(value: Any) -> float | None:
    """A finite number; None is a reward's own "not scored"."""
    if value is None:
        return None
    if hasattr(value, "item") and not isinstance(value, numbers.Real):
        try:
            value = value.item()  # a tensor or an array of one element
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"returned {value!r:.60}, which is not one number,") from error
    if not isinstance(value, numbers.Real):
        raise ValueError(f"returned {value!r:.60} of type {type(value).__name__}, no number,")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"returned {number}")
    return number
