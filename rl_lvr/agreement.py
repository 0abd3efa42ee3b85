"""What the processes of a run decide together. All of them call these functions at the same place, in the same order.

A fault that ends a run must be found by all processes at the same place: one that waits for the others in a collective
operation would wait forever. Without a process group, each function answers for the one process there is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from rl_lvr.errors import Fault, UserError

_LONGEST_PAUSE = 30.0
_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


def processes() -> int:
    """Return how many there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _device() -> torch.device:
    """Of tensors that are sent: NCCL takes a GPU's alone."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if distributed.get_backend() == "nccl"
        else torch.device("cpu")
    )


def from_all(value: Any) -> list[Any]:
    """Return the value of every process, by rank. It is pickled."""
    if processes() == 1:
        return [value]
    values: list[Any] = [None] * processes()
    distributed.all_gather_object(values, value)
    return values


def from_first(ask: Callable[[], _Result]) -> _Result:
    """Return what `ask` answers in the first process, or raise what it raises there (a `UserError` in the others).

    One process reads the disk, and all go on with the same answer.
    """
    PartialState()  # joins the group, where a launcher made one
    if processes() == 1:
        return ask()
    answer: list[Any] = [None, None]
    raised: Exception | None = None
    if distributed.get_rank() == 0:
        try:
            answer = [ask(), None]
        except Exception as error:  # noqa: BLE001, raised again below
            raised, answer = error, [None, str(error)]
    distributed.broadcast_object_list(answer, src=0)
    if raised is not None:
        raise raised
    value, refusal = answer
    if refusal is not None:
        raise UserError(refusal)
    found: _Result = value
    return found


def largest(*values: int) -> list[int]:
    """Return the largest of each of `values` among all processes, which give equally many."""
    if processes() == 1:
        return list(values)
    most = torch.tensor(values, device=_device())
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    found: list[int] = most.tolist()
    return found


def concatenated(part: Tensor) -> Tensor:
    """Return the parts [B, ...] of all processes, which have one shape, one after the other."""
    if processes() == 1:
        return part
    sent = part.to(_device()).contiguous()
    parts = [torch.empty_like(sent) for _ in range(processes())]
    distributed.all_gather(parts, sent)
    return torch.cat(parts).to(part.device)


def mean_of_all(total: float, count: int) -> float | None:
    """Return a mean over all processes; None where nothing was counted."""
    totals, counts = concatenated(torch.tensor([[total, count]], dtype=torch.float32)).sum(0).tolist()
    return totals / counts if counts else None


def agree(problem: str | None, error: BaseException | None = None) -> None:
    """Raise `Fault` in every process if any of them has a problem."""
    if not largest(problem is not None)[0]:
        return
    problems = from_all(problem)
    rank, first = next((rank, text) for rank, text in enumerate(problems) if text is not None)
    where = "" if len(problems) == 1 else f"process {rank}: "
    raise Fault(f"{where}{first}.") from error


def agreed(what: str, call: Callable[[], _Result], *, retries: int = 0, pause: float = 1.0) -> _Result:
    """Return the result of `call` once it has succeeded in every process; raise `Fault` in all where it did not.

    All ask again where one has to: under ZeRO-3 an engine that takes over weights, as one does that wakes up to
    generate, gathers them from all processes.
    """
    result: list[_Result] = []
    error: Exception | None = None
    for attempt in range(retries + 1):
        try:
            result, error = [call()], None
        except Exception as raised:  # noqa: BLE001, an engine may raise anything
            error = raised
        if not largest(error is not None)[0]:
            return result[0]
        if attempt < retries:
            if error is not None:
                _log.warning("%s (%s); asked again, %d of %d", what, _said(error), attempt + 1, retries)
            time.sleep(min(pause * 2**attempt, _LONGEST_PAUSE))
    agree(None if error is None else f"{what}: {_said(error)}", error)
    raise AssertionError("agree raises where a process failed")


def _said(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if isinstance(error, UserError) else f"{type(error).__name__}{f': {text}' if text else ''}"
