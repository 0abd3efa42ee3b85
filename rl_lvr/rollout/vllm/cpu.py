"""What vLLM leaves undone in a worker on a CPU. On a GPU nothing here is called."""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

import torch
from torch import nn

from rl_lvr.errors import UserError


def prepare(dtype: torch.dtype) -> None:
    """Make ready for a model of this precision; UserError if the machine cannot run it."""
    from vllm.v1.sample.ops import topk_topp_sampler

    # Kernels that Triton's interpreter cannot run, or not in bf16. Without Triton vLLM has torch for them.
    topk_topp_sampler.HAS_TRITON = False
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.model_executor.models.") and hasattr(module, "HAS_TRITON"):
            vars(module)["HAS_TRITON"] = False
    allow_tiles(dtype)
    watch_reloads()


def watch_reloads() -> None:
    """Complete every reload of weights with `repack`, also those that vLLM is asked for by others."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    original = GPUModelRunner.reload_weights
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def reload_weights(self: Any, *args: Any, **more: Any) -> None:
        before = packed(self.model)
        original(self, *args, **more)
        repack(self.model, before)

    GPUModelRunner.reload_weights = reload_weights


def packed(model: nn.Module) -> dict[str, Any]:
    """The product of every layer that vLLM runs on a packed copy of its weight, by the layer's name."""
    products = {name: vars(layer).get("cpu_linear") for name, layer in model.named_modules()}
    plain = (None, torch.nn.functional.linear)  # reads the weight itself
    return {name: product for name, product in products.items() if product not in plain}


def repack(model: nn.Module, before: dict[str, Any]) -> None:
    """Pack the weights again that a reload has changed without that. `before`: `packed` before the reload.

    vLLM packs what it loads. A tied output head loads nothing, as its weight is the embedding's.
    """
    for name, product in packed(model).items():
        layer: Any = model.get_submodule(name)
        if product is not before.get(name):
            continue
        if layer.weight.numel() == 0:
            raise RuntimeError(f"no weights came for {name}, which still computes with its old ones.")
        layer.quant_method.process_weights_after_loading(layer)


def allow_tiles(dtype: torch.dtype) -> None:
    """Ask the kernel for AMX, which vLLM's bf16 attention uses wherever the CPU has it, without asking: SIGILL.

    Linux gives tile registers to processes that ask only (arch_prctl, ARCH_REQ_XCOMP_PERM).
    """
    if dtype is torch.bfloat16 and torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        raise UserError(
            "this system does not let processes use the CPU's AMX registers, which vLLM needs for bfloat16: "
            "choose dtype float32."
        )
