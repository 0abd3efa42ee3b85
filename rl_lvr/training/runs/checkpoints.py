"""Checkpoints on disk: sealed with a digest of every file, verified before anything in them is read, rotated.

A checkpoint is written into `.partial` of its run and renamed once it is sealed, so a folder `checkpoint-N` is whole
or was damaged later. Needs no torch; what a trainer puts into a checkpoint is in `resuming.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from rl_lvr.errors import UserError
from rl_lvr.latents.format import LatentFormat

MANIFEST = "manifest.json"
PARTIAL = ".partial"
_READERS = 4
_STATE = "trainer_state.json"
"""Of transformers, which writes it last."""


def seal(folder: Path) -> None:
    """Write the manifest: size and SHA-256 of every file. All of it is on the disk when this returns.

    Costs one reading of the checkpoint, 1 to 2 seconds for a gigabyte on one core; files are read four at a time.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)

    def entry(path: Path) -> dict[str, int | str]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return {"size": path.stat().st_size, "sha256": _digest(path)}

    with ThreadPoolExecutor(_READERS) as pool:
        names = [path.relative_to(folder).as_posix() for path in paths]
        entries = dict(zip(names, pool.map(entry, paths), strict=True))
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"written": time.time(), "files": entries}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def publish(partial: Path, run: Path) -> Path:
    """Move a sealed checkpoint to its place in the run; one of the same step that lies there is replaced."""
    place = run / partial.name
    if place.exists():
        place.rename(partial.with_name("replaced"))
    partial.rename(place)
    shutil.rmtree(partial.parent)
    return place


def tidy(run: Path) -> None:
    """Clear away what a killed run left half-written. What was sealed but not yet moved is moved."""
    for left in (run / PARTIAL).glob("checkpoint-*"):
        if defect(left) is None and defect(run / left.name) is not None:
            publish(left, run)
            return
    if (run / PARTIAL).exists():
        shutil.rmtree(run / PARTIAL)


def defect(folder: Path) -> str | None:
    """What is wrong with a checkpoint, as the rest of a sentence; None if every file is as it was written."""
    if not folder.is_dir():
        return "is no folder"
    if not (folder / MANIFEST).is_file():
        return f"was not written to its end (it has no {MANIFEST})"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"has a damaged {MANIFEST}"

    for name, (size, _) in expected.items():  # cheap, so before any digest
        if not (folder / name).is_file():
            return f"lacks its file {name}"
        found = (folder / name).stat().st_size
        if found != size:
            return f"has a file {name} of {found} bytes, which was written with {size}"

    with ThreadPoolExecutor(_READERS) as pool:
        digests = dict(zip(expected, pool.map(lambda name: _digest(folder / name), expected), strict=True))
    altered = [name for name, (_, digest) in expected.items() if digests[name] != digest]
    return f"has an altered file {altered[0]}" if altered else None


def foreign(folder: Path) -> bool:
    """Whether a checkpoint was written by TRL or transformers alone: whole as far as can be told, but not sealed."""
    return (folder / _STATE).is_file() and not (folder / MANIFEST).exists() and not any(folder.glob("moment-*.json"))


def unfit(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed, as the rest of a sentence. One that is `foreign` cannot be verified."""
    return None if foreign(folder) else defect(folder)


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint written last of those that verify, and a clause about each one passed over on the way."""
    passed: list[str] = []
    for folder in _newest_first(run):
        wrong = unfit(folder)
        if wrong is None:
            return folder, passed
        passed.append(f"{folder.name} {wrong}")
    return None, passed


def require_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint that is not as it was written, and name the one to take instead."""
    wrong = unfit(checkpoint)
    if wrong is None:
        return
    other, _ = newest_whole(checkpoint.parent)
    cure = f"resume from {other}" if other else "there is no whole one beside it: start the run anew"
    raise UserError(f"checkpoint {checkpoint} {wrong}: {cure}.")


def require_format(checkpoint: str | Path, latent_format: LatentFormat | None) -> None:
    """Refuse a checkpoint that was trained with another latent format than this run has, or with none."""
    stored = LatentFormat.load(checkpoint)
    if stored != latent_format:
        raise UserError(
            f"checkpoint {checkpoint} was trained {f'with {stored}' if stored else 'without latents'}, "
            f"this run asks for {latent_format or 'none'}: resume with the settings that it was started with."
        )


def rotate(run: Path, limit: int | None, *keep: str | Path | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never those to `keep`."""
    if not limit or limit < 1:
        return
    kept = {Path(path).resolve() for path in keep if path is not None}
    folders = list(_newest_first(run))
    excess = len(folders) - limit
    for folder in reversed(folders):
        if excess > 0 and folder.resolve() not in kept:
            shutil.rmtree(folder)
            excess -= 1


def _newest_first(run: Path) -> Iterator[Path]:
    """By the time of writing: a run that went on from an earlier checkpoint may have later steps that are older."""
    folders = [p for p in run.glob("checkpoint-*") if p.is_dir() and p.name[11:].isdigit()]
    return iter(sorted(folders, key=lambda folder: (_written(folder), int(folder.name[11:])), reverse=True))


def _written(folder: Path) -> float:
    try:
        return float(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["written"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder.stat().st_mtime


def _digest(path: Path) -> str:
    status = path.stat()
    return _read_digest(path, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=4096)
def _read_digest(path: Path, *_: int) -> str:
    """Once per state of the file: a start verifies a checkpoint when it is chosen and again when it is loaded."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
