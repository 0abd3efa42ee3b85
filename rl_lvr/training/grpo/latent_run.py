"""What a trainer holds besides for a run with latents, and what such a run refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from trl import GRPOTrainer

from rl_lvr.errors import UserError
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.feedback import NAME as FEEDBACK
from rl_lvr.latents.format import FormatIds, LatentFormat
from rl_lvr.latents.starting import LatentStart
from rl_lvr.latents.text import ControlTokens
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.types import Capability, RolloutEngine, Sampling
from rl_lvr.signals import SignalSpec
from rl_lvr.training.grpo.checks import dropout_of
from rl_lvr.training.grpo.engines import refuse_length
from rl_lvr.training.grpo.filtering import drops_idle
from rl_lvr.training.grpo.generation import Generator, check_engine_of
from rl_lvr.training.grpo.policies import LatentPolicy, policy_of
from rl_lvr.training.grpo.recording import Recorder
from rl_lvr.training.grpo.scoring import FedModel
from rl_lvr.training.rewards.load import NECESSITY, require_whole_groups
from rl_lvr.training.runs.arguments import fit_reference
from rl_lvr.wrapping import sharded, unwrapped


@dataclass
class LatentRun:
    """The parts of a trainer that only a run with latents has."""

    markers: FormatIds
    policy: LatentPolicy
    signals: Sequence[SignalSpec]
    """That rewards read."""
    generator: Generator
    recorder: Recorder
    control: ControlTokens
    """Tokens that no text of a prompt may hold."""
    rolls_out_again: bool
    """Whether a reward asks for what comes of a prompt without latents."""
    draws_start: bool
    """Whether `latent_start` lets rollouts draw START."""
    drops_idle: bool
    """Whether rows without an advantage are left out of the policy pass."""
    corrects: bool
    """Whether the importance-sampling correction was asked for. TRL always computes its ratio here."""

    def fed(
        self,
        model: nn.Module,
        latents: LatentBatch,
        start: int,
        temperature: float,
        images_per_row: Sequence[int] | None,
        *,
        scores: bool,
    ) -> FedModel:
        """Return `model` for a pass that is fed `latents`; `scores` if it is the scoring pass."""
        policy, signals = (None, self.signals) if scores else (self.policy, ())
        return FedModel(
            model,
            latents,
            start,
            self.markers,
            temperature,
            policy,
            signals,
            images_per_row,
            draws_start=self.draws_start,
        )


def latent_run(trainer: GRPOTrainer, latent_format: LatentFormat, engine: RolloutEngine | None) -> LatentRun:
    """Return the parts for a trainer whose model and processor are there."""
    config, markers, tokenizer = trainer.args, trainer.markers, trainer._tokenizer
    assert markers is not None
    require_whole_groups(trainer.specs, config)
    policy = policy_of(config)
    policy.check_dropout(*dropout_of(trainer.model))
    feedback_map = getattr(unwrapped(trainer.model), FEEDBACK, None)
    if feedback_map is not None and not policy.has_gradient:
        feedback_map.requires_grad_(False)
    if engine is None:
        engine = HFRolloutEngine(
            trainer.model, trainer.processing_class, latent_format, batch_size=config.rollout_batch
        )
    if isinstance(engine, HFRolloutEngine):
        refuse_length(config, "hf")
    check_engine_of(engine, markers, config, policy, sharded=sharded(trainer.model))
    again = any(name in NECESSITY for spec in trainer.specs for name in spec.takes)
    if again and Capability.INTERVENTIONS not in engine.capabilities:
        raise UserError(
            f"the engine {type(engine).__name__} cannot leave latents out, which a reward of necessity needs: use "
            "the engine hf or vllm, or leave the reward out."
        )
    start = LatentStart.parse(config.latent_start)
    sampling = Sampling(
        max_tokens=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p or 0.0,
        repetition_penalty=config.repetition_penalty,
        latent_start=start,
    )
    run = LatentRun(
        markers=markers,
        policy=policy,
        signals=trainer.signals,
        generator=Generator(
            engine, trainer.family, tokenizer, config, policy.explored(sampling), trainer.metrics, trainer.stopping
        ),
        recorder=Recorder(config, markers, tokenizer, trainer.metrics),
        control=ControlTokens(tokenizer, markers, markers.placeholders),
        rolls_out_again=again,
        draws_start=not start.forbidden,
        drops_idle=drops_idle(config, router_loss=trainer.aux_loss_enabled),
        corrects=config.vllm_importance_sampling_correction,
    )
    trainer.add_callback(trainer.timing)
    # TRL then scores every generation batch at once and corrects for the engine's log-probs, as for vLLM's. An object
    # of ours as `vllm_generation` could not take the place of `_generate_single_turn`: TRL hands it images, and not
    # what the processor made of them.
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    trainer._last_loaded_step = -1
    if trainer.ref_model is not None:
        fit_reference(trainer.ref_model, trainer.model, latent_format)
    return run
