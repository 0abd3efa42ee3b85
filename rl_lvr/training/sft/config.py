"""The settings of latent SFT: TRL's SFTConfig plus what concerns data, latents and the objective."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from trl import SFTConfig

from rl_lvr.errors import UserError
from rl_lvr.forward.objectives import parse_objective
from rl_lvr.training.runs import settings
from rl_lvr.training.runs.settings import RunSettings, TrainerSettings, check_run, refuse_unused, require_at_least

LOSSES = ("nll", "dft", "chunked_nll")
"""Of TRL."""
SCHEDULES = ("constant", "linear", "cosine")
ON_RECORDS = "on records"
WITH_RECORDS = {
    "assistant_only_loss": "the assistant's last turn is what is learned",
    "chat_template_path": "put the template into the model's folder",
    "completion_only_loss": "the assistant's last turn is what is learned",
    "dataset_kwargs": "records are encoded as they are",
    "dataset_num_proc": "records are encoded by the data loader: dataloader_num_workers",
    "dataset_text_field": "records are encoded as they are",
    "eos_token": "set it in the tokenizer",
    "eval_packing": "records are not packed",
    "label_names": "there is one kind of label",
    "label_smoothing_factor": "it needs a second forward pass, which would have no latents",
    "length_column_name": "the order is random",
    "max_length": "records are never cut: one cut within a span or an image would be another record",
    "packing": "it does not work with images, as in TRL",
    "packing_strategy": "records are not packed",
    "pad_to_multiple_of": "batches are padded to their longest record",
    "pad_token": "set it in the tokenizer",
    "padding_free": "it does not work with images, as in TRL",
    "shuffle_dataset": "the order is random",
    "train_sampling_strategy": "the order is random",
    "truncation_mode": "records are never cut",
}
"""Settings of TRL and transformers that training on records leaves nothing to read, and why. They are refused."""
ARGUMENTS_WITH_RECORDS = {
    "data_collator": "records have their own collator",
    "compute_loss_func": "the loss is that of the text plus the latent objective",
    "compute_metrics": "logits are never kept",
    "preprocess_logits_for_metrics": "logits are never kept",
    "formatting_func": "records are encoded as they are",
}
"""The same for arguments of `SFTTrainer`."""
WITHOUT_LATENTS = dict.fromkeys(
    (
        "latent_objective",
        "latent_weight",
        "latent_weight_end",
        "latent_weight_schedule",
        "latent_noise",
        "own_latents",
        "own_latents_start",
        "own_latents_end",
    ),
    "there are no latents",
)
"""Settings of `LatentSFTConfig` that training without latents leaves nothing to read, and why."""
OF_RAMP = dict.fromkeys(("own_latents_start", "own_latents_end"), "there is no ramp")
"""Settings of `LatentSFTConfig` that only own latents read."""
WITHOUT_EFFECT = settings.WITHOUT_EFFECT | WITH_RECORDS | {"prediction_loss_only": "logits are never kept"}
"""What the command line refuses, whatever the value."""


@dataclass
class LatentSFTConfig(TrainerSettings, SFTConfig):
    """The settings of `LatentSFTTrainer`. All of TRL's `SFTConfig` are settings of it as well."""

    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest sequence of a data set of TRL, which is cut there. Records are never cut."},
    )
    latent_objective: str = field(
        default="nmse",
        metadata={"help": "nmse, cosine, infonce, contrast, or a mix such as nmse:1,infonce:0.1."},
    )
    latent_weight: float = field(default=1.0, metadata={"help": "Weight of the latent objective at the start."})
    latent_weight_end: float | None = field(default=None, metadata={"help": "Its weight at the end of training."})
    latent_weight_schedule: str = field(default="linear", metadata={"help": "constant, linear or cosine."})
    latent_noise: float = field(
        default=0.0,
        metadata={"help": "Gaussian noise on the targets that are fed, in standard deviations of the targets."},
    )
    own_latents: float = field(
        default=0.0,
        metadata={
            "help": "Own predictions in place of targets: share of a span, from its end, once the ramp is complete."
        },
    )
    own_latents_start: float = field(
        default=0.6, metadata={"help": "Fraction of training after which that ramp begins."}
    )
    own_latents_end: float = field(
        default=1.0, metadata={"help": "Fraction of training at which that ramp is complete."}
    )

    choices = {"loss_type": LOSSES, "latent_weight_schedule": SCHEDULES}  # noqa: RUF012, as in its base

    def check(self) -> None:
        super().check()
        for name in ("own_latents", "own_latents_start", "own_latents_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be between 0 and 1.")
        require_at_least(self, 0, "latent_noise", "latent_weight", "latent_weight_end", "label_smoothing_factor")
        if not self.own_latents:
            refuse_unused(self, OF_RAMP, "while own_latents is 0")
        self.objective = parse_objective(self.latent_objective)

    def weight_at(self, progress: float) -> float:
        """Weight of the latent objective at a fraction of training."""
        end = self.latent_weight if self.latent_weight_end is None else self.latent_weight_end
        if self.latent_weight_schedule == "constant":
            return self.latent_weight
        share = progress if self.latent_weight_schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.latent_weight + (end - self.latent_weight) * share

    def own_share_at(self, progress: float) -> float:
        """Share of each span that is fed with own predictions at a fraction of training (LanteRn ramps from 60 %)."""
        if progress <= self.own_latents_start:
            return 0.0
        ramp = (progress - self.own_latents_start) / max(self.own_latents_end - self.own_latents_start, 1e-9)
        return self.own_latents * min(ramp, 1.0)


@dataclass
class SFTRecipe(RunSettings, LatentSFTConfig):
    """The settings of `rl-lvr sft`: the trainer's, and what a recipe says besides."""

    processed_cache: bool = field(
        default=False, metadata={"help": "Process images once and keep the result on disk, beside the data."}
    )

    def __post_init__(self) -> None:
        check_run(self)
        refuse_unused(self, WITH_RECORDS, ON_RECORDS)
        super().__post_init__()
