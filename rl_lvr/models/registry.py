"""Which family a model belongs to, and how a third party adds one."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from torch import nn

from rl_lvr.errors import UserError
from rl_lvr.models.base import Family
from rl_lvr.plugins import Kind, installed, load_entry_point
from rl_lvr.wrapping import unwrapped

AnyFamily = TypeVar("AnyFamily", bound=type[Family])

KIND = Kind("family", "rl_lvr.families", "class")
"""Entry points are named by model type. Our own families are found the same way as those of other packages."""
BIDIRECTIONAL = (
    *("gemma3", "gemma4", "gemma4_unified", "diffusion_gemma", "paligemma", "pi0", "git"),
    *("deepseek_ocr2", "step3p7"),
)
"""Model types of transformers whose attention is not causal over images or prompts."""

_FAMILIES: dict[str, type[Family]] = {}
"""By model type, those that were loaded or added so far."""


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
    """A model's type has no adapter, or can have none."""

    def __init__(self, model_type: str) -> None:
        super().__init__(self._bidirectional(model_type) if model_type in BIDIRECTIONAL else self._unknown(model_type))
        self.model_type = model_type

    @staticmethod
    def _bidirectional(model_type: str) -> str:
        return (
            f"model type {model_type!r} is not supported: its attention is bidirectional over images, and latent spans "
            "and signals assume causal attention. Use a family with causal attention."
        )

    @staticmethod
    def _unknown(model_type: str) -> str:
        members = "; ".join(f"{name} ({line.rstrip('.')})" for name, line in required_members().items())
        names = ", ".join(dict.fromkeys(family_class(known).name for known in model_types()))
        return (
            f"no adapter for model type {model_type!r}; supported are {names}. To add one, derive from "
            f"rl_lvr.models.Family, name the class in the entry-point group {KIND.group} under its model type (or pass "
            f"it to rl_lvr.models.register_family), and give: {members}."
        )


def register_family(family: AnyFamily) -> AnyFamily:
    """Add a family in this process; usable as a class decorator.

    Other processes, such as vLLM's workers, find families by their entry points only.

    Raises:
        UserError: If the family is incomplete, or one of its model types is refused or belongs to another.
    """
    _check(family)
    for model_type in family.model_types:
        owner = family_class(model_type) if model_type in model_types() else None
        if owner is not None:
            raise UserError(
                f"model type {model_type!r} already belongs to {owner.name}; "
                f"take it out of {family.__name__}.model_types."
            )
    _FAMILIES.update(dict.fromkeys(family.model_types, family))
    return family


def _check(family: type[Family]) -> None:
    missing = [name for name in ("name", "model_types", "image_keys") if not hasattr(family, name)]
    missing += sorted(family.__abstractmethods__)
    if missing:
        raise UserError(f"family {family.__name__} is incomplete: it must give {', '.join(missing)}.")
    for model_type in family.model_types:
        if model_type in BIDIRECTIONAL:
            raise UnsupportedFamily(model_type)


def model_types() -> list[str]:
    """All model types that have a family, in this process and by entry points."""
    return sorted({*_FAMILIES, *installed(KIND)})


def family_of(model_or_config: Any) -> Family:
    """The family of a model (wrapped or not) or of a config, bound to its config."""
    config = unwrapped(model_or_config).config if isinstance(model_or_config, nn.Module) else model_or_config
    return family_class(config.model_type)(config)


def family_class(model_type: str) -> type[Family]:
    """The adapter of a `config.model_type`.

    Raises:
        UnsupportedFamily: If there is none, or the model's attention is not causal.
        UserError: If an entry point cannot be used.
    """
    if model_type not in _FAMILIES:
        _FAMILIES[model_type] = _from_entry_point(model_type)
    return _FAMILIES[model_type]


def _from_entry_point(model_type: str) -> type[Family]:
    known = installed(KIND)
    if not known:
        raise UserError(
            "no family is installed, not even rl-lvr's own: its entry points are out of date. Install it again "
            "(make setup, or pip install -e .)."
        )
    points = known.get(model_type, [])
    if not points or model_type in BIDIRECTIONAL:
        raise UnsupportedFamily(model_type)
    if len(points) > 1:
        raise UserError(
            f"{len(points)} installed packages have a family for model type {model_type!r} "
            f"({', '.join(point.value for point in points)}): uninstall all but one."
        )
    found = load_entry_point(KIND, points[0])
    family: Any = found.target
    if not (isinstance(family, type) and issubclass(family, Family)):
        raise UserError(f"family {found.where} is no subclass of rl_lvr.models.Family: derive it from that.")
    _check(family)
    if model_type not in family.model_types:
        raise UserError(
            f"the entry point {model_type!r} names {found.where}, whose model_types are "
            f"{', '.join(family.model_types)}: name the entry point after one of them."
        )
    return family
