"""A model inside its wrappers (PEFT, DDP, DeepSpeed, `torch.compile`), and weights that ZeRO-3 shards over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside PEFT, DDP, DeepSpeed and `torch.compile` wrappers."""
    inner: Any = model
    while True:
        if "module" in inner._modules:  # DDP, DeepSpeed
            inner = inner.module
        elif "_orig_mod" in inner._modules:  # torch.compile
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):  # PEFT: its layers are inside the model itself
            inner = inner.get_base_model()
        else:
            return inner


def input_embeddings(model: nn.Module) -> nn.Module:
    """The module that looks token ids up, inside any wrapper."""
    embedding: nn.Module = unwrapped(model).get_input_embeddings()
    return embedding


def sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 has spread the weights over the processes: then a forward pass needs all of them."""
    return hasattr(input_embeddings(model).weight, "ds_id")


@contextmanager
def whole(weight: Tensor) -> Iterator[None]:
    """Gathers a weight that ZeRO-3 has spread over the ranks: what is left of it here is empty."""
    if not hasattr(weight, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        yield
