"""Puzzle sets on disk: train, val and test files with a manifest; never over another set."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rl_lvr.data.puzzles import SPLITS, PuzzleConfig, chance, iterate
from rl_lvr.data.record import Record
from rl_lvr.data.writing import write_jsonl, write_parquet
from rl_lvr.errors import UserError
from rl_lvr.progress import track

MANIFEST = "puzzles.json"
FORMATS = ("parquet", "jsonl")
_VERSION = 2  # of the draw: raise it when the same config no longer gives the same puzzles


def make_pointers(
    config: PuzzleConfig,
    counts: Mapping[str, int],
    out: str | Path,
    file_format: str = "parquet",
    force: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Write `counts[split]` puzzles per split into `out`; returns the manifest, and whether it was made now.

    The same settings give the same bytes. All is written into a folder beside `out` and moved when it is
    complete, the manifest last.
    """
    out = Path(out).resolve()
    counts = {split: counts[split] for split in counts if counts[split]}
    if file_format not in FORMATS:
        raise UserError(f"puzzle file format {file_format!r} is unknown: choose from {', '.join(FORMATS)}.")
    if not counts:
        raise UserError("a puzzle set without puzzles: give a number above 0 for train, val or test.")
    manifest: dict[str, Any] = {
        "kind": "pointers",
        "version": _VERSION,
        "format": file_format,
        "config": config.to_json(),
        "span_length": config.span_length,
        "chance": chance(config),
        "splits": {split: {"file": f"{split}.{file_format}", "records": n} for split, n in counts.items()},
    }
    if _is_there(out, manifest, force):
        return json.loads((out / MANIFEST).read_text(encoding="utf-8")), False

    fresh = out.parent / f".{out.name}.unfinished"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another --out.") from error
    try:
        _write(fresh, config, manifest)
        _move(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return manifest, True


def _write(folder: Path, config: PuzzleConfig, manifest: dict[str, Any]) -> None:
    write = {"parquet": write_parquet, "jsonl": write_jsonl}[manifest["format"]]
    for split, entry in manifest["splits"].items():
        write(_shown(config, entry["records"], split), folder / entry["file"])
        entry["sha256"] = _digest(folder, split)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _move(fresh: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    for old in (out / MANIFEST, *_files(out)):  # with --force: the older set, its manifest first
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    for new in (*_files(fresh), fresh / MANIFEST):
        os.replace(new, out / new.name)


def _shown(config: PuzzleConfig, n: int, split: str) -> Iterator[Record]:
    return track(iterate(config, n, split), f"making {split}", n, "puzzles")


def _is_there(out: Path, wanted: dict[str, Any], force: bool) -> bool:
    """True if `out` holds this very set, unchanged; an error if it holds another and `force` is not given."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out.")
    if force:
        return False
    if not (out / MANIFEST).exists():
        found = next(_files(out), None)
        if found is not None:
            raise UserError(
                f"{found} is in the way, and {out} has no {MANIFEST} that says what it is: "
                "choose another --out, or give --force to replace it."
            )
        return False
    try:
        present = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        digests = {split: entry.pop("sha256") for split, entry in present["splits"].items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{out / MANIFEST} cannot be read: choose another --out, or give --force to replace the set."
        ) from error
    if present != wanted:
        raise UserError(
            f"{out} holds another puzzle set ({_difference(present, wanted)}): "
            "choose another --out, or give --force to replace it."
        )
    for split, digest in digests.items():
        if _digest(out, split) != digest:
            raise UserError(
                f"{out} holds this set, but its {split} files have been changed since: "
                "choose another --out, or give --force to make it again."
            )
    return True


def _difference(present: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first setting that differs, to say why a set is another one."""

    def flat(manifest: dict[str, Any]) -> dict[str, Any]:
        counts = {split: entry.get("records") for split, entry in manifest["splits"].items()}
        rest = {k: v for k, v in manifest.items() if k not in ("config", "splits")}
        return {**(manifest.get("config") or {}), **counts, **rest}

    old, new = flat(present), flat(wanted)
    name = next(key for key in (*new, *old) if old.get(key) != new.get(key))
    return f"{name} {old.get(name)}, not {new.get(name)}"


def _files(folder: Path) -> Iterator[Path]:
    """What a set may consist of, as far as it is there."""
    for split in SPLITS:
        for name in (f"{split}.parquet", f"{split}.jsonl", f"{split}_images"):
            if (folder / name).exists():
                yield folder / name


def _digest(folder: Path, split: str) -> str:
    """SHA-256 over the names and bytes of a split's files."""
    digest = hashlib.sha256()
    tops = [path for path in _files(folder) if path.name.startswith((f"{split}.", f"{split}_"))]
    for top in tops:
        for file in sorted(top.iterdir()) if top.is_dir() else [top]:
            digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
