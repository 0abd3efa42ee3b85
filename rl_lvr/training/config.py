"""The settings of latent SFT: TRL's SFTConfig plus what concerns data, latents and freezing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from trl import SFTConfig

from rl_lvr.errors import UserError
from rl_lvr.latents.format import LatentFormat, choose_format
from rl_lvr.latents.interventions import Intervention
from rl_lvr.training.objectives import parse_objective

SCHEDULES = ("constant", "linear", "cosine")
WITHOUT_EFFECT = {
    "assistant_only_loss": "the assistant's last turn is what is learned",
    "chat_template_path": "put the template into the model's folder",
    "completion_only_loss": "the assistant's last turn is what is learned",
    "dataset_kwargs": "records are read by train_file",
    "dataset_text_field": "records are read by train_file",
    "eos_token": "set it in the tokenizer",
    "label_names": "there is one kind of label",
    "load_in_4bit": "quantised training is not supported",
    "load_in_8bit": "quantised training is not supported",
    "max_length": "records are never cut: one cut within a span or an image would be another record",
    "model_init_kwargs": "use dtype and attn_implementation",
    "model_revision": "models are read from disk: name the folder of the revision",
    "packing": "it does not work with images, as in TRL",
    "pad_to_multiple_of": "batches are padded to their longest record",
    "padding_free": "it does not work with images, as in TRL",
    "prediction_loss_only": "logits are never kept",
    "remove_unused_columns": "the data set holds row numbers",
    "train_sampling_strategy": "the order is random",
}
"""Settings of TRL and transformers that this trainer cannot honour, and why. They are refused, not ignored."""
EVAL_CONDITIONS = tuple(
    c.value
    for c in (
        Intervention.ORACLE,
        Intervention.OWN,
        Intervention.ZEROS,
        Intervention.NOISE,
        Intervention.SWAP,
        Intervention.SKIP,
        Intervention.NONE,
    )
)


@dataclass
class LatentSFTConfig(SFTConfig):
    """Settings of `rl-lvr sft`. Everything of TRL's `SFTConfig` works as well."""

    output_dir: str = field(default="", metadata={"help": "Folder of this run."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade time for memory."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Mixed precision in bfloat16. Default: yes on a GPU, no on a CPU."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete an earlier run in output_dir first."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads of torch; default: torch's own choice."})
    stop_at: str | None = field(
        default=None,
        metadata={"help": "Stop early once a logged metric passes a bound, such as mean_token_accuracy>0.99."},
    )

    # data
    train_file: str = field(default="", metadata={"help": "Records to train on: .jsonl, .parquet, or a saved dataset."})
    eval_file: str | None = field(default=None, metadata={"help": "Records to evaluate on."})
    train_limit: int | None = field(default=None, metadata={"help": "Use only the first records."})
    processed_cache: bool = field(
        default=False, metadata={"help": "Process images once and keep the result on disk, beside the data."}
    )

    # latents
    latent_format: str | None = field(
        default=None,
        metadata={
            "help": "A preset (lvr, lantern, monet, ...), or none to train without latents. Default: the checkpoint's."
        },
    )
    latent_k: int | None = field(default=None, metadata={"help": "Latents per span."})
    latent_length: str | None = field(default=None, metadata={"help": "fixed or free."})
    latent_first: str | None = field(default=None, metadata={"help": "at_start or before_start."})
    latent_projector: str | None = field(default=None, metadata={"help": "none, linear or mlp."})
    latent_norm: str | None = field(default=None, metadata={"help": "none or embedding."})
    add_marker_tokens: bool = field(
        default=False, metadata={"help": "Add the format's marker tokens to a tokenizer that lacks them."}
    )
    oracle: str = field(
        default="tokens",
        metadata={"help": "tokens: image tokens under the box; crop: the crop through the tower."},
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

    # freezing
    freeze_vision_tower: bool = field(default=True, metadata={"help": "Keep the vision tower as it is."})
    freeze_merger: bool = field(default=True, metadata={"help": "Keep the merger (projector) as it is."})

    # evaluation under interventions
    latent_eval_steps: int = field(
        default=0, metadata={"help": "Answer eval records under interventions every so many steps."}
    )
    latent_eval_samples: int = field(default=256, metadata={"help": "How many eval records."})
    latent_eval_conditions: list[str] = field(
        default_factory=lambda: ["oracle", "own", "zeros", "noise"],
        metadata={"help": "Interventions to answer under."},
    )
    latent_eval_max_tokens: int = field(default=64, metadata={"help": "Longest completion in that evaluation."})
    latent_eval_batch: int = field(default=64, metadata={"help": "Rows decoded together in that evaluation."})

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise UserError("output_dir is missing: name the folder of this run.")
        if not self.train_file:
            raise UserError("train_file is missing: name the records to train on.")
        for name, allowed in (("oracle", ("tokens", "crop")), ("latent_weight_schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}; choose {' or '.join(allowed)}.")
        for name in ("own_latents", "own_latents_start", "own_latents_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be between 0 and 1.")
        for name in self.latent_eval_conditions:
            if name not in EVAL_CONDITIONS:
                raise UserError(f"latent_eval_conditions holds {name!r}; choose from {', '.join(EVAL_CONDITIONS)}.")
        for name in (
            "learning_rate",
            "latent_noise",
            "latent_weight",
            "latent_weight_end",
            "latent_eval_steps",
            "label_smoothing_factor",
        ):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        for name in ("latent_eval_samples", "latent_eval_max_tokens", "latent_eval_batch", "train_limit", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        evaluates = bool(self.latent_eval_steps) or self.eval_strategy != "no"
        if evaluates and self.eval_file is None:
            raise UserError("evaluation is asked for but eval_file is missing: name the records to evaluate on.")
        if self.eval_file is not None and not evaluates:
            raise UserError("eval_file is set but nothing reads it: set latent_eval_steps or eval_strategy.")
        if self.label_smoothing_factor:
            raise UserError(
                "label_smoothing_factor needs a second forward pass, which would have no latents: leave it out."
            )
        self.objective = parse_objective(self.latent_objective)
        # Our datasets hold row numbers, and our collator reads what they point to.
        self.remove_unused_columns = False
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        self.max_length = None
        self.prediction_loss_only = True  # logits would take a second forward pass, without its latents
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
            if self.bf16 is None:
                self.bf16 = False
        self.disable_tqdm = True  # callbacks.Progress draws the bar
        super().__post_init__()

    def format_of(self, stored: LatentFormat | None, folder: str) -> LatentFormat | None:
        """The run's format: the recipe's or the checkpoint's, with the recipe's changes; None is without latents."""
        changes = {
            name.removeprefix("latent_"): getattr(self, name)
            for name in ("latent_k", "latent_length", "latent_first", "latent_projector", "latent_norm")
            if getattr(self, name) is not None
        }
        if self.latent_format != "none":
            return choose_format(self.latent_format, stored, folder, **changes)
        if changes:
            raise UserError(f"latent_format is none, but latent_{next(iter(changes))} is set; remove one of them.")
        return None

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
