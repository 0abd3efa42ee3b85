"""What every process of a vLLM must know about the latents of its model: markers, limits, end tokens.

It comes with the engine's configuration (`additional_config={"latent": {...}}`, which travels to every worker) or is
read from the model folder. Without either, the plugin stays out of the way.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rl_lvr.errors import UserError, near_miss
from rl_lvr.latents.format import FORMAT_FILE, LatentFormat, get_format
from rl_lvr.models import Family, ImageFrame, family_of
from rl_lvr.rollout.binding import Bound, bound
from rl_lvr.rollout.types import Request

MAX_LATENTS = 128
_KEYS = ("format", "max_latents")


@dataclass(frozen=True)
class LatentSettings(Bound):
    """A latent format bound to the model that a vLLM serves."""

    max_latents: int
    """Room per request for the latents that it generates."""
    text_only: bool
    single_picture: bool
    """Prompts with several images look different to vLLM than to transformers."""
    frame: ImageFrame | None
    """Tokens around an image that vLLM writes by itself, beside the image tokens."""

    @property
    def thinks(self) -> bool:
        """Whether the format generates latents at all."""
        return self.markers.start is not None and self.markers.format.feedback == "hidden"


def as_config(format_: LatentFormat, max_latents: int) -> dict[str, Any]:
    """The value of `additional_config` that makes `settings_of` give these settings in every worker."""
    return {"latent": {"format": asdict(format_), "max_latents": max_latents}}


def settings_of(vllm_config: Any) -> LatentSettings | None:
    """The settings of an engine; None if neither its configuration nor its model folder names a latent format."""
    model = vllm_config.model_config
    given = (vllm_config.additional_config or {}).get("latent")
    stored = _stored(model.model)
    if given is not None:
        format_, max_latents = _given(given)
        if stored is not None:
            format_.check_against(stored, model.model)
    elif stored is not None:
        format_, max_latents = stored, MAX_LATENTS
    else:
        return None
    return bind(
        format_,
        model.hf_config,
        _tokenizer(model),
        max_latents=max_latents,
        max_positions=model.max_model_len,
        generation_eos=(model.try_get_generation_config() or {}).get("eos_token_id"),
    )


def settings_for_folder(
    folder: str | Path, format_: LatentFormat, tokenizer: Any, *, max_latents: int, max_positions: int
) -> LatentSettings:
    """What `settings_of` will find in the workers, before there are any."""
    from transformers import AutoConfig, GenerationConfig

    stored = LatentFormat.load(folder)
    if stored is not None:
        format_.check_against(stored, folder)
    eos = None
    if (Path(folder) / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return bind(
        format_,
        config,
        tokenizer,
        max_latents=max_latents,
        max_positions=max_positions,
        generation_eos=eos,
    )


def bind(
    format_: LatentFormat,
    config: Any,
    tokenizer: Any,
    *,
    max_latents: int,
    max_positions: int,
    generation_eos: int | list[int] | None,
) -> LatentSettings:
    """The settings for a model of this transformers config and tokenizer."""
    if max_latents < 1:
        raise UserError(f"max_latents is {max_latents}; it must be at least 1.")
    family = family_of(config)
    _require_class(family)
    found = bound(format_, family, tokenizer, generation_eos, max_positions)
    return LatentSettings(
        found.markers,
        found.limits,
        found.eos,
        max_latents,
        text_only=family.text_only,
        single_picture=family.vllm_single_picture,
        frame=family.vllm_frame(tokenizer),
    )


def _require_class(family: Family) -> None:
    """Refuse a model that vLLM would run without latents, as its own class."""
    architectures = family.config.architectures or ()
    if not any(architecture in family.vllm_classes for architecture in architectures):
        raise UserError(
            f"{family.name} names no class of vLLM for {', '.join(architectures) or 'a config without architectures'}: "
            f"add it to {type(family).__name__}.vllm_classes, or use the engine hf."
        )


def check_room(request: Request, settings: LatentSettings) -> None:
    """Refuse what is known beforehand to need more room than `max_latents` gives."""
    room = settings.max_latents
    vectors = 0 if request.vectors is None else len(request.vectors)
    k = settings.markers.format.k if request.k is None else request.k
    if vectors > room:
        raise UserError(f"{vectors} vectors are more than max_latents ({room}): raise max_latents.")
    if k > room and request.intervention.feeds_vectors and settings.markers.format.length == "fixed":
        raise UserError(f"a span of {k} latents is longer than max_latents ({room}): raise max_latents.")


def _stored(model: str) -> LatentFormat | None:
    """The format beside a checkpoint in a folder, or of a hub name in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    if Path(model).is_dir():
        return LatentFormat.load(model)
    if len(Path(model).parts) != 2:
        return None
    found = try_to_load_from_cache(model, FORMAT_FILE)
    return LatentFormat.load(Path(found).parent) if isinstance(found, str) else None


def _given(values: Any) -> tuple[LatentFormat, int]:
    """`format` is a preset's name or the fields of a LatentFormat."""
    if not isinstance(values, dict) or "format" not in values:
        raise UserError('additional_config["latent"] must be an object with the key format.')
    for key in values:
        if key not in _KEYS:
            hint = near_miss(key, _KEYS, f": it takes {', '.join(_KEYS)}.")
            raise UserError(f'additional_config["latent"] has no key {key!r}{hint}')
    format_ = values["format"]
    if isinstance(format_, str):
        format_ = get_format(format_)
    else:
        try:
            format_ = LatentFormat(**format_)
        except TypeError as error:
            raise UserError(f'additional_config["latent"]["format"] is no latent format ({error}).') from error
    return format_, int(values.get("max_latents", MAX_LATENTS))


def _tokenizer(model_config: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        model_config.tokenizer, trust_remote_code=model_config.trust_remote_code, local_files_only=True
    )
