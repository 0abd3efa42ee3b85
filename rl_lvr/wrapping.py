"""A model inside its wrappers (PEFT, DDP, DeepSpeed, `torch.compile`), and weights that ZeRO-3 shards over ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn


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


def gathered(*parameters: Any, write: bool = False) -> AbstractContextManager[Any]:
    """Return a context in which parameters that ZeRO-3 has sharded are whole. All processes have to enter it.

    Parameters that are whole already, as a tied embedding in use is, are left alone; None and tensors that are not
    sharded too. With `write`, what the first process changes reaches all of them.
    """
    sharded = {id(p): p for p in parameters if hasattr(p, "ds_id")}.values()
    if not sharded:
        return nullcontext()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    missing = [p for p in sharded if p.ds_status != ZeroParamStatus.AVAILABLE]
    if not missing:
        return nullcontext()
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        missing, modifier_rank=0 if write else None
    )
    return context
