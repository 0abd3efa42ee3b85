"""Which family a model belongs to, and how a third party adds one."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from torch import nn

from rl_lvr.errors import UserError
from rl_lvr.models.base import Family
from rl_lvr.models.internvl import InternVL
from rl_lvr.models.llava_onevision import LlavaOnevision
from rl_lvr.models.qwen import Qwen2_5VL, Qwen3VL
from rl_lvr.models.text import TextOnly
from rl_lvr.wrapping import unwrapped

AnyFamily = TypeVar("AnyFamily", bound=type[Family])

_FAMILIES: dict[str, type[Family]] = {}


def required_members() -> dict[str, str]:
    """What an adapter must give, with a line on each: class attributes, then methods."""
    attributes = {
        "name": "what users call the family",
        "model_types": "config.model_type values that belong to it",
        "image_keys": "names of the forward's inputs that belong to images",
    }
    methods = {
        name: (inspect.getdoc(getattr(Family, name)) or "").splitlines()[0]
        for name in sorted(Family.__abstractmethods__)
    }
    return attributes | methods


class UnsupportedFamily(UserError):  # noqa: N818 - as KeyboardInterrupt
    """No adapter is registered for a model's type."""

    def __init__(self, model_type: str) -> None:
        members = "; ".join(f"{name} ({line.rstrip('.')})" for name, line in required_members().items())
        names = ", ".join(dict.fromkeys(family.name for family in _FAMILIES.values()))
        super().__init__(
            f"no adapter for model type {model_type!r}; supported are {names}. To add one, derive from "
            f"rl_lvr.models.Family, pass the class to rl_lvr.models.register_family, and give: {members}."
        )
        self.model_type = model_type


def register_family(family: AnyFamily) -> AnyFamily:
    """Add a family; usable as a class decorator. Refuses an incomplete one and a model type that is taken."""
    missing = [name for name in ("name", "model_types", "image_keys") if not hasattr(family, name)]
    missing += sorted(family.__abstractmethods__)
    if missing:
        raise UserError(f"family {family.__name__} is incomplete: it must give {', '.join(missing)}.")
    for model_type in family.model_types:
        if model_type in _FAMILIES:
            raise UserError(
                f"model type {model_type!r} already belongs to {_FAMILIES[model_type].name}; "
                f"take it out of {family.__name__}.model_types."
            )
    _FAMILIES.update(dict.fromkeys(family.model_types, family))
    return family


def family_of(model_or_config: Any) -> Family:
    """The family of a model (wrapped or not) or of a config, bound to its config."""
    config = unwrapped(model_or_config).config if isinstance(model_or_config, nn.Module) else model_or_config
    return family_class(config.model_type)(config)


def family_class(model_type: str) -> type[Family]:
    """The adapter of a `config.model_type`; raises UnsupportedFamily."""
    if model_type not in _FAMILIES:
        raise UnsupportedFamily(model_type)
    return _FAMILIES[model_type]


for _family in (Qwen2_5VL, Qwen3VL, InternVL, LlavaOnevision, TextOnly):
    register_family(_family)
