"""Internal interfaces of other packages that this one relies on, and which of them an installed version lacks."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from functools import reduce
from types import ModuleType
from typing import Any

Modules = str | tuple[str, ...]
"""A module, or where something has lived in turn, the newest place first."""
Hook = tuple[Modules, str, tuple[str, ...]]
"""Module, callable, and parameters that it must take by these names."""


def missing_hooks(hooks: Sequence[Hook]) -> list[str]:
    """Return what of `hooks` is not there, by name; empty if all is there."""
    missing = []
    for modules, name, parameters in hooks:
        found = find_hook(modules, name)
        if found is None:
            missing.append(name_of(modules, name))
            continue
        home, hook = found
        takes = inspect.signature(hook).parameters if parameters else ()
        missing += [f"{home.__name__}.{name}({parameter})" for parameter in parameters if parameter not in takes]
    return missing


def find_hook(modules: Modules, name: str) -> tuple[ModuleType, Any] | None:
    """Return the module that has `name`, and what it is there."""
    for place in (modules,) if isinstance(modules, str) else modules:
        try:
            home = importlib.import_module(place)
            return home, reduce(getattr, name.split("."), home)
        except (ImportError, AttributeError):
            continue
    return None


def name_of(modules: Modules, name: str) -> str:
    """Return how messages call it."""
    return f"{modules if isinstance(modules, str) else modules[0]}.{name}"
