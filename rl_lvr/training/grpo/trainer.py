"""LatentGRPOTrainer: TRL's GRPOTrainer with latents in its rollouts, in its scoring passes and in its policy gradient.

Without a latent format every override hands over to TRL untouched. A generation batch is in `batch.py`, scoring
passes in `scoring.py`, the latents' own loss in `loss.py`. Docs: docs/grpo.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import GRPOConfig
from trl.models.utils import unwrap_model_for_generation

from rl_lvr.errors import UserError
from rl_lvr.forward.batch import evaluating
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.feedback import NAME as FEEDBACK
from rl_lvr.latents.feedback import attach_feedback
from rl_lvr.latents.format import FormatIds, LatentFormat
from rl_lvr.latents.interventions import Intervention
from rl_lvr.models import family_of
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.record import FOLDER, RolloutLog
from rl_lvr.rollout.types import Capability, RolloutEngine, Sampling, latent_batch
from rl_lvr.signals import parse_signals
from rl_lvr.training.grpo.batch import Again, Turn, build_requests, request_seed
from rl_lvr.training.grpo.checks import (
    CheckedGRPO,
    check_settings,
    dropout_of,
    refuse_latent_settings,
)
from rl_lvr.training.grpo.columns import (
    again_of,
    has_span,
    made_columns,
    read_completions,
    record,
    require_columns,
    rolls_out_again,
)
from rl_lvr.training.grpo.config import ARGUMENTS_WITH_LATENTS, LatentGRPOConfig
from rl_lvr.training.grpo.engines import refuse_length
from rl_lvr.training.grpo.filtering import Kept, drops_idle, level_rows
from rl_lvr.training.grpo.inputs import WithoutEmptyImages, processed_once, with_image_lists
from rl_lvr.training.grpo.policies import LatentActions, policy_of
from rl_lvr.training.grpo.scoring import FedModel, own_latents
from rl_lvr.training.rewards.load import require_whole_groups, signals_of, weights_at
from rl_lvr.training.rewards.models import specs_of, text_for_models
from rl_lvr.training.runs.arguments import (
    STORED,
    adapter_with_feedback,
    config_of,
    format_of,
    model_of,
    name_of,
    processor_of,
    refuse_arguments,
)
from rl_lvr.training.runs.settings import WITH_FORMAT
from rl_lvr.training.runs.trl_hooks import GRPO_HOOKS, check_trl
from rl_lvr.wrapping import sharded, unwrapped


class LatentGRPOTrainer(CheckedGRPO):
    """GRPO on rollouts with latents."""

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
            refuse_latent_settings(config)
            self._without_latents(engine)
        else:
            refuse_arguments(
                ARGUMENTS_WITH_LATENTS,
                WITH_FORMAT,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )
            model = model_of(model, config, chosen, quantization_config)
            peft_config = adapter_with_feedback(peft_config, model)
            if processing_class is None:
                processing_class = processor_of(model, config)
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
            self.family = family_of(model)
            self.markers = chosen.bind(tokenizer, self.family.placeholder_ids(tokenizer))
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
        self._weigh()
        self._turn: Turn | None = None
        self._rows: list[dict[str, Any]] | None = None
        self._feed: LatentBatch | None = None
        self._kept: Kept | None = None
        self._fed: FedModel | None = None
        self._parity_known = not config.parity_check
        self._synced_step = -1
        self._ratio_noted = False
        self._level: Tensor | None = None
        self._turns: dict[str, tuple[int, int]] = {}
        if chosen is not None:
            self._drops_idle = drops_idle(config, router_loss=self.aux_loss_enabled)
            self._prepare(chosen, engine)

    def _weigh(self) -> None:
        """Set the weights of this step; those of rewards that environments own, which TRL puts last, are TRL's."""
        weights = weights_at(self.specs, self.state.global_step)
        self.reward_weights[: len(weights)] = torch.tensor(weights, dtype=torch.float32)

    def _without_latents(self, engine: RolloutEngine | None) -> None:
        if engine is not None:
            raise UserError("an engine is given but no latent format: TRL generates by itself then.")
        if self.signals:
            raise UserError(f"signal {self.signals[0].name!r} needs a latent format: leave its reward out.")
        require_columns(self.specs, without_latents=True)

    def _prepare(self, latent_format: LatentFormat, engine: RolloutEngine | None) -> None:
        config: LatentGRPOConfig = self.args
        require_columns(self.specs)
        require_whole_groups(self.specs, config)
        self.policy = policy_of(config)
        self.policy.check_dropout(*dropout_of(self.model))
        if not self.policy.has_gradient and hasattr(unwrapped(self.model), FEEDBACK):
            getattr(unwrapped(self.model), FEEDBACK).requires_grad_(False)
        if engine is None:
            engine = HFRolloutEngine(self.model, self.processing_class, latent_format, batch_size=config.rollout_batch)
        if engine.markers != self.markers:
            raise UserError(
                f"the engine runs latent format {engine.markers.format.name!r} with other markers or another k than "
                f"the trainer's {latent_format.name!r}: make both from one format and one tokenizer."
            )
        if Capability.WEIGHTS not in engine.capabilities:
            raise UserError(
                f"the engine {type(engine).__name__} keeps the weights that it was started with, so the trainer would "
                "learn from rollouts of an old model: use the engine vllm or hf, or server with a weights_folder."
            )
        if isinstance(engine, HFRolloutEngine):
            refuse_length(config, "hf")
        if isinstance(engine, HFRolloutEngine) and sharded(self.model) and not config.ds3_gather_for_generation:
            raise UserError(
                "under ZeRO-3 the engine hf decodes on gathered weights: leave ds3_gather_for_generation on, or use "
                "the engine vllm."
            )
        self._guard_engine(engine)
        self.sampling = self.policy.explored(
            Sampling(
                max_tokens=config.max_completion_length,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
                min_p=config.min_p or 0.0,
                repetition_penalty=config.repetition_penalty,
            )
        )
        self._rolls_out_again = rolls_out_again(self.specs)
        if self._rolls_out_again and Capability.INTERVENTIONS not in engine.capabilities:
            raise UserError(
                f"the engine {type(engine).__name__} cannot leave latents out, which a reward that takes "
                "a reward of necessity needs: use the engine hf or vllm, or leave the reward out."
            )
        if self.sampling.sigma and self.policy.noise_capability not in engine.capabilities:
            raise UserError(f"the engine draws no {self.sampling.noise} noise: use the engine hf, or another policy.")
        # TRL then scores every generation batch at once and corrects for the engine's log-probs, as for vLLM's.
        self._corrects = config.vllm_importance_sampling_correction
        self.use_vllm = self.vllm_importance_sampling_correction = True
        self._last_loaded_step = -1
        self._rollout_log: RolloutLog | None = None
        if self.ref_model is not None and hasattr(unwrapped(self.model), FEEDBACK):
            # TRL builds the reference from the model's folder, and knows nothing of the feedback map beside it.
            attach_feedback(self.ref_model, latent_format, self.model.config._name_or_path)
            getattr(unwrapped(self.ref_model), FEEDBACK).requires_grad_(False)
        if self.ref_model is not None:
            mine, theirs = (unwrapped(m).config.get_text_config().vocab_size for m in (self.model, self.ref_model))
            if mine != theirs:
                raise UserError(
                    f"the model has {mine} token embeddings and the reference, which TRL loads from its folder, "
                    f"{theirs}: save the model with its marker tokens, and start from there."
                )

    # ---- generation

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> Any:
        """The parent calls vLLM or `generate` (`if self.use_vllm:`); neither feeds latents."""
        if self.markers is None:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        assert self._turn is not None
        self._heed()
        if self._synced_step != self.state.global_step:
            with self._phase("generate"):
                self._ask("did not take over the weights", lambda: self.engine.sync_weights(self.model))
            self._synced_step = self.state.global_step
        mode, first = self._mode, self.accelerator.process_index * len(prompt_ids)
        step, number = self.state.global_step, self._next_turn()

        def seed(row: int) -> int:
            return request_seed(self.args.seed, mode, step, number, first + row)

        turn = self._turn
        turn.requests = build_requests(self.family, prompt_ids, images, multimodal_fields, seed)
        turn.sampling = sampling = self.sampling if mode == "train" else replace(self.sampling, sigma=0.0)
        with torch.no_grad(), self.accelerator.autocast(), self._phase("generate"), self._whole_weights():
            turn.rollouts = self._rollouts(turn.requests, sampling)
            turn.excluded = self._excluded(turn.rollouts)
            self._check_parity(turn, sampling)
        return (
            [list(rollout.completion_ids) for rollout in turn.rollouts],
            [rollout.uncut_logprobs.tolist() for rollout in turn.rollouts],
        )

    def _whole_weights(self) -> AbstractContextManager[Any]:
        """For the engine that shares the model. Its processes decode different numbers of tokens, and under ZeRO-3
        every forward would wait for all of them; as for TRL's own generation, weights are gathered before instead.
        """
        if not (isinstance(self.engine, HFRolloutEngine) and sharded(self.model)):
            return nullcontext()
        return unwrap_model_for_generation(self.model_wrapped, self.accelerator)

    def _roll_out_again(self, turn: Turn) -> list[Again | None]:
        """The text of each completion with a span, made anew from its seed with an empty pair for every span: the same
        up to the first one, for draws are keyed. None without a span."""
        assert self.markers is not None
        wanted = [row for row, rollout in enumerate(turn.rollouts) if has_span(rollout, self.markers)]
        found: list[Again | None] = [None] * len(turn.rollouts)
        anywhere = self.accelerator.gather(torch.tensor([len(wanted)], device=self.accelerator.device))
        if bool(anywhere.any()):
            # A process without any span makes one rollout for nothing: what is gathered for it, all must ask for.
            requests = [replace(turn.requests[row], intervention=Intervention.SKIP) for row in wanted or [0]]
            with torch.no_grad(), self.accelerator.autocast(), self._phase("generate"), self._whole_weights():
                made = self._rollouts(requests, turn.sampling)
            for row, rollout in zip(wanted, made, strict=False):
                found[row] = again_of(rollout, self._tokenizer, self.markers)
        return found

    def _next_turn(self) -> int:
        """How often rollouts were made at this step before: a step may take several generation batches."""
        step, number = self._turns.get(self._mode, (-1, 0))
        number = number + 1 if step == self.state.global_step else 0
        self._turns[self._mode] = (self.state.global_step, number)
        return number

    def _generate(self, prompts: list[Any]) -> Any:
        """The parent's `tool_mask` comes from tools alone; here forced tokens get zeros, and whole rollouts that
        are left out: no loss, KL or ratio there. Its completions hold what the tokenizer does not call special.
        """
        made = super()._generate(prompts)
        if self.markers is None:
            return made
        assert self._turn is not None
        completions = read_completions(self._tokenizer, made[0], made[1], made[3], self.markers, self.eos_token_ids)
        tool_mask = [
            (~rollout.forced & (not left_out)).int().tolist()
            for rollout, left_out in zip(self._turn.rollouts, self._turn.excluded, strict=True)
        ]
        return (*made[:2], tool_mask, completions, *made[4:])

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The parent's `output` has a closed set of keys; latents are added, for it to shuffle and split."""
        mode = self._mode
        self._weigh()
        shown = with_image_lists(inputs)
        if self.markers is None:
            kinds = {bool(row["images"]) for row in shown if "images" in row}
            with processed_once(self, family_of(self.model), shown) if len(kinds) > 1 else nullcontext():
                output = self._of_parent(inputs, shown if False in kinds else inputs)
            self._check_ratio(output, mode)
            self._note_learning(mode)
            return output
        self._turn = turn = Turn()
        self._refuse_control(shown)
        try:
            with processed_once(self, self.family, shown):
                output = self._of_parent(inputs, shown)
        finally:
            self._turn = None
        assert turn.latents is not None
        assert turn.old_means is not None
        output |= turn.latents.as_tensors()
        if self.policy.has_loss:
            output["latent_old_means"] = turn.old_means
            if turn.reference_means is not None:
                output["latent_reference_means"] = turn.reference_means
        self._log_kept_mass(turn, mode)
        self._check_ratio(output, mode)
        if not self._corrects:
            output["importance_sampling_ratio"] = torch.ones_like(output["importance_sampling_ratio"])
        self._log_latents(turn.latents, output["prompt_ids"].shape[1], mode)
        # The mean of equal rewards may be another float than they are: what it leaves over is no advantage.
        assert self._level is not None
        first = self.accelerator.process_index * len(inputs)
        output["advantages"] = output["advantages"].masked_fill(self._level[first : first + len(inputs)], 0.0)
        self._note_learning(mode)
        return output

    def _of_parent(self, rows: list[dict[str, Any]], shown: list[dict[str, Any]]) -> dict[str, Any]:
        """The parent's output for `shown`; rewards get the columns of `rows`."""
        self._rows = None if shown is rows else rows
        try:
            output: dict[str, Any] = super()._generate_and_score_completions(shown)
        finally:
            self._rows = None
        return output

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
        turn = self._turn
        markers = self.markers
        if markers is None:
            if 0 in (others.get("num_images") or ()):
                model = WithoutEmptyImages(model, others["num_images"])
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **others
            )
        start = input_ids.shape[1] - logits_to_keep
        scores = turn is not None and turn.latents is None
        kept = self._kept if turn is None else None
        if turn is not None:
            latents = turn.carrier(start, input_ids.device) if turn.latents is None else turn.latents
            batch_size = self.args.scoring_batch or batch_size
        else:
            assert self._feed is not None
            latents = self._feed
        if kept is not None:
            latents = latents.select(kept.rows)
            input_ids, attention_mask = input_ids[kept.rows], attention_mask[kept.rows]
            others = kept.select(others)
        self._fed = fed = FedModel(
            model,
            latents,
            start,
            markers,
            self.temperature,
            recompute=self.policy.latents if self.policy.recomputes and not scores else None,
            means=scores or self.policy.has_loss,
            signals=self.signals if scores else (),
            images_per_row=others.get("num_images"),
        )
        others.pop("batch_num_images", None)  # the parent's signature lacks LLaVA-OneVision's; the pass makes it anew
        self._note_work("loss" if turn is None else "score", attention_mask, logits_to_keep)
        with (
            self._phase("score") if turn is not None else nullcontext(),
            evaluating(model) if scores else nullcontext(),
        ):
            result = super()._get_per_token_logps_and_entropies(
                fed, input_ids, attention_mask, logits_to_keep, batch_size, **others
            )
        if kept is not None:
            result = (*kept.spread_pass(*result[:2]), result[2])
        fed.logprobs = result[0].detach()
        if turn is not None and scores:
            turn.latents, turn.old_means, turn.columns = latents, fed.means, fed.columns
            self._check_replay(turn, result[0], attention_mask)
        elif turn is not None and self.policy.has_loss:
            turn.reference_means = fed.means
        return result

    # ---- rewards

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        """The parent hands over the columns of `inputs` only; signals and facts of rollouts become more of them."""
        mode = self._mode
        size = self.num_generations if mode == "train" else self.num_generations_eval
        each = self.multi_objective_aggregation == "normalize_then_sum"
        inputs = inputs if self._rows is None else self._rows  # with the columns that the data has
        if self.markers is None:
            with text_for_models(self):
                rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            self._level = level_rows(rewards, self.reward_weights, size, each=each)
            return rewards
        turn = self._turn
        assert turn is not None
        first = self.accelerator.process_index * len(prompts)
        groups = [(first + row) // size for row in range(len(prompts))]
        if self._rolls_out_again:
            turn.again = self._roll_out_again(turn)
        columns = made_columns(self.specs, turn, self.markers, groups, self._tokenizer)
        columns |= {name: column.values for name, column in turn.columns.items()}
        clash = sorted(set(columns) & set(inputs[0]))
        if clash:
            raise UserError(f"the data has a column {clash[0]!r}, which the trainer makes itself: rename it.")
        rows = [{**row, **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(inputs)]
        with self._phase("reward"), text_for_models(self):
            rewards = super()._calculate_rewards(rows, prompts, completions, completion_ids_list)
        if self.log_completions:
            self._log_completion_extra("latents", [len(rollout.latent_positions) for rollout in turn.rollouts])
            for name, column in turn.columns.items():
                self._log_completion_extra(f"signal/{name}", column.values)
        for name, column in turn.columns.items():
            known = [v for v, count in zip(column.values, column.counts, strict=True) if count and isinstance(v, float)]
            self._add_mean(mode, f"signal/{name}", sum(known), len(known))
        if mode == "train" and self.args.record_rollouts:
            mine = rewards[first : first + len(prompts)].tolist()
            self._record(turn, inputs, prompts, completions, mine, groups)
        excluded = self.accelerator.gather(torch.tensor(turn.excluded, device=rewards.device))
        rewards = rewards.masked_fill(excluded[:, None], torch.nan)  # TRL leaves them out of their group's mean and std
        self._level = level_rows(rewards, self.reward_weights, size, each=each)
        return rewards

    def _record(
        self,
        turn: Turn,
        inputs: list[dict[str, Any]],
        prompts: Any,
        completions: Any,
        rewards: list[list[float]],
        groups: list[int],
    ) -> None:
        if self._rollout_log is None:
            folder = Path(self.args.output_dir) / FOLDER
            self._rollout_log = RolloutLog(folder, self.accelerator.process_index)
        assert self.markers is not None
        names = self.reward_func_names
        said = list(zip(prompts, completions, strict=True))
        rows = record(turn, inputs, said, rewards, groups, names, self._tokenizer, self.markers)
        self._rollout_log.append(self.state.global_step, rows, latent_batch(turn.rollouts))

    # ---- loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The parent scores `input_ids` with a fixed list of arguments; the latents of this micro-batch wait here."""
        if self.markers is None:
            return self._checked_loss(super()._compute_loss(model, inputs))
        mode = self._mode
        self._feed = LatentBatch.from_tensors(inputs)
        self._kept = kept = Kept.of(inputs) if self._drops_idle and mode == "train" else None
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            self._feed = self._kept = None
        if kept is not None:
            self._add_mean(mode, "frac_dropped", float((~kept.mask).sum()), len(kept.mask))
        fed = self._fed
        assert fed is not None
        if self.policy.recomputes:
            self._add_max(mode, "latent/unroll_difference", fed.unroll_difference)
        if self.policy.has_loss:
            loss = loss + self._latent_term(fed, kept, inputs, mode)
        self._fed = None
        return self._checked_loss(loss)

    def _latent_term(self, fed: FedModel, kept: Kept | None, inputs: Mapping[str, Any], mode: str) -> Tensor:
        assert fed.logprobs is not None
        latents = LatentBatch.from_tensors(dict(inputs))
        start = inputs["prompt_ids"].shape[1]
        real = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        chosen = own_latents(latents, start) & (latents.sigma > 0)[:, None]
        chosen = chosen & real.gather(1, latents.positions.clamp(min=0)).bool()
        chosen = chosen & inputs["tool_mask"].bool().any(1, keepdim=True)  # not of a rollout that is left out
        means = fed.means
        if kept is not None:
            chosen = chosen & kept.mask[:, None]
            means = kept.spread(means, torch.zeros_like(latents.values))
        actions = LatentActions(
            values=latents.values,
            chosen=chosen,
            sigma=latents.sigma,
            means=means,
            old_means=inputs["latent_old_means"],
            reference_means=inputs.get("latent_reference_means"),
            advantages=inputs["advantages"],
            weights=self._row_weights(fed.logprobs, inputs),
        )
        found = self.policy.loss(actions)
        count = int(found.count)
        for name, value in (("clip_ratio", found.clipped), ("ratio", found.ratio)):
            self._add_mean(mode, f"latent/{name}", float(value), count)
        if self.beta:
            self._add_mean(mode, "latent/kl", float(found.divergence), count)
        self._add_mean(mode, "latent/loss", float(found.loss.detach()), 1)
        # As the parent's per-sequence losses: a mean over rows, shared out over the accumulated micro-batches.
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        return self.args.latent_weight * found.loss / steps

    def _row_weights(self, logprobs: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """[B], what the parent multiplies the policy loss of a row with (`per_token_loss * off_policy_mask`, `*
        importance_sampling_ratio`). Ratios of single tokens enter by their mean: a row whose tokens are masked is."""
        mask = inputs["completion_mask"] * inputs["tool_mask"]
        weights: Tensor = (inputs["importance_sampling_ratio"] * mask).sum(1) / mask.sum(1).clamp(min=1)
        if self.off_policy_mask_threshold is not None:
            weights = (
                weights
                * self.get_off_policy_mask(
                    advantages=inputs["advantages"][:, None],
                    per_token_logps=logprobs,
                    sampling_per_token_logps=inputs["sampling_per_token_logps"],
                    mask=mask,
                    off_policy_threshold=self.off_policy_mask_threshold,
                )[:, 0]
            )
        return weights
