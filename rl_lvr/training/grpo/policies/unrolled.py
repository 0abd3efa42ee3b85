"""`unrolled`: latents are computed again with gradients, so that the text's loss trains what made them."""

from __future__ import annotations

from rl_lvr.errors import UserError
from rl_lvr.forward.unrolling import unrolled
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.training.grpo.policies.base import LatentPolicy, PassInputs


class Unrolled(LatentPolicy):
    settings = ("latent_gradient_clip",)
    recomputes = True

    def check(self) -> None:
        clip = self.config.latent_gradient_clip
        if clip is not None and not clip > 0:
            raise UserError(f"latent_gradient_clip is {clip}; it must be above 0.")
        if self.config.latent_sigma:
            raise UserError(
                "latent_policy unrolled recomputes latents as a function of the parameters, and noise is none: set "
                "latent_sigma to 0, or use latent_policy gaussian."
            )
        if self.config.gradient_checkpointing:
            raise UserError(
                "latent_policy unrolled computes latents with a key-value cache that carries gradients, and "
                "transformers switches that cache off under gradient_checkpointing: set one of them otherwise."
            )

    def latents(self, recorded: LatentBatch, inputs: PassInputs) -> LatentBatch:
        return unrolled(
            inputs.model,
            inputs.ids,
            inputs.mask,
            inputs.images,
            recorded,
            inputs.start,
            inputs.markers,
            self.config.latent_gradient_clip,
        )
