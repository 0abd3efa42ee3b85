"""What a reward is handed: its own copy of every list and dictionary, so that a change it makes stays with it."""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

_ATOMS = frozenset((str, bytes, int, float, bool, complex, type(None)))


def isolated(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A reward's arguments as its own: what it changes in them, no other call sees.

    Lists, tuples, dictionaries and sets are copied at every depth, arrays and tensors too. An image is a view that
    copies its pixels when it is first drawn on. Anything else (the trainer's state, an environment) is handed over as
    it is.
    """
    return {name: _own(value) for name, value in arguments.items()}


def _own(value: Any) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    if isinstance(value, list | deque | set):
        # Long lists are those of token ids and of numbers per token.
        items: Any = value if set(map(type, value)) <= _ATOMS else [_own(item) for item in value]
        if kind is list:
            return list(items)
        same = copy.copy(value)
        same.clear()
        same.update(items) if isinstance(same, set) else same.extend(items)
        return same
    if isinstance(value, tuple):
        parts = [_own(item) for item in value]
        return kind(*parts) if hasattr(value, "_fields") else kind(parts)
    if isinstance(value, dict):
        made: dict[Any, Any] = {} if kind is dict else copy.copy(value)
        for key, item in value.items():
            made[key] = _own(item)
        return made
    if isinstance(value, bytearray):
        return copy.copy(value)
    return _own_data(value)


def _own_data(value: Any) -> Any:
    """Arrays, tensors and images. A value of a package that was never imported is none of them."""
    torch, numpy, pillow = (sys.modules.get(name) for name in ("torch", "numpy", "PIL.Image"))
    if torch is not None and isinstance(value, torch.Tensor):
        return value.clone()
    if numpy is not None and isinstance(value, numpy.ndarray):
        return value.copy() if value.dtype != object else copy.deepcopy(value)
    if pillow is not None and isinstance(value, pillow.Image):
        return _view(value)
    return value


def _view(image: Any) -> Any:
    """The same pixels. Pillow copies those of a read-only image before the first change."""
    image.load()
    kind: Any = type(image)
    view = kind.__new__(kind)
    view.__dict__.update(image.__dict__)
    view.info = dict(image.info)
    view.readonly = 1
    return view
