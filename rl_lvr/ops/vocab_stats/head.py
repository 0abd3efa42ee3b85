"""The tensors behind an output head: plain or tied, LoRA, a `modules_to_save` copy, sharded by ZeRO-3.

The head's own forward is bypassed, so what it would apply has to be found here, and what is not known is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.wrapping import gathered


class HeadWeights(NamedTuple):
    """Arguments of `vocab_stats`; all detached."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    """[V]"""
    lora: tuple[Tensor, Tensor, float] | None
    """A [r, H], B [V, r], scaling; several active adapters are stacked along r."""


@contextmanager
def head_weights(head: nn.Module) -> Iterator[HeadWeights]:
    """The weights of `head`, an output embedding as `get_output_embeddings()` returns it.

    Parameters that DeepSpeed ZeRO-3 has sharded are gathered until the context ends, and once more when a backward
    pass needs what was computed inside; every process has to take part in both. LoRA dropout is left out.
    """
    layer, adapters = _unwrapped(head)
    parameters: list[Any] = [layer.weight, layer.bias, *(p for a, b, _ in adapters for p in (a, b))]
    sharded = list({id(p): p for p in parameters if hasattr(p, "ds_id")}.values())
    with ExitStack() as stack:
        if sharded:
            stack.enter_context(gathered(*sharded))
            stack.enter_context(_gathered_again_for_backward(sharded))
        lora = None
        if adapters:
            a = torch.cat([a.detach() for a, _, _ in adapters])
            b = torch.cat([b.detach() * scaling for _, b, scaling in adapters], 1) if len(adapters) > 1 else None
            lora = (a, b, 1.0) if b is not None else (a, adapters[0][1].detach(), adapters[0][2])
        weights = HeadWeights(layer.weight.detach(), None if layer.bias is None else layer.bias.detach(), lora)
        borrowed = _borrowed(weights, sharded)
        yield weights
    for tensor in borrowed:
        tensor.data = tensor.new_empty(0)  # use after the context is an error, and no leak


Adapter = tuple[nn.Parameter, nn.Parameter, float]


def _unwrapped(head: nn.Module) -> tuple[nn.Linear, list[Adapter]]:
    """The linear layer that `head` ends in, and its active adapters."""
    if type(head) is nn.Linear:
        return head, []
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils import ModulesToSaveWrapper

    if isinstance(head, ModulesToSaveWrapper):
        active = head.active_adapters
        chosen = head.original_module if head.disable_adapters or not active else head.modules_to_save[active[0]]
        return _unwrapped(chosen)
    if isinstance(head, LoraLinear):
        layer, inner = _unwrapped(head.base_layer)
        return layer, inner + _adapters(head)
    raise UserError(
        f"the output head is a {type(head).__module__}.{type(head).__name__}, which vocab_stats cannot read: "
        "use a float nn.Linear, plain, with LoRA or in modules_to_save."
    )


def _adapters(head: Any) -> list[Adapter]:
    if head.disable_adapters or head.merged:
        return []
    found = []
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        if name in head.lora_variant or head.lora_B[name].bias is not None or head.fan_in_fan_out:
            raise UserError(
                f"the output head's adapter {name!r} is not plain LoRA (DoRA, a bias or a transposed weight): "
                "use plain LoRA for the head, or name it in modules_to_save."
            )
        found.append((head.lora_A[name].weight, head.lora_B[name].weight, float(head.scaling[name])))
    return found


@contextmanager
def _gathered_again_for_backward(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Autograd saves a sharded parameter as its place in `parameters`, and gathers it when backward asks for it."""
    places = {parameter.data_ptr(): place for place, parameter in enumerate(parameters)}

    def pack(tensor: Tensor) -> Tensor | int:
        place = places.get(tensor.data_ptr())
        whole = place is not None and tensor.shape == parameters[place].shape
        return place if whole and place is not None else tensor

    def unpack(saved: Tensor | int) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        with gathered(parameters[saved]):
            return parameters[saved].detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _borrowed(weights: HeadWeights, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Of `weights`, the tensors that are views of `parameters`."""
    owned = {parameter.data_ptr() for parameter in parameters}
    tensors = [weights.weight, weights.bias, *((weights.lora or ())[:2])]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.data_ptr() in owned]
