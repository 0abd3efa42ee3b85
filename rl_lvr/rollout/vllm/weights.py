"""A trainer's weights into a running vLLM, and the proof that they arrived.

Names are those of a saved checkpoint, which vLLM's own loaders understand. The receipt holds a checksum over what was
loaded and the embedding rows that the engine now looks up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.latents.inject import unwrapped

PROBES = 16
"""Embedding rows that are read back."""


@dataclass
class Receipt:
    """What went in at one end or came out at the other."""

    tensors: int = 0
    checksum: float = 0.0
    """Sum over tensors of their mean absolute value, in float64."""
    rows: float = 0.0
    """The same of the first embedding rows, looked up through the model."""

    def count(self, value: Tensor) -> None:
        self.tensors += 1
        if value.is_floating_point() and value.numel():
            self.checksum += float(value.detach().double().abs().mean())

    def as_row(self) -> list[Any]:
        return [self.tensors, self.checksum, self.rows]

    def agrees(self, other: Receipt) -> bool:
        def near(left: float, right: float) -> bool:
            return abs(left - right) <= 1e-6 * max(abs(left), abs(right), 1e-30)

        return self.tensors == other.tensors and near(self.checksum, other.checksum) and near(self.rows, other.rows)


def load(runner: Any, weights: Iterable[tuple[str, Tensor]]) -> Receipt:
    """In a worker: load `weights` into its model. Called with all of them, or the receipt will tell."""
    receipt = Receipt()

    def counted() -> Iterator[tuple[str, Tensor]]:
        for name, value in weights:
            receipt.count(value)
            yield name, value

    model = runner.model
    if runner.device.type == "cpu":  # the CPU backend has repacked its weights: only the long way works
        _reload(runner, counted())
    else:
        model.load_weights(counted())
    device = next(model.parameters()).device
    probes = model.embed_input_ids(torch.arange(PROBES, device=device))
    receipt.rows = float(probes.double().abs().mean())
    return receipt


def _reload(runner: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """vLLM's layerwise reload. One that fails would leave stand-ins for weights behind: put the weights back."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    try:
        runner.reload_weights(weights_iterator=weights)
    except BaseException:
        finalize_layerwise_reload(runner.model, runner.model_config)
        raise


@contextmanager
def checkpoint_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[list[tuple[str, Tensor]], Receipt]]:
    """The weights of a trainer's model under a checkpoint's names, adapters merged in for the time being.

    `dtype` is the engine's precision. Wrappers (DDP, DeepSpeed, PEFT, torch.compile) may be around the model; its
    weights must be whole on this rank.
    """
    adapted = _adapted(model)
    if adapted is not None:
        adapted.merge_adapter()
    try:
        base = unwrapped(model)
        named = [(_released(name, base.config), value) for name, value in _own(base)]
        if any(value.numel() == 0 for _, value in named):
            raise UserError("the model's weights are spread over ranks (ZeRO-3): gather them before sync_weights.")
        receipt = Receipt()
        for _, value in named:
            receipt.count(value)
        receipt.rows = float(base.get_input_embeddings().weight[:PROBES].detach().to(dtype).double().abs().mean())
        yield named, receipt
    finally:
        if adapted is not None:
            adapted.unmerge_adapter()


def _adapted(model: Any) -> Any:
    """The PEFT model inside other wrappers, None if there is none."""
    while not hasattr(model, "merge_adapter"):
        if "module" in model._modules:
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return None
    return model


def _own(base: Any) -> Iterator[tuple[str, Tensor]]:
    """Each weight once, under its name without the adapter; a head that shares the embedding's weight is left out."""
    for name, value in base.state_dict().items():
        if ".lora_" in name or "original_module." in name:
            continue
        name = name.replace(".base_layer.", ".").replace("modules_to_save.default.", "")
        if name == "lm_head.weight" and base.config.get_text_config().tie_word_embeddings:
            continue
        yield name, value.detach()


def _released(name: str, config: Any) -> str:
    """transformers 5 dropped a level from SigLIP's names, which vLLM's loader expects."""
    tower = "model.vision_tower."
    if config.model_type == "llava_onevision" and name.startswith(tower) and "vision_model." not in name:
        return name.replace(tower, f"{tower}vision_model.")
    return name
