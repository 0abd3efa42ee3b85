"""LatentGRPOTrainer: TRL's GRPOTrainer with latents in its rollouts, in its scoring passes and in its policy gradient.

Without a latent format every override hands over to TRL untouched. What an override does beyond TRL is an object that
the trainer holds: the engine's side in `generation.py`, a pass in `scoring.py`, the latents' own loss in `loss.py` and
`policies/`, rewards in `rewarding.py`, checks in `checks.py`. Docs: docs/grpo.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import unwrap_model_for_generation

from rl_lvr.agreement import concatenated
from rl_lvr.forward.batch import evaluating
from rl_lvr.latents.format import FormatIds, LatentFormat
from rl_lvr.latents.text import completion_text
from rl_lvr.models import family_of
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.record import FOLDER, drop_from
from rl_lvr.rollout.types import RolloutEngine
from rl_lvr.signals import parse_signals
from rl_lvr.training.grpo.batch import GenerationBatch, PolicyPass
from rl_lvr.training.grpo.checks import Checks, check_settings, refuse_control_tokens, refuse_latents
from rl_lvr.training.grpo.columns import read_completions, reward_columns, with_columns
from rl_lvr.training.grpo.config import ARGUMENTS_WITH_LATENTS, LatentGRPOConfig
from rl_lvr.training.grpo.filtering import Idle, level_rows
from rl_lvr.training.grpo.inputs import OncePerPrompt, WithoutEmptyImages, known_to_trl, with_image_lists
from rl_lvr.training.grpo.latent_run import LatentRun, latent_run
from rl_lvr.training.grpo.loss import latent_term
from rl_lvr.training.grpo.resuming import Place, Reference
from rl_lvr.training.grpo.rewarding import Rewards
from rl_lvr.training.grpo.timing import Timing
from rl_lvr.training.rewards.load import signals_of
from rl_lvr.training.rewards.models import readers, specs_of
from rl_lvr.training.runs.arguments import STORED, config_of, format_of, loaded, name_of, refuse_arguments
from rl_lvr.training.runs.resuming import Resumable
from rl_lvr.training.runs.settings import WITH_FORMAT
from rl_lvr.training.runs.trl_hooks import GRPO_HOOKS, check_trl
from rl_lvr.wrapping import sharded


class LatentGRPOTrainer(Resumable, GRPOTrainer):
    """GRPO on rollouts with latents.

    The methods are those that TRL and transformers call, in the order of a step. Between them a `GenerationBatch`
    carries the rows. `docs/architecture.md` follows one through a step.
    """

    args: LatentGRPOConfig
    reward_funcs: list[Any]
    reward_processing_classes: list[Any]
    batch: GenerationBatch | None = None
    """While TRL makes, scores or trains on one."""

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable[..., Any]] | None = None,
        rollout_func: Callable[..., Any] | None = None,
        environment_factory: Any = None,
        *,
        latent_format: LatentFormat | str | None = STORED,
        engine: RolloutEngine | None = None,
    ) -> None:
        """Take TRL's arguments in TRL's order, and two more.

        Args:
            model: A model, or its path. Where its feedback map is missing, it is attached.
            reward_funcs: TRL's functions and reward models, and what `load_rewards` returns; one or a list.
            args: A `LatentGRPOConfig`, or TRL's `GRPOConfig`, whose values are kept.
            latent_format: A format, the name of a preset, or None to train without latents, which is TRL's trainer.
                By default the format stored with the model; a model without one trains without latents.
            engine: Any `RolloutEngine` of that format. By default the model itself generates (`HFRolloutEngine`).

        The other arguments are TRL's. docs/grpo.md says which of them a latent format rules out.

        Raises:
            UserError: If an argument or a setting would have no effect.
        """
        check_trl(GRPO_HOOKS)
        config = config_of(args, LatentGRPOConfig, GRPOConfig, f"{name_of(model).split('/')[-1]}-GRPO")
        chosen = format_of(model, latent_format)
        self.specs = specs_of(reward_funcs, config.reward_weights)
        self.signals = parse_signals(signals_of(self.specs))
        self.markers: FormatIds | None = None
        if chosen is None:
            refuse_latents(config, self.specs, self.signals, engine)
        else:
            refuse_arguments(
                ARGUMENTS_WITH_LATENTS,
                WITH_FORMAT,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )
            given = loaded(model, config, chosen, processing_class, peft_config, quantization_config)
            model, peft_config, processing_class = given.model, given.peft_config, given.processor
            self.family, self.markers = given.family, given.markers
            check_settings(config, chosen, self.family.hidden_size)
        super().__init__(
            model=model,
            reward_funcs=[spec.function for spec in self.specs],
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        self.rewards = Rewards(self.specs, config, self.metrics, self.stopping)
        self.reward_funcs = self.rewards.watched(self.reward_funcs)  # TRL has added those of environments
        self.reward_processing_classes = readers(self.reward_processing_classes)
        self.rewards.weigh(self.reward_weights, self.state.global_step)
        self.idle = Idle(config.max_idle_steps)
        self.place = Place(self)
        self.checks = Checks(config, self.model.dtype, self.metrics)
        self.timing = Timing(self.model, config, self.metrics)
        self.parts += [self.place, self.rewards, self.idle]
        if config.sync_ref_model:
            self.parts.append(Reference(self))
        self.run = None if chosen is None else latent_run(self, chosen, engine)

    @property
    def processing_class(self) -> Any:
        """The processor; while TRL makes a batch, that of the batch."""
        made = None if self.batch is None else self.batch.processor
        return self._processor if made is None else made

    @processing_class.setter
    def processing_class(self, processor: Any) -> None:
        self._processor = processor

    @property
    def engine(self) -> RolloutEngine:
        """What generates, with latents."""
        assert self.run is not None
        return self.run.generator.engine

    # ---- generation

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """The parent makes rollouts in here; its loss and the backward pass come after."""
        inputs = super()._prepare_inputs(generation_batch)
        if self.run is not None and self.metrics.training:
            self.timing.phases.begin()
        return inputs

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The parent's `output` has a closed set of keys; latents are added, for it to shuffle and split."""
        self.rewards.weigh(self.reward_weights, self.state.global_step)
        shown = with_image_lists(inputs)
        self.batch = batch = GenerationBatch(rows=inputs)
        try:
            if self.run is None:
                output = self._without_latents(batch, shown)
            else:
                output = self._with_latents(batch, shown, self.run)
        finally:
            self.batch = None
        if self.metrics.training:
            assert batch.level is not None
            self.idle.note(not bool(batch.level.all()))
            self.metrics.add("rollouts/idle_batches", float(self.idle.count))
        return output

    def _without_latents(self, batch: GenerationBatch, shown: list[dict[str, Any]]) -> dict[str, Any]:
        kinds = {bool(row["images"]) for row in shown if "images" in row}
        if len(kinds) > 1:
            batch.processor = OncePerPrompt(self.processing_class, family_of(self.model), shown)
        output = super()._generate_and_score_completions(shown if False in kinds else batch.rows)
        self.checks.check_ratio(output, with_latents=False)
        return output

    def _with_latents(self, batch: GenerationBatch, shown: list[dict[str, Any]], run: LatentRun) -> dict[str, Any]:
        refuse_control_tokens(shown, run.control)
        batch.processor = OncePerPrompt(self.processing_class, self.family, shown)
        output = super()._generate_and_score_completions(shown)
        output |= batch.tensors(with_means=run.policy.has_loss)
        self.checks.check_ratio(output, with_latents=True)
        if not run.corrects:
            output["importance_sampling_ratio"] = torch.ones_like(output["importance_sampling_ratio"])
        self.checks.note(batch, run.markers, output["prompt_ids"].shape[1], self._group_size)
        # Rounding can make the mean of equal rewards differ from them by one ulp; treat that residue as zero advantage.
        assert batch.level is not None
        first = self.accelerator.process_index * len(shown)
        output["advantages"] = output["advantages"].masked_fill(batch.level[first : first + len(shown)], 0.0)
        return output

    @property
    def _group_size(self) -> Any:
        return self.num_generations if self.metrics.training else self.num_generations_eval

    def _generate(self, prompts: list[Any]) -> Any:
        """The parent's `tool_mask` comes from tools alone; here forced tokens get zeros, and whole rollouts that
        are left out: no loss, KL or ratio there. Its completions hold what the tokenizer does not call special.
        """
        made = super()._generate(prompts)
        if self.run is None:
            return made
        assert self.batch is not None
        markers = self.run.markers
        completions = read_completions(self._tokenizer, made[0], made[1], made[3], markers, self.eos_token_ids)
        return (*made[:2], self.batch.loss_mask(), completions, *made[4:])

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> Any:
        """The parent calls vLLM or `generate` (`if self.use_vllm:`); neither feeds latents."""
        if self.run is None:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        run, batch, step = self.run, self.batch, self.state.global_step
        assert batch is not None
        with self.timing("generate"):
            run.generator.sync(self.model, step)
        with self._generating():
            run.generator.fill(batch, prompt_ids, images, multimodal_fields, step)
            self.checks.check_parity(batch, run.generator, self.model, step)
        return (
            [list(rollout.completion_ids) for rollout in batch.rollouts],
            [rollout.uncut_logprobs.tolist() for rollout in batch.rollouts],
        )

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """For an engine that shares the model. Its processes decode different numbers of tokens, and under ZeRO-3
        every forward would wait for all of them; as for TRL's own generation, weights are gathered before instead.
        """
        gathers = isinstance(self.engine, HFRolloutEngine) and sharded(self.model)
        whole = unwrap_model_for_generation(self.model_wrapped, self.accelerator) if gathers else nullcontext()
        with torch.no_grad(), self.accelerator.autocast(), self.timing("generate"), whole:
            yield

    # ---- scoring passes

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **others: Any,
    ) -> Any:
        """The parent calls `model(**model_inputs, labels=labels, fused_lm_head=True)`, chunk by chunk, in old,
        reference and policy passes alike: the one place where latents must enter.

        The first pass of a generation batch is the scoring pass: in evaluation mode, as the engine runs, with the
        probe armed for the rewards' signals, and held against what the engine recorded.
        """
        if self.run is None:
            if 0 in (others.get("num_images") or ()):
                model = WithoutEmptyImages(model, others["num_images"])
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **others
            )
        run, batch = self.run, self.batch
        assert batch is not None
        start = input_ids.shape[1] - logits_to_keep
        scores = batch.latents is None
        latents = batch.carrier(start, input_ids.device) if batch.latents is None else batch.latents
        if not batch.in_loss:
            batch_size = self.args.scoring_batch or batch_size
        if batch.kept is not None:
            rows = batch.kept.rows
            latents, input_ids, attention_mask = latents.select(rows), input_ids[rows], attention_mask[rows]
            others = batch.kept.select(others)
        fed = run.fed(model, latents, start, self.temperature, others.get("num_images"), scores=scores)
        others = known_to_trl(family_of(model), others)  # the pass completes the rest
        self.timing.note_work("loss" if batch.in_loss else "score", attention_mask, logits_to_keep)
        with (
            nullcontext() if batch.in_loss else self.timing("score"),
            evaluating(model) if scores else nullcontext(),
        ):
            result = super()._get_per_token_logps_and_entropies(
                fed, input_ids, attention_mask, logits_to_keep, batch_size, **others
            )
        if batch.kept is not None:
            result = (*batch.kept.spread_pass(*result[:2]), result[2])
        if scores:
            batch.latents, batch.old_means, batch.columns = latents, fed.means, fed.columns
            self.checks.check_replay(batch, result[0], attention_mask)
        elif batch.in_loss:
            batch.policy_pass = PolicyPass(result[0].detach(), fed)
        elif run.policy.has_loss:
            batch.reference_means = fed.means
        return result

    # ---- rewards

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        """The parent hands over the columns of `inputs` only; texts, signals and facts of rollouts become more of them.

        Returns [B of all processes, R], or raises the error that a reward raised in some process.
        """
        run, batch = self.run, self.batch
        assert batch is not None
        first = self.accelerator.process_index * len(prompts)
        groups = [(first + row) // self._group_size for row in range(len(prompts))]
        rows = batch.rows
        if run is not None:
            if run.rolls_out_again:
                with self._generating():
                    run.generator.fill_again(batch, self.state.global_step)
            rows = with_columns(rows, reward_columns(self.specs, batch, run.markers, groups, self._tokenizer))
        with self.timing("reward") if run is not None else nullcontext():
            texts = [completion_text(ids, self._tokenizer, self.markers) for ids in completion_ids_list]
            rows = self.rewards.with_texts(rows, texts)
            rewards = super()._calculate_rewards(rows, prompts, completions, completion_ids_list)
            given = {"prompts": prompts[0], "completions": completions[0], "completion_ids": completion_ids_list[0]}
            names = self.reward_func_names
            self.rewards.settle(rewards, self.reward_funcs, names, rows[0] | given, self.state.max_steps)
        if run is not None:
            mine = rewards[first : first + len(prompts)].tolist()
            run.recorder.write(batch, self.state.global_step, prompts, completions, mine, groups, names)
            for name, values in run.recorder.shown.items() if self.log_completions else ():
                self._log_completion_extra(name, values)
            # TRL leaves rollouts without a reward out of their group's mean and deviation.
            excluded = concatenated(torch.tensor(batch.excluded)).to(rewards.device)
            rewards = rewards.masked_fill(excluded[:, None], torch.nan)
        each = self.multi_objective_aggregation == "normalize_then_sum"
        batch.level = level_rows(rewards, self.reward_weights, self._group_size, each=each)
        return rewards

    # ---- loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The parent scores `input_ids` with a fixed list of arguments; the latents of this micro-batch wait here."""
        if self.run is None:
            return self._checked_loss(super()._compute_loss(model, inputs))
        run, training = self.run, self.metrics.training
        self.batch = batch = GenerationBatch.from_tensors(inputs, drops_idle=run.drops_idle and training)
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            self.batch = None
        assert batch.policy_pass is not None
        if batch.kept is not None:
            self.metrics.add_mean("frac_dropped", float((~batch.kept.mask).sum()), len(batch.kept.mask))
        if run.policy.recomputes:
            self.metrics.add_largest("latent/unroll_difference", batch.policy_pass.fed.unroll_difference)
        if run.policy.has_loss:
            term = latent_term(run.policy, batch, inputs, self.off_policy_mask_threshold, self.metrics)
            # As the parent's per-sequence losses: a mean over rows, shared out over the accumulated micro-batches.
            steps = self.current_gradient_accumulation_steps if training else 1
            loss = loss + self.args.latent_weight * term / steps
        return self._checked_loss(loss)

    def training_step(self, *args: Any, **more: Any) -> Tensor:
        """The loss and its backward pass are one phase."""
        loss: Tensor = super().training_step(*args, **more)
        if self.run is not None:
            self.timing.phases.end("loss")
        return loss

    # ---- the order of the data

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """The sampler is kept for a resumption."""
        self.place.sampler = super()._get_train_sampler(dataset)
        return self.place.sampler

    def _init_training_state(self, *args: Any, **more: Any) -> tuple[int, int]:
        """The parent starts a new sampler, and rollouts after the checkpoint are recorded again."""
        epochs, steps = super()._init_training_state(*args, **more)
        self.place.skip_epochs(epochs)
        drop_from(Path(self.args.output_dir) / FOLDER, self.accelerator.process_index, self.state.global_step)
        return epochs, steps
