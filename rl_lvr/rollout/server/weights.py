"""A trainer's weights on their way to a server: files in a folder that both see. One process of the trainer writes."""

from __future__ import annotations

import math
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from rl_lvr.agreement import agree, processes
from rl_lvr.errors import UserError
from rl_lvr.rollout.vllm.weights import Receipt, checkpoint_weights, take_part, write_files


@contextmanager
def written(model: nn.Module, dtype: torch.dtype, shared: Path) -> Iterator[tuple[str, Receipt]]:
    """The name of a folder in `shared` that holds the weights, whole from its first moment and gone afterwards.

    `dtype` is the server's precision.
    """
    name = uuid.uuid4().hex
    unfinished, finished = shared / f".{name}", shared / name
    sent = Receipt()
    named = checkpoint_weights(model, dtype, sent)
    try:
        unfinished.mkdir()
        write_files(named, unfinished)
        if not math.isfinite(sent.checksum):
            raise UserError("the model's weights are not all finite numbers: nothing can be generated with them.")
        unfinished.rename(finished)
        yield name, sent
    finally:
        for _ in named:  # under ZeRO-3 the other ranks wait for this one, also when its disk is full
            pass
        for path in (unfinished, finished):
            if path.exists():
                shutil.rmtree(path)


def by_the_first(call: Callable[[], None], model: nn.Module) -> None:
    """`call` in the first process of a trainer, which reads all weights of `model`; the others wait, and fail with it.

    Under ZeRO-3 the others take part in gathering the weights.
    """
    error: Exception | None = None
    try:
        if processes() == 1 or dist.get_rank() == 0:
            call()
        else:
            take_part(model)
    except Exception as raised:  # noqa: BLE001, raised again below
        error = raised
    if error is not None and processes() == 1:
        raise error
    agree(None if error is None else str(error).rstrip("."), error)
