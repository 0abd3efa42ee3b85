"""Builds the virtual environment that everything in this repository runs in. Started by setup.py.

A set-up is a chain of steps (steps.py). Each has a digest of what it depends on; `.venv/setup.json` records
the digests of those that are done, and which one is running. So an unchanged environment is known after
hashing a few files, a change redoes only what follows from it, and an interrupted run goes on, or starts anew
if it left a half package. Standard library only.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from installing import LOCKS, Console, Environment, SetupError
from steps import ROOT, Step, check_machine, find_gpu, plan


def digests(steps: Sequence[Step]) -> dict[str, str]:
    """Step -> digest. Each covers all steps before it: what stands on a changed step is done again."""
    chain = hashlib.sha256()
    result = {}
    for step in steps:
        chain.update(json.dumps([step.name, *step.inputs]).encode())
        result[step.name] = chain.hexdigest()
    return result


def load(environment: Environment) -> None:
    """Read how far an earlier set-up came, into `environment`. A folder that is not ours is left alone."""
    if not environment.folder.exists() or not any(environment.folder.iterdir()):
        return
    if not environment.record.exists():
        raise SetupError(f"{environment.folder} was not made by this set-up: move or delete it, then run make again.")
    try:
        content = json.loads(environment.record.read_text())
        environment.done, environment.running = dict(content["done"]), content["running"]
    except (ValueError, KeyError, TypeError):
        environment.done, environment.running = (
            {},
            "unknown",
        )  # a damaged record: whatever is there is not to be trusted


def is_complete(environment: Environment, wanted: dict[str, str]) -> bool:
    return environment.running is None and environment.done == wanted and environment.python.exists()


def half_installed(site_packages: Path) -> str | None:
    """The first package that an interrupted pip left incomplete, or None.

    pip writes RECORD last and knows a package by its METADATA. So a package with METADATA has to have every
    file of its RECORD, in full size.
    """
    for leftover in site_packages.glob("~*"):
        return leftover.name
    for package in site_packages.glob("*.dist-info"):
        if not (package / "METADATA").exists():
            continue  # unknown to pip: it will be installed over
        record = package / "RECORD"
        if not record.exists():
            return package.name
        with record.open(newline="") as stream:
            for name, _, size in csv.reader(stream):
                path = site_packages / name
                if name.endswith(".pyc"):
                    continue  # Python may have written it again
                if size and (not path.exists() or path.stat().st_size != int(size)):
                    return package.name
    return None


def forget_what_is_stale(environment: Environment, wanted: dict[str, str]) -> None:
    """Keep the steps that still hold, and start anew where the ground under them is gone."""
    if not environment.folder.exists() or (not environment.done and environment.running is None):
        return
    reason = None
    if environment.done.get("venv") != wanted["venv"]:
        reason = "it was made for another Python, place or machine, or its creation was interrupted"
    elif not environment.python.exists():
        reason = "its Python is gone"
    elif environment.running is not None:
        broken = half_installed(environment.site_packages)
        reason = f"an interruption left {broken} incomplete" if broken else None
    if reason is not None:
        print(f"starting {environment.folder.name} anew: {reason}", flush=True)
        discard(environment.folder)
        environment.done, environment.running = {}, None
        return
    environment.done = {name: digest for name, digest in environment.done.items() if wanted.get(name) == digest}
    environment.running = None


def discard(folder: Path) -> None:
    """Remove a tree so that an interruption leaves no half tree under the old name."""
    trash = folder.with_name(folder.name + ".trash")
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(folder, trash)
    shutil.rmtree(trash)


@contextmanager
def lock(environment: Environment) -> Iterator[None]:
    """One set-up at a time. The kernel frees the lock once the last process that holds it is gone."""
    path = environment.folder.with_name(environment.folder.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a")
    except OSError as error:
        raise SetupError(f"{path} cannot be written ({error.strerror}): make its folder writable.") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another set-up is at work on {environment.folder.name}: waiting for it", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        LOCKS.append(handle.fileno())
        try:
            yield
        finally:
            LOCKS.clear()


def set_up(environment: Environment) -> None:
    steps = plan(environment)
    wanted = digests(steps)
    load(environment)
    if is_complete(environment, wanted):
        print(f"set-up: {environment.folder.name} is complete ({environment.runtime})")
        return
    with lock(environment):
        load(environment)  # another one may have finished while this one waited
        if is_complete(environment, wanted):
            return
        forget_what_is_stale(environment, wanted)
        if "packages" not in environment.done:
            check_machine(environment)
        gpu = "no NVIDIA GPU" if environment.runtime == "cpu" else f"NVIDIA GPU ({find_gpu()})"
        print(f"set-up of {environment.folder}: {gpu}, Python {sys.version.split()[0]}", flush=True)
        environment.save()
        console = Console(environment.tty)
        for number, step in enumerate(steps, start=1):
            if environment.done.get(step.name) == wanted[step.name]:
                continue
            console.begin(number, len(steps), step.title)
            environment.running = step.name
            environment.save()
            try:
                step.run(environment, console)
            except BaseException:
                console.broken_off()
                raise
            environment.running = None
            environment.done[step.name] = wanted[step.name]
            environment.save()
            console.end()
        print(f"set-up complete: {environment.folder}", flush=True)


def stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="make setup", description="Create or refresh the virtual environment of rl-lvr."
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the folder to create (default: .venv)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, stop)
    environment = Environment(folder=options.venv.absolute(), runtime="cuda" if find_gpu() else "cpu")
    try:
        set_up(environment)
    except SetupError as error:
        print(f"make setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make setup: interrupted; run make again, it goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
