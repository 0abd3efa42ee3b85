"""Host-side memory of a worker: which requests run, what the preempted need to go on, what waits to be fetched.

Nothing is kept for a request that has ended, unless it named a uid: then until that uid is popped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl_lvr.rollout.vllm.slots import FED, SlotTables


@dataclass
class Live:
    """A request that holds a slot."""

    slot: int
    uid: str | None
    """None once it is popped: vLLM's workers learn of a request's end only with the next step."""
    prompt: int
    """Tokens of its prompt."""
    tokens: int
    """Tokens that it can have at most, prompt included."""
    latents: int
    """Latents that it can generate at most."""
    error: str | None = None
    distorted: bool = False
    """Its sampling settings are of those that `Uncut` tells about."""


@dataclass
class Parked:
    """What a request leaves behind in its slot, on its way to the host."""

    uid: str | None
    prompt: int
    vectors: Tensor
    """[rows, H], with room behind the last latent."""
    marks: Tensor
    """[positions] int8."""
    uncut: Tensor | None
    """[positions, 2] float32, of a distorted request."""
    broken: Tensor
    error: str | None
    ready: Any
    """A CUDA event behind the copies; None on the CPU."""
    trimmed: bool = False

    def wait(self) -> None:
        if self.ready is not None:
            self.ready.synchronize()
            self.ready = None

    def trim(self) -> None:
        """Give back the room behind the last latent, once the copies are there."""
        if self.trimmed or (self.ready is not None and not self.ready.query()):
            return
        self.ready = None
        self.vectors = self.vectors[: int((self.marks[self.prompt :] & FED).ne(0).sum())].clone()
        self.trimmed = True


@dataclass(frozen=True)
class Latents:
    """What is fetched for one completion, as it travels: bytes, because arrays turn into lists on the way."""

    request_id: str
    """vLLM's own. The completions of one request with n > 1 are "0_...", "1_...", and so on."""
    prompt: int
    vectors: bytes
    """[n, H] in the model's precision, the latents of the completion in order."""
    marks: bytes
    """int8 by absolute position: kind, forced, fed (`slots.KIND`, `FORCED`, `FED`). Tokens that vLLM dropped at the
    end may be in here too."""
    uncut: bytes
    """float32 [tokens, 2] from the first token of the completion on (`slots.SlotTables.uncut`); empty unless the
    request's sampling settings distort its distribution."""
    error: str | None

    def as_row(self) -> list[Any]:
        return [self.request_id, self.prompt, self.vectors, self.marks, self.uncut, self.error]


class History:
    """The requests of one worker by vLLM's request id."""

    def __init__(self, tables: SlotTables, overflow: str) -> None:
        self._tables, self._overflow = tables, overflow
        self.live: dict[str, Live] = {}
        self.preempted: dict[str, Parked] = {}
        self.finished: dict[str, Parked] = {}

    def remove(self, request_id: str, *, preempted: bool) -> None:
        """A request leaves its slot, or has left it before and now ends."""
        for left in self.finished.values():
            left.trim()
        live = self.live.pop(request_id, None)
        if live is not None and preempted:
            self.preempted[request_id] = self._park(live)
        elif live is not None and live.uid is not None:
            self.finished[request_id] = self._park(live)
        elif live is None and not preempted:
            parked = self.preempted.pop(request_id, None)
            if parked is not None and parked.uid is not None:
                self.finished[request_id] = parked

    def pop(self, uids: list[str]) -> dict[str, list[Latents]]:
        """The latents of these uids, given out once: afterwards a request has no uid. Those of one uid are in order."""
        found: dict[str, list[Latents]] = {uid: [] for uid in uids}
        for request_id, live in self.live.items():
            if live.uid in found:
                found[live.uid].append(self._export(request_id, self._park(live)))
                live.uid = None
        for request_id, left in [*self.finished.items(), *self.preempted.items()]:
            if left.uid in found:
                found[left.uid].append(self._export(request_id, left))
                left.uid = None
        self.finished = {key: left for key, left in self.finished.items() if left.uid is not None}
        return {uid: sorted(rows, key=lambda row: _completion(row.request_id)) for uid, rows in found.items()}

    def counts(self) -> dict[str, int]:
        """How many requests each table still owes to somebody."""
        return {
            "live": sum(live.uid is not None for live in self.live.values()),
            "preempted": len(self.preempted),
            "finished": len(self.finished),
        }

    def _park(self, live: Live) -> Parked:
        tables, slot = self._tables, live.slot
        sources = (tables.history[slot, : live.latents], tables.marks[slot, : live.tokens], tables.broken[slot])
        vectors, marks, broken = (_to_host(source) for source in sources)
        uncut = _to_host(tables.uncut[slot, : live.tokens]) if live.distorted else None
        ready = None
        if vectors.is_pinned():
            ready = torch.cuda.Event()
            ready.record()
        return Parked(live.uid, live.prompt, vectors, marks, uncut, broken, live.error, ready)

    def _export(self, request_id: str, parked: Parked) -> Latents:
        parked.wait()
        marks = parked.marks.clone()
        marks[: parked.prompt] = 0
        fed = int((marks & FED).ne(0).sum())
        error = parked.error or (self._overflow if bool(parked.broken) else None)
        vectors = parked.vectors[:fed].contiguous().view(torch.uint8).numpy().tobytes()
        uncut = b"" if parked.uncut is None else parked.uncut[parked.prompt :].numpy().tobytes()
        return Latents(request_id, parked.prompt, vectors, marks.numpy().tobytes(), uncut, error)


def _to_host(source: Tensor) -> Tensor:
    """A copy on the host; from a GPU it is under way when this returns."""
    if source.is_cuda:
        target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        return target.copy_(source, non_blocking=True)
    return source.clone()


def _completion(request_id: str) -> int:
    """Which completion of its request: vLLM writes "3_..." for the fourth of several, no number for a single one."""
    number, _, rest = request_id.partition("_")
    return int(number) if rest and number.isdigit() else 0
