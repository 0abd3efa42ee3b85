"""Settings that every verb that trains has: the run, its data, the latent format, freezing, accuracy in between.

Mixins for TRL's config classes, named before them among the bases. What they hold is checked by `check_run`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import TrainingArguments

from rl_lvr.errors import UserError, near_miss
from rl_lvr.evaluation.conditions import parse_conditions
from rl_lvr.latents.format import LatentFormat, choose_format
from rl_lvr.latents.interventions import Intervention
from rl_lvr.models import Family

WITH_FORMAT = "with a latent format"
WITHOUT_FORMAT = "without a latent format"
WITHOUT_EFFECT = {
    "bnb_4bit_quant_storage": "quantised training is not supported",
    "bnb_4bit_quant_type": "quantised training is not supported",
    "chat_template_path": "put the template into the model's folder",
    "eos_token": "set it in the tokenizer",
    "label_names": "there is one kind of label",
    "load_in_4bit": "quantised training is not supported",
    "load_in_8bit": "quantised training is not supported",
    "model_init_kwargs": "use dtype and attn_implementation",
    "model_revision": "models are read from disk: name the folder of the revision",
    "remove_unused_columns": "the data set holds row numbers",
    "train_sampling_strategy": "the order is random",
    "use_bnb_nested_quant": "quantised training is not supported",
}
"""Settings of TRL and transformers that no verb can honour, and why. They are refused, not ignored."""

ON_LATENTS = {
    "fsdp": "latents are not supported under it: use DeepSpeed",
    "parallelism_config": "latents are not supported where a sequence or a layer is split",
    "torch_compile": "a compiled model does not look its embeddings up where latents enter",
}
"""Settings of transformers that no training with latents supports, and why. They are refused at construction."""
OF_ADAPTERS = dict.fromkeys(
    (
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "lora_target_parameters",
        "lora_modules_to_save",
        "lora_task_type",
        "use_rslora",
        "use_dora",
    ),
    "there is no adapter",
)
"""Settings of `ModelConfig` that only `use_peft` reads."""
RUN_WITHOUT_LATENTS = {
    "add_marker_tokens": "there are no markers",
    "oracle": "there are no latents",
}
"""Settings of `RunSettings` that a run without latents leaves nothing to read, and why."""
ARGUMENTS_ON_LATENTS = {"quantization_config": "the engine's latents would differ from those of a quantised trainer"}
"""The same for arguments of TRL's trainers."""


@dataclass
class TrainerSettings:
    """Settings of every trainer: TRL's with another default, and what is added to them. Named before TRL's config."""

    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade time for memory."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Mixed precision in bfloat16. Default: yes on a GPU, no on a CPU."}
    )
    on_nan_loss: str = field(
        default="stop",
        metadata={
            "help": "A loss or gradient norm that is not finite: stop, with a checkpoint of the step before, or "
            "skip this update."
        },
    )
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Words of a trainer's own settings, beside `CHOICES`."""

    def __post_init__(self) -> None:
        self.check()
        if not torch.cuda.is_available():  # transformers would take a GPU's defaults
            self.dataloader_pin_memory = False
            self.bf16 = bool(self.bf16)
        parent: Any = super()
        parent.__post_init__()

    def check(self) -> None:
        """Refuse what cannot be in the settings that are added to TRL's."""
        require_finite_settings(self)
        require_words(self, {**CHOICES, **self.choices})


@dataclass
class RunSettings:
    """What a recipe says about the run whatever the verb."""

    output_dir: str = field(default="", metadata={"help": "Folder of this run."})
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


if TYPE_CHECKING:

    class RunConfig(RunSettings, TrainingArguments):
        """The settings of any verb that trains."""


def evaluates(config: RunConfig) -> bool:
    """Whether anything reads eval_file."""
    return bool(config.latent_eval_steps) or config.eval_strategy != "no"


def read_eval_file(config: RunConfig) -> str | None:
    """eval_file, if anything reads it."""
    file: str | None = config.eval_file
    return file if evaluates(config) else None


def check_run(config: RunConfig) -> None:
    """Refuse what cannot be in the settings of `RunSettings`, and settle what follows from them."""
    if not config.output_dir:
        raise UserError("output_dir is missing: name the folder of this run.")
    if not config.train_file:
        raise UserError("train_file is missing: name the records to train on.")
    require_words(config, {"oracle": ("tokens", "crop")})
    conditions = parse_conditions(config.latent_eval_conditions)
    if any(condition.intervention is Intervention.PLAIN_TOKENS for condition in conditions):
        raise UserError("latent_eval_conditions holds plain_tokens, which needs a filler: use rl-lvr evaluate for it.")
    require_at_least(config, 0, "learning_rate", "latent_eval_steps")
    require_at_least(
        config, 1, "latent_eval_samples", "latent_eval_max_tokens", "latent_eval_batch", "train_limit", "threads"
    )
    if evaluates(config) and config.eval_file is None:
        raise UserError("evaluation is asked for but eval_file is missing: name the records to evaluate on.")
    config.remove_unused_columns = False  # our data sets hold row numbers, which stand for what the model takes
    config.disable_tqdm = True  # callbacks.Progress draws the bar


def refuse_unused(args: Any, table: Mapping[str, str], where: str) -> None:
    """Refuse settings of `table` (name: why) that were changed from their default."""
    known = {entry.name: entry for entry in fields(args)}
    for name, why in table.items():
        entry, value = known[name], getattr(args, name)
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if value is not None and value != {} and value != default:
            raise UserError(f"{name} cannot be used {where} ({why}): leave it out.")


def freeze_vision(family: Family, model: nn.Module, *, tower: bool = True, merger: bool = True) -> None:
    """Freeze these vision parts, and only those."""
    parameters = family.vision_parameters(model)
    for name, frozen in (("tower", tower), ("merger", merger)):
        for parameter in parameters[name]:
            parameter.requires_grad_(not frozen)


def require_at_least(config: Any, least: int, *names: str) -> None:
    """Refuse smaller numbers; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise UserError(f"{name} is {value}; it must be {'0 or more' if least == 0 else f'at least {least}'}.")


CHOICES: dict[str, tuple[Any, ...]] = {
    "log_level": ("detail", "debug", "info", "warning", "error", "critical", "passive"),
    "log_level_replica": ("detail", "debug", "info", "warning", "error", "critical", "passive"),
    "on_nan_loss": ("stop", "skip"),
    "torch_compile_mode": (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}
"""Of settings that every trainer has: words that transformers takes without a look and trips over later, and ours."""


def require_words(config: Any, choices: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse other values of the settings named in `choices`, with the nearest that there is."""
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            words = [word for word in allowed if isinstance(word, str)]
            hint = near_miss(value, words, f"; choose {' or '.join([', '.join(words[:-1]), words[-1]])}.")
            raise UserError(f"{name} is {value!r}{hint}")


def require_finite_settings(config: Any) -> None:
    """Refuse NaN and infinity in any setting, in lists and mappings as well; options of rewards are their own."""
    for setting in fields(config):
        if setting.name != "rewards":
            _require_finite(setting.name, getattr(config, setting.name, None))


def _require_finite(name: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}; it must be a finite number.")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _require_finite(f"{name}.{key}", entry)
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            _require_finite(f"{name}[{index}]", entry)
