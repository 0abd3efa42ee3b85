"""vLLM's model classes with a latent-aware ModelState: one mixin, and a subclass for each class that a family names.

vLLM also builds these classes as the language model inside a vision-language model; there, and for a model without a
latent format, the mixin does nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from rl_lvr.errors import UserError
from rl_lvr.latents.feedback import NAME, LatentFeedback
from rl_lvr.rollout.vllm import cpu, guards
from rl_lvr.rollout.vllm.settings import LatentSettings, settings_of


class LatentMixin:
    """Names the ModelState, keeps the hidden states that logits are made from, and loads the feedback module."""

    latent_settings: LatentSettings | None
    latent_hidden: Tensor
    """[requests, H] after the final norm, in batch order: the rows of the last `compute_logits`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.latent_settings = None if prefix else settings_of(vllm_config)
        if self.latent_settings is None:
            return
        guards.check_config(vllm_config)
        if vllm_config.device_config.device.type == "cpu":
            cpu.prepare(vllm_config.model_config.dtype)
        format_ = self.latent_settings.markers.format
        if format_.projector != "none" or format_.norm != "none":
            module = LatentFeedback(self.latent_settings.limits.hidden_size, format_.projector, format_.norm)
            device = next(self.parameters()).device  # type: ignore[attr-defined]
            self.add_module(NAME, module.to(device, vllm_config.model_config.dtype))  # type: ignore[attr-defined]

    def get_model_state_cls(self) -> type:
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        from rl_lvr.rollout.vllm.state import LatentModelState, watch_preemption

        if self.latent_settings is None:
            return DefaultModelState
        watch_preemption()
        return LatentModelState

    def compute_logits(self, hidden_states: Tensor, *args: Any, **more: Any) -> Tensor | None:
        self.latent_hidden = hidden_states
        return super().compute_logits(hidden_states, *args, **more)  # type: ignore[misc]

    def head_logits(self, hidden_states: Tensor) -> Tensor:
        """[n, V] of hidden states [n, H] that belong to no request. All tensor-parallel ranks call it together."""
        logits: Tensor = super().compute_logits(hidden_states)  # type: ignore[misc]
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Takes the feedback module's weights out of the stream: its top-level name is no part of the stock model."""
        ours: dict[str, Tensor] = {}
        loaded: set[str] = super().load_weights(_without_feedback(weights, ours))  # type: ignore[misc]
        module = getattr(self, NAME, None)
        if module is None:
            return loaded
        tensors = dict([*module.named_parameters(), *module.named_buffers()])
        missing = sorted(set(tensors) - set(ours))
        if missing:
            raise UserError(
                f"the weights have no {NAME}.{missing[0]}, which the latent format's projector or norm needs: save the "
                "model with its feedback module."
            )
        for name, tensor in tensors.items():
            # While vLLM reloads weights, a tensor is a stand-in and its loader knows the real one.
            getattr(tensor, "weight_loader", default_weight_loader)(tensor, ours[name])
        return loaded | {f"{NAME}.{name}" for name in ours}


def _without_feedback(weights: Iterable[tuple[str, Tensor]], taken: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in weights:
        if name.startswith(f"{NAME}."):
            taken[name.removeprefix(f"{NAME}.")] = value
        else:
            yield name, value


def __getattr__(name: str) -> type:
    """Return the latent subclass of vLLM's class `name`, such as `vllm.model_executor.models.qwen2.Qwen2ForCausalLM`.

    vLLM looks attributes of this module up by the names that the plugin has registered, also in processes that know no
    more than the name.
    """
    module, _, attribute = name.rpartition(".")
    if not module:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = getattr(importlib.import_module(module), attribute)
    latent = type(f"Latent{attribute}", (LatentMixin, base), {"__module__": __name__})
    globals()[name] = globals()[latent.__name__] = latent
    return latent
