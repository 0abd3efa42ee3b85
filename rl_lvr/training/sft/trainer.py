"""LatentSFTTrainer: TRL's SFTTrainer with latents fed into the forward pass and an objective on their prediction.

TRL's collation is replaced (`rl_lvr.data.encoding.Collator` says why). The loss, the fused LM head, metrics, PEFT,
DeepSpeed, checkpoints and resuming are TRL's and transformers' own.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from rl_lvr.agreement import largest
from rl_lvr.data.encoding import IGNORED, Collator, Encoded, Encoder, LazyEncoded, TargetBatch
from rl_lvr.data.records import Records
from rl_lvr.data.targets import target_vectors
from rl_lvr.errors import UserError
from rl_lvr.forward.batch import ReplayBatch, evaluating, forward_hidden, states_before
from rl_lvr.forward.inject import inject
from rl_lvr.forward.objectives import LatentPairs, latent_objective, moving_targets
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.feedback import feedback
from rl_lvr.latents.format import FormatIds, LatentFormat
from rl_lvr.latents.spans import span_masks
from rl_lvr.training.runs.arguments import STORED, config_of, format_of, loaded, name_of, refuse_arguments
from rl_lvr.training.runs.moments import Moment, Part
from rl_lvr.training.runs.resuming import Resumable
from rl_lvr.training.runs.settings import ON_LATENTS, WITH_FORMAT, WITHOUT_FORMAT, refuse_unused
from rl_lvr.training.runs.trl_hooks import SFT_HOOKS, check_trl
from rl_lvr.training.sft.config import (
    ARGUMENTS_WITH_RECORDS,
    ON_RECORDS,
    WITH_RECORDS,
    WITHOUT_LATENTS,
    LatentSFTConfig,
)


class LatentSFTTrainer(Resumable, SFTTrainer):
    """Cross-entropy on the text, plus a latent objective on the state before each latent.

    In the forward pass every span is filled with its targets (teacher forcing). A growing share of each span, from
    its end, may be filled with the model's own predictions instead (`own_latents`), and spans without targets always
    are.

    It trains on records (`load_records`, or `Encoded` rows), with or without latents. On a data set of TRL, which has
    no latents, it is TRL's trainer.
    """

    def __init__(
        self,
        model: str | nn.Module,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[..., Any] | None = None,
        *,
        latent_format: LatentFormat | str | None = STORED,
    ) -> None:
        """Take TRL's arguments in TRL's order, and one more.

        Args:
            model: A model, or its path. Where its feedback map is missing, it is attached.
            args: A `LatentSFTConfig`, or TRL's `SFTConfig` or transformers' `TrainingArguments`, whose values are kept.
            train_dataset: Records, `Encoded` rows, or without latents a data set of TRL.
            eval_dataset: The same.
            latent_format: A format, the name of a preset, or None to train without latents. By default the format
                stored with the model; a model without one trains without latents.

        The other arguments are TRL's. docs/sft.md says which of them training on records rules out.

        Raises:
            UserError: If an argument or a setting would have no effect.
        """
        check_trl(SFT_HOOKS)
        if isinstance(args, TrainingArguments) and not isinstance(args, SFTConfig):
            args = SFTConfig(**{**args.to_dict(), "hub_token": args.hub_token})  # as TRL does
        config = config_of(args, LatentSFTConfig, SFTConfig, f"{name_of(model).split('/')[-1]}-SFT")
        chosen = format_of(model, latent_format)
        if chosen is None:
            refuse_unused(config, WITHOUT_LATENTS, WITHOUT_FORMAT)
        self.markers: FormatIds | None = None
        self._on_records = chosen is not None or isinstance(train_dataset, Sequence)
        arguments = {
            "data_collator": data_collator,
            "compute_loss_func": compute_loss_func,
            "compute_metrics": compute_metrics,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
            "formatting_func": formatting_func,
        }
        if self._on_records:
            refuse_arguments(ARGUMENTS_WITH_RECORDS, ON_RECORDS, **arguments)
            refuse_unused(args or config, WITH_RECORDS, ON_RECORDS)  # by the defaults of the class that was given
            if chosen is not None:
                refuse_unused(config, ON_LATENTS, WITH_FORMAT)
            _require_records("train_dataset", train_dataset)
            if eval_dataset is not None:
                _require_records("eval_dataset", eval_dataset)
            given = loaded(model, config, chosen, processing_class, peft_config, quantization_config)
            model, peft_config, processing_class = given.model, given.peft_config, given.processor
            self.family, self.markers = given.family, given.markers
            self.image_id = self.family.placeholder_ids(given.tokenizer).get("image", -1)
            encoder = Encoder(processing_class, self.family, self.markers)
            train, evaluation = (
                LazyEncoded(data, encoder) if isinstance(data, Records) else data or ()
                for data in (train_dataset, eval_dataset)
            )
            arguments["data_collator"] = Collator([train, evaluation], self.family, given.tokenizer.pad_token_id)
            train_dataset = Dataset.from_dict({"index": range(len(train))})
            eval_dataset = None
            if evaluation:
                eval_dataset = Dataset.from_dict({"index": range(len(train), len(train) + len(evaluation))})
            config = copy.copy(config)
            config.dataset_kwargs = {"skip_prepare_dataset": True}
            config.max_length = None
            config.remove_unused_columns = False
            config.prediction_loss_only = True  # logits would take a second forward pass, without its latents
        super().__init__(
            model=model,
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            quantization_config=quantization_config,
            peft_config=peft_config,
            **arguments,
        )
        self.parts.append(_Tokens(self))
        if self.markers is not None and self.is_world_process_zero():
            warning = moving_targets(config, self.family.vision_parameters(self.model))
            if warning is not None:
                print(f"warning: {warning}", file=sys.stderr)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """TRL's loss of a forward pass with latents in it, plus the weighted latent objective."""
        if not self._on_records:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self._checked_loss(found[0] if return_outputs else found)
            return found
        targets: TargetBatch = inputs.pop("targets").to(self.args.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        images = {key: inputs[key] for key in self.family.image_keys if key in inputs}
        # Explicit positions: transformers would otherwise guess 1-D ones for M-RoPE models, without a word.
        inputs["position_ids"] = self.family.positions(self.model, ids, mask, images).prefill
        if self.markers is None:
            return self._checked_loss(super().compute_loss(model, inputs, False, num_items_in_batch))

        latents, vectors, tokens = self._latents(inputs, self.markers, images, targets)
        with states_before(self.model, targets.rows, targets.positions) as made, inject(model, latents, self.markers):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        hidden, predicted = made[0]
        extra, parts = latent_objective(
            self._pairs(hidden, predicted, vectors, tokens, targets, ids), self.args.objective
        )

        weight = self.args.weight_at(self._progress)
        metrics = self._metrics["train" if self.model.training else "eval"]
        # Every process gathers the same names, whether its own batch holds targets or not.
        for name in self.args.objective:
            part = parts.get(name, torch.full((), torch.nan, device=ids.device))
            mean = self.accelerator.gather_for_metrics(part).nanmean()
            if not mean.isnan():
                metrics[f"latent/{name}"].append(mean.item())
        metrics["latent/weight"].append(weight)
        # With `num_items_in_batch` the trainer leaves gradient accumulation to the loss: this mean must share it out.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return self._checked_loss(loss + weight * extra / steps)

    @property
    def _progress(self) -> float:
        """Fraction of training done."""
        return self.state.global_step / max(self.state.max_steps, 1)

    # ---- latents of a batch

    def _latents(
        self, inputs: dict[str, Any], markers: FormatIds, images: dict[str, Tensor], targets: TargetBatch
    ) -> tuple[LatentBatch, Tensor, Tensor]:
        """What to feed; the target vectors [L, H]; and their token indices [L, G] in the image features."""
        ids = inputs["input_ids"]
        masks = span_masks(ids, markers, inputs["attention_mask"])
        rows, places = masks.latent.nonzero(as_tuple=True)
        values = torch.zeros(len(rows), self.family.hidden_size, device=ids.device)
        own = torch.ones(len(rows), dtype=torch.bool, device=ids.device)
        number = torch.full(ids.shape, -1, device=ids.device)
        number[rows, places] = torch.arange(len(rows), device=ids.device)
        at = number[targets.rows, targets.positions]
        own[at] = False
        # A latent without a target is exact once all those before it in its row are.
        passes = int(torch.bincount(rows, own.float()).max()) if len(rows) else 0
        # ZeRO-3 needs the same forward passes from each process.
        passes, most_targets = largest(passes, len(targets.rows))
        vectors, tokens = values[:0], targets.tokens
        if most_targets and (images or targets.aux_images):
            with self.accelerator.autocast():
                vectors, tokens = target_vectors(self.family, self.model, images, targets)
            fed = vectors
            if self.args.latent_noise and self.model.training and len(vectors):
                fed = vectors + self.args.latent_noise * vectors.std() * torch.randn_like(vectors)
            values = values.to(vectors.dtype).index_put((at,), fed)

        share = self.args.own_share_at(self._progress)
        if share and self.model.training:
            self._metrics["train"]["latent/own_share"].append(share)
            own |= _last_of_spans(rows, masks.index[rows, places], share)
            passes = max(passes, 1)  # one parallel pass, as LanteRn: predictions made under teacher forcing
        for _ in range(passes):
            values = self._with_own(inputs, markers, rows, places, values, own)
        return LatentBatch.from_flat(rows, places, values, len(ids)), vectors, tokens

    @torch.no_grad()
    def _with_own(
        self, inputs: dict[str, Any], markers: FormatIds, rows: Tensor, places: Tensor, values: Tensor, own: Tensor
    ) -> Tensor:
        """`values` [N, H] at `places` [N] of `rows` [N]; where `own` [N], what one forward pass predicts there."""
        ids, mask, learned = inputs["input_ids"], inputs["attention_mask"], inputs["labels"] != IGNORED
        images = {key: inputs[key] for key in self.family.image_keys if key in inputs}
        batch = ReplayBatch(ids, mask, learned, LatentBatch.from_flat(rows, places, values, len(ids)), images)
        with evaluating(self.model), self.accelerator.autocast():
            hidden = forward_hidden(self.model, batch, markers)
            predicted = feedback(self.model, hidden[rows, places - 1]).to(values.dtype)
        return torch.where(own[:, None], predicted, values)

    # ---- the objective's inputs

    def _pairs(
        self, hidden: Tensor, predicted: Tensor, vectors: Tensor, tokens: Tensor, targets: TargetBatch, ids: Tensor
    ) -> LatentPairs:
        if "contrast" not in self.args.objective:
            return LatentPairs(predicted, vectors)
        image_rows, image_places = (ids == self.image_id).nonzero(as_tuple=True)
        # Image placeholders stand in the order of the concatenated features, so a token index is a column here.
        positive = torch.zeros(len(vectors), len(image_rows) + 1, dtype=torch.bool, device=ids.device)
        inside = (tokens >= 0) & (tokens < len(image_rows))
        positive = positive.scatter(1, torch.where(inside, tokens, len(image_rows)), True)[:, :-1]
        relevant = torch.zeros(len(ids), len(image_rows), dtype=torch.int, device=ids.device)
        relevant = relevant.index_add(0, targets.rows, positive.int()) > 0
        return LatentPairs(
            predicted,
            vectors,
            states=hidden[targets.rows, targets.positions],
            image=hidden[image_rows, image_places],
            positive=positive,
            negative=(targets.rows[:, None] == image_rows) & ~relevant[targets.rows],
        )


class _Tokens(Part):
    """TRL's count of tokens."""

    def __init__(self, trainer: LatentSFTTrainer) -> None:
        self._trainer = trainer

    def now(self, moment: Moment) -> None:
        moment.counters["train_tokens"] = self._trainer._total_train_tokens

    def take(self, moment: Moment) -> None:
        self._trainer._total_train_tokens = moment.counters["train_tokens"]


def _require_records(name: str, data: Any) -> None:
    """Refuse what the trainer cannot encode, or has not been encoded."""
    if not isinstance(data, Sequence) or (isinstance(data, list | tuple) and not all(map(_is_encoded, data))):
        raise UserError(
            f"{name} is a {type(data).__name__}, which holds no latent targets: give records "
            "(rl_lvr.data.records.load_records), or train without a latent format."
        )


def _is_encoded(row: Any) -> bool:
    return isinstance(row, Encoded)


def _last_of_spans(rows: Tensor, spans: Tensor, share: float) -> Tensor:
    """[N] bool: the last `share` of the latents of each span. Latents come by row, then position."""
    if not len(rows):
        return torch.zeros(0, dtype=torch.bool, device=rows.device)
    span = rows * (int(spans.max()) + 1) + spans
    counts = torch.bincount(span)
    order = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[span]
    return order >= counts[span] - (share * counts[span]).round()
