"""LatentSFTTrainer: TRL's SFTTrainer with latents fed into the forward pass and an objective on their prediction.

TRL's collation is replaced (`rl_lvr.data.encoding.Collator` says why). The loss, the fused LM head, metrics, PEFT,
DeepSpeed, checkpoints and resuming are TRL's and transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import ConcatDataset
from transformers import TrainerCallback
from trl import SFTTrainer

from rl_lvr.data.encoding import Collator, Encoded, TargetBatch
from rl_lvr.data.targets import target_vectors
from rl_lvr.errors import UserError
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.feedback import NAME as FEEDBACK
from rl_lvr.latents.feedback import feedback, restore_feedback
from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.inject import inject
from rl_lvr.latents.spans import span_masks
from rl_lvr.models import Family, load_model
from rl_lvr.training.config import LatentSFTConfig
from rl_lvr.training.objectives import LatentPairs, latent_objective


class LatentSFTTrainer(SFTTrainer):
    """Cross-entropy on the text, plus a latent objective on the state before each latent.

    In the forward pass every span is filled with its targets (teacher forcing). A growing share of each span, from
    its end, may be filled with the model's own predictions instead (`own_latents`), and spans without targets always
    are. `markers` None trains on text alone and is TRL's trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        args: LatentSFTConfig,
        *,
        family: Family,
        markers: FormatIds | None,
        processor: Any,
        train: Sequence[Encoded],
        evaluation: Sequence[Encoded] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
    ) -> None:
        self.family = family
        self.markers = markers
        parts = family.vision_parts(model)
        for name, frozen in (("tower", args.freeze_vision_tower), ("merger", args.freeze_merger)):
            for module in parts[name]:
                module.requires_grad_(not frozen)
        tokenizer = getattr(processor, "tokenizer", processor)
        self.image_id = family.placeholder_ids(tokenizer)["image"]
        everything = [train] if evaluation is None else [train, evaluation]
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(ConcatDataset(everything), family, tokenizer.pad_token_id),
            train_dataset=Dataset.from_dict({"index": range(len(train))}),
            eval_dataset=None
            if evaluation is None
            else Dataset.from_dict({"index": range(len(train), len(train) + len(evaluation))}),
            processing_class=processor,
            callbacks=callbacks,
            peft_config=peft_config,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """TRL's loss of a forward pass with latents in it, plus the weighted latent objective."""
        targets: TargetBatch = inputs.pop("targets").to(self.args.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        images = {key: inputs[key] for key in self.family.image_keys if key in inputs}
        # Explicit positions: transformers would otherwise guess 1-D ones for M-RoPE models, without a word.
        inputs["position_ids"] = self.family.positions(self.model, ids, mask, images).prefill
        if self.markers is None:
            return super().compute_loss(model, inputs, False, num_items_in_batch)

        latents, pairing = self._latents(inputs, images, targets)
        with self._states() as states, inject(model, latents, self.markers):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        pairs = self._pairs(states[0], targets, pairing, ids)
        extra, parts = latent_objective(pairs, self.args.objective)

        progress = self.state.global_step / max(self.state.max_steps, 1)
        weight = self.args.weight_at(progress)
        mode = "train" if self.model.training else "eval"
        for name, part in parts.items():
            self._metrics[mode][f"latent/{name}"].append(part.item())
        self._metrics[mode]["latent/weight"].append(weight)
        # With `num_items_in_batch` the trainer leaves gradient accumulation to the loss: this mean must share it out.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return loss + weight * extra / steps

    # ---- latents of a batch

    def _latents(
        self, inputs: dict[str, Any], images: dict[str, Tensor], targets: TargetBatch
    ) -> tuple[LatentBatch, tuple[Tensor, Tensor]]:
        """What to feed, and the target vectors [L, H] with their token indices."""
        ids = inputs["input_ids"]
        rows, places = span_masks(ids, self.markers, inputs["attention_mask"]).latent.nonzero(as_tuple=True)
        width = self.model.get_input_embeddings().weight.shape[-1]
        values = torch.zeros(len(rows), width, device=ids.device)
        known = torch.zeros(len(rows), dtype=torch.bool, device=ids.device)
        vectors, index = values[:0], targets.tokens
        if len(targets.rows):
            vectors, index = target_vectors(self.family, self.model, images, targets)
            flat = torch.full(ids.shape, -1, device=ids.device)
            flat[rows, places] = torch.arange(len(rows), device=ids.device)
            at = flat[targets.rows, targets.positions]
            values = values.to(vectors.dtype).index_put((at,), vectors)
            known[at] = True
        latents = LatentBatch.from_flat(rows, places, values, len(ids))
        own = (
            ~LatentBatch.from_flat(rows, places, known[:, None].float(), len(ids)).values[..., 0].bool() & latents.mask
        )
        passes = int(own.sum(1).max()) if len(rows) else 0

        share = self.args.own_share_at(self.state.global_step / max(self.state.max_steps, 1))
        if share and self.model.training:
            own |= self._last_share(rows, places, ids, share, len(ids)) & latents.mask
            self._metrics["train"]["latent/own_share"].append(share)
            passes = max(passes, 1)  # one parallel pass, as LanteRn: predictions made under teacher forcing
        for _ in range(passes):
            latents = self._with_own(inputs, latents, own)
        return latents, (vectors, index)

    def _last_share(self, rows: Tensor, places: Tensor, ids: Tensor, share: float, size: int) -> Tensor:
        """[B, N] bool: the last `share` of the latents of each span."""
        index = span_masks(ids, self.markers).index[rows, places]
        span = rows * (int(index.max()) + 1) + index
        counts = torch.bincount(span)
        order = torch.arange(len(rows), device=ids.device) - (counts.cumsum(0) - counts)[span]
        chosen = order >= counts[span] - (share * counts[span]).round()
        return LatentBatch.from_flat(rows, places, chosen[:, None].float(), size).values[..., 0].bool()

    @torch.no_grad()
    def _with_own(self, inputs: dict[str, Any], latents: LatentBatch, own: Tensor) -> LatentBatch:
        """One forward pass; `own` [B, N] latents become its predictions. Latent i is exact after i + 1 of these."""
        arguments = {key: value for key, value in inputs.items() if key not in ("labels", "use_cache")}
        with inject(self.model, latents, self.markers):
            hidden = self.family.core(self.model)(**arguments, use_cache=False).last_hidden_state
        before = (latents.positions - 1).clamp_min(0)
        rows = torch.arange(len(before), device=before.device)[:, None]
        predicted = feedback(self.model, hidden[rows, before]).to(latents.values.dtype)
        return replace(latents, values=torch.where(own[..., None], predicted, latents.values))

    # ---- the objective's inputs

    @contextmanager
    def _states(self) -> Iterator[list[Tensor]]:
        """Collects the final hidden states [B, T, H] of the forward pass inside; TRL's fused head hides them."""
        states: list[Tensor] = []
        core = self.family.core(self.model)
        handle = core.register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
        try:
            yield states
        finally:
            handle.remove()

    def _pairs(self, hidden: Tensor, targets: TargetBatch, pairing: tuple[Tensor, Tensor], ids: Tensor) -> LatentPairs:
        vectors, index = pairing
        before = hidden[targets.rows, targets.positions - 1]
        predicted = feedback(self.model, before)
        if "contrast" not in self.args.objective:
            return LatentPairs(predicted, vectors)
        image_rows, image_places = (ids == self.image_id).nonzero(as_tuple=True)
        # Image placeholders stand in the order of the concatenated features, so a token index is a column here.
        positive = torch.zeros(len(vectors), len(image_rows) + 1, dtype=torch.bool, device=ids.device)
        inside = (index >= 0) & (index < len(image_rows))
        positive.scatter_(1, torch.where(inside, index, len(image_rows)), True)
        positive = positive[:, :-1]
        same_row = targets.rows[:, None] == image_rows[None, :]
        relevant = torch.zeros(len(ids), len(image_rows), dtype=torch.int, device=ids.device)
        relevant = relevant.index_add(0, targets.rows, positive.int()) > 0
        return LatentPairs(
            predicted,
            vectors,
            states=hidden[targets.rows, targets.positions],
            image=hidden[image_rows, image_places],
            positive=positive,
            negative=same_row & ~relevant[targets.rows],
        )

    # ---- checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Restore all weights, or refuse.

        transformers 5.17 compares the file's names with the module's, and does not translate: `visual.*` on disk is
        `model.visual.*` in the module. It then restores nothing of a Qwen2.5-VL, and only warns.
        """
        target = self.model if model is None else model
        if isinstance(target, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        stored, _ = load_model(resume_from_checkpoint, dtype=target.dtype)
        found = target.load_state_dict(stored.state_dict(), strict=False)
        missing = [name for name in found.missing_keys if not name.startswith(f"{FEEDBACK}.")]
        if missing or found.unexpected_keys:
            names = ", ".join([*missing, *found.unexpected_keys][:3])
            raise UserError(f"checkpoint {resume_from_checkpoint} does not belong to this model: {names} do not match.")
        restore_feedback(target, resume_from_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The format goes beside every checkpoint, so that no other one is used with it by mistake."""
        super()._save(output_dir, state_dict)
        if self.markers is not None:
            self.markers.format.save(Path(output_dir or self.args.output_dir))
