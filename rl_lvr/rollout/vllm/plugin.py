"""Entry point of the plugin (group `vllm.general_plugins`), run in every process of a vLLM.

It registers the latent subclasses under the stock architecture names and makes latent blocks private in the prefix
cache. A model without a latent format is not affected: its class then behaves as the stock one.
"""

from __future__ import annotations

ARCHITECTURES = {
    "Qwen2_5_VLForConditionalGeneration": "LatentQwen2_5VL",
    "Qwen3VLForConditionalGeneration": "LatentQwen3VL",
    "InternVLForConditionalGeneration": "LatentInternVL",
    "LlavaOnevisionForConditionalGeneration": "LatentLlavaOnevision",
    "Qwen2ForCausalLM": "LatentQwen2",
    "Qwen3ForCausalLM": "LatentQwen3",
}


def register() -> None:
    """May be called several times. Model classes are named, not imported: vLLM imports the one that it needs."""
    from vllm import ModelRegistry

    from rl_lvr.rollout.vllm import prefix

    for architecture, name in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, f"rl_lvr.rollout.vllm.models:{name}")
    prefix.install()
