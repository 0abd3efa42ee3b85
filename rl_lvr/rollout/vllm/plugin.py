"""Entry point of the plugin (group `vllm.general_plugins`), run in every process of a vLLM.

It registers a latent subclass of every family's vLLM class under the stock architecture name and makes latent blocks
private in the prefix cache. A model without a latent format is not affected: its class then behaves as the stock one.
"""

from __future__ import annotations


def register() -> None:
    """May be called several times. Model classes are named, not imported: vLLM imports the one that it needs."""
    from vllm import ModelRegistry
    from vllm.logger import init_logger

    from rl_lvr.errors import UserError
    from rl_lvr.models.registry import family_class, model_types
    from rl_lvr.rollout.vllm import prefix

    for model_type in model_types():
        try:
            family = family_class(model_type)
        except UserError as error:  # every vLLM on this machine comes here, for whatever model
            init_logger("vllm.rl_lvr").error("Models of type %r cannot have latents: %s", model_type, error)
            continue
        for architecture, name in family.vllm_classes.items():
            ModelRegistry.register_model(architecture, f"rl_lvr.rollout.vllm.models:{name}")
    prefix.install()
