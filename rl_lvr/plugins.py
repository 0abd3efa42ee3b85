"""Where code of others comes from: an entry point, `package.module:name`, or `path/file.py:name`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from rl_lvr.errors import UserError, near_miss

DISTRIBUTION = "rl-lvr"


@dataclass(frozen=True)
class Kind:
    """What is looked for."""

    word: str
    """In messages."""
    group: str
    """Of entry points."""
    thing: str = "function"


@dataclass(frozen=True)
class Found:
    """A function, or a class, before its options."""

    name: str
    """The short name that logs use unless the recipe gives another."""
    where: str
    """For people: the module and who installed it, or the file."""
    target: Callable[..., Any]


def installed(kind: Kind) -> dict[str, list[EntryPoint]]:
    """Entry points of all installed packages by name; more than one where packages use the same name."""
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=kind.group), key=lambda p: (p.name, p.value)):
        # An editable package that is also on the path is seen twice.
        if all(point.value != other.value for other in found.setdefault(point.name, [])):
            found[point.name].append(point)
    return found


def find(kind: Kind, reference: str, beside: Path | None = None) -> Found:
    """What a recipe names. A file is looked for from here, and then in the folder `beside`.

    Raises:
        UserError: If it is not there, or its module cannot be imported.
    """
    place, colon, attribute = reference.rpartition(":")
    if not colon:
        return _from_entry_point(kind, reference)
    what = f"{kind.word} {reference!r}"
    if not place or not attribute.isidentifier():
        raise UserError(f"{what} is not of the form package.module:{kind.thing} or path/file.py:{kind.thing}.")
    if _is_file(place):
        module, where = _module_of_file(what, Path(place), beside), place
    else:
        module, where = _module(what, place), place
    return Found(attribute, f"{where}:{attribute}", _attribute(what, kind, module, attribute))


def located(reference: str, beside: Path | None) -> str:
    """`reference` with the file that it names as `find` would find it: in the folder `beside` where it is not here."""
    place, _, attribute = reference.rpartition(":")
    if beside is None or not _is_file(place) or Path(place).is_file() or not (beside / place).is_file():
        return reference
    return f"{beside / place}:{attribute}"


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place


def load_entry_point(kind: Kind, point: EntryPoint) -> Found:
    """The function or class behind one entry point."""
    owner = f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown package"
    what = f"{kind.word} '{point.name} ({point.value}, from {owner})'"
    module = _module(what, _unshadowed(point))
    return Found(point.name, f"{point.value} ({owner})", _attribute(what, kind, module, point.attr))


def _unshadowed(point: EntryPoint) -> str:
    """The name under which a module of this distribution can be imported.

    A user's own `rewards.py` or `rewards/` in the working directory stands before the package of that name on the path
    of `python -m` and of `accelerate launch`. The package is then imported under another name.
    """
    package, _, rest = point.module.partition(".")
    init = Path(__file__).resolve().parents[1] / package / "__init__.py"
    if point.dist is None or point.dist.name != DISTRIBUTION or not init.is_file():
        return point.module
    found = importlib.util.find_spec(package)
    if found is not None and found.origin is not None and Path(found.origin).resolve() == init:
        return point.module
    alias = f"rl_lvr_{package}"
    if alias not in sys.modules:
        spec = importlib.util.spec_from_file_location(alias, init, submodule_search_locations=[str(init.parent)])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[alias] = module
        spec.loader.exec_module(module)
    return f"{alias}.{rest}"


def _from_entry_point(kind: Kind, name: str) -> Found:
    known = installed(kind)
    points = known.get(name, [])
    if len(points) > 1:
        raise UserError(
            f"{len(points)} installed packages have a {kind.word} {name!r}: "
            f"write {' or '.join(p.value for p in points)}."
        )
    if points:
        return load_entry_point(kind, points[0])
    raise UserError(
        f"no {kind.word} {name!r}{near_miss(name, known)} Installed: {', '.join(known) or 'none'}. "
        f"Your own is named package.module:{kind.thing} or path/file.py:{kind.thing}."
    )


def _module(what: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name + ".").startswith(error.name + "."):
            raise UserError(
                f"{what}: there is no module {error.name!r}; install its package, or name its file."
            ) from error
        raise UserError(f"{what} needs the module {error.name!r}: install it.") from error
    except Exception as error:  # a user's module may fail in any way while it is imported
        raise UserError(f"{what}: importing {name} failed ({type(error).__name__}: {error}).") from error


def _module_of_file(what: str, path: Path, beside: Path | None) -> ModuleType:
    places = [path] if beside is None else [path, beside / path]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        where = "" if len({place.resolve() for place in places}) == 1 else f", nor {places[1]}"
        raise UserError(f"{what}: there is no file {path}{where}.")
    resolved = found.resolve()
    name = f"{resolved.stem}_{hashlib.sha256(str(resolved).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise UserError(f"{what}: {path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise  # `exits_refused` around the call names what was loaded
        raise UserError(f"{what}: {path} failed ({type(error).__name__}: {error}).") from error
    return module


def _attribute(what: str, kind: Kind, module: ModuleType, name: str) -> Callable[..., Any]:
    target = getattr(module, name, None)
    if callable(target):
        return target
    if target is not None:
        raise UserError(f"{what}: {name} is a {type(target).__name__}, not a {kind.thing}.")
    hint = near_miss(name, [n for n, v in vars(module).items() if callable(v)])
    raise UserError(f"{what}: there is no {name!r} in it{hint}")
