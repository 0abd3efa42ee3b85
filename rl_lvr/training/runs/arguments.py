"""Arguments of TRL's trainers in the form that the trainers here work with.

A plain config becomes one of this package, and a model given by its path is loaded with its latent format and feedback
map.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import set_seed
from torch import nn
from transformers import AutoProcessor
from transformers.utils.hub import cached_file
from trl import GRPOConfig, SFTConfig
from trl.trainer.utils import create_model_from_path, get_config_model_id

from rl_lvr.errors import UserError
from rl_lvr.latents.feedback import NAME as FEEDBACK
from rl_lvr.latents.feedback import attach_feedback
from rl_lvr.latents.format import FORMAT_FILE, FormatIds, LatentFormat, choose_format
from rl_lvr.models import Family, family_of
from rl_lvr.training.runs.settings import ARGUMENTS_ON_LATENTS, WITH_FORMAT
from rl_lvr.wrapping import unwrapped

STORED = "stored"
"""`latent_format` of a trainer: the format stored with the model; a model without one trains without latents."""
_Config = TypeVar("_Config", bound=GRPOConfig | SFTConfig)


def name_of(model: str | nn.Module) -> str:
    """The path or hub name of a model; empty if it was made in memory."""
    name = model if isinstance(model, str) else get_config_model_id(unwrapped(model).config)
    return str(name)


def config_of(args: Any, kind: type[_Config], plain: type[GRPOConfig] | type[SFTConfig], output_dir: str) -> _Config:
    """`args` as a config of `kind`; None is the default one.

    The values of a config of TRL (`plain`) are kept as they are, and fields that `kind` adds get their defaults. The
    fields are not passed through TRL's `__post_init__` a second time, which refuses what it derived itself.
    """
    if args is None:
        return kind(output_dir)
    if isinstance(args, kind):
        return args
    if not isinstance(args, plain):
        raise TypeError(f"args must be a {plain.__name__} or a {kind.__name__}, not a {type(args).__name__}.")
    made: Any = object.__new__(kind)
    for entry in fields(kind):
        if entry.default is not MISSING:
            made.__dict__[entry.name] = entry.default
        elif entry.default_factory is not MISSING:
            made.__dict__[entry.name] = entry.default_factory()
    made.__dict__.update(args.__dict__)
    made.check()
    return made


@dataclass(frozen=True)
class Loaded:
    """What a trainer is built of, ready for TRL."""

    model: Any
    processor: Any
    peft_config: Any
    family: Family
    markers: FormatIds | None

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)


def loaded(
    model: str | nn.Module,
    config: Any,
    latent_format: LatentFormat | None,
    processor: Any,
    peft_config: Any,
    quantization_config: Any,
) -> Loaded:
    """Load what is given by its path, or not at all, and bind the format to the tokenizer."""
    found = _model(model, config, latent_format, quantization_config)
    if processor is None:  # TRL's: of a model of text alone it is a tokenizer
        processor = AutoProcessor.from_pretrained(
            name_of(found),
            revision=(config.model_init_kwargs or {}).get("revision"),
            truncation_side="left",
            padding_side="left",
            trust_remote_code=config.trust_remote_code,
        )
    family = family_of(found)
    markers = None if latent_format is None else family.bind(latent_format, processor)
    return Loaded(found, processor, _with_feedback(peft_config, found), family, markers)


def refuse_arguments(table: Mapping[str, str], where: str, **given: Any) -> None:
    """Refuse arguments of a trainer that are `given`; `table` says why each cannot be used."""
    for name, why in table.items():
        if given[name]:
            raise UserError(f"{name} cannot be used {where} ({why}): leave it out.")


def format_of(model: str | nn.Module, latent_format: LatentFormat | str | None) -> LatentFormat | None:
    """The format that a trainer's argument stands for; None is without latents.

    `STORED` is the format stored with the model, a name is a preset. A format that disagrees with the stored one is
    refused.
    """
    if latent_format is None:
        return None
    folder = _folder(model)
    stored = None if folder is None else LatentFormat.load(folder)
    if latent_format == STORED:
        return stored
    if isinstance(latent_format, str):
        return choose_format(latent_format, stored, folder or name_of(model))
    if stored is not None:
        latent_format.check_against(stored, str(folder))
    return latent_format


def _model(model: str | nn.Module, args: Any, latent_format: LatentFormat | None, quantization_config: Any) -> Any:
    """The model with the feedback map of its format; a model given by its path is loaded as TRL loads it."""
    given = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        given["quantization_config"] = quantization_config
    if latent_format is not None:
        quantised = given.get("quantization_config")
        refuse_arguments(ARGUMENTS_ON_LATENTS, WITH_FORMAT, quantization_config=quantised)
    folder = _folder(model)
    loaded: Any = model
    if isinstance(model, str):
        set_seed(args.seed)  # as TRL does before it creates a model
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            given["device_map"] = None
        given.setdefault("trust_remote_code", args.trust_remote_code)
        loaded = create_model_from_path(model, **given)
    if latent_format is not None and not hasattr(unwrapped(loaded), FEEDBACK):
        attach_feedback(loaded, latent_format, folder)
    return loaded


def fit_reference(reference: Any, model: Any, latent_format: LatentFormat) -> None:
    """Give a reference model its feedback map: TRL loads it from the model's folder, and does not know of the map."""
    if hasattr(unwrapped(model), FEEDBACK):
        attach_feedback(reference, latent_format, model.config._name_or_path)
        getattr(unwrapped(reference), FEEDBACK).requires_grad_(False)
    refuse_other_vocabulary(model, unwrapped(reference).config, "the reference, which TRL loads from its folder,")


def refuse_other_vocabulary(model: nn.Module, other: Any, what: str) -> None:
    """Refuse a config `other` of `what`, which lies on disk, that has not as many token embeddings as `model`."""
    mine, theirs = (config.get_text_config().vocab_size for config in (unwrapped(model).config, other))
    if mine != theirs:
        raise UserError(
            f"the model has {mine} token embeddings and {what} {theirs}: save the model with its marker tokens, and "
            "start from there."
        )


def _with_feedback(peft_config: Any, model: Any) -> Any:
    """`peft_config`, under which the feedback map is trained whole and saved beside the adapter."""
    saved = [] if peft_config is None else list(peft_config.modules_to_save or [])
    if peft_config is None or not hasattr(unwrapped(model), FEEDBACK) or FEEDBACK in saved:
        return peft_config
    changed = copy.copy(peft_config)
    changed.modules_to_save = [*saved, FEEDBACK]
    return changed


def _folder(model: str | nn.Module) -> Path | None:
    """Where the model's files lie on disk, if a latent format is stored among them or it is a local folder."""
    name = name_of(model)
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    found = cached_file(
        name,
        FORMAT_FILE,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found).parent
