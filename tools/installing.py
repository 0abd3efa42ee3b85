"""What the set-up works with: the environment in the making, commands with progress, one-sentence failures.

What is installed stands in steps.py. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

UNREACHABLE = re.compile(
    r"NewConnectionError|Failed to establish a new connection|Name or service not known"
    r"|Temporary failure in name resolution|Connection refused|Connection reset by peer"
    r"|Network is unreachable|ConnectTimeoutError|ReadTimeoutError|Read timed out|Max retries exceeded"
    r"|ProxyError|SSLError|Could not fetch URL"
)
NOT_OFFERED = re.compile(r"No matching distribution found for (\S+)")
# With retries switched off pip does not say that an index did not answer: it looks like an empty one.
NOTHING_FOUND = "(from versions: none)"
DISK_FULL = re.compile(r"No space left on device|Errno 28\b|Disk quota exceeded")


LOCKS: list[int] = []  # file descriptors that child processes inherit


class SetupError(Exception):
    """What went wrong and what cures it, in one sentence."""


class NotOfferedError(SetupError):
    """The indexes were reached, and none has the wanted distribution."""


@dataclass
class Environment:
    """A virtual environment under construction: where it is, what for, and how far it got."""

    folder: Path
    runtime: str  # "cpu" or "cuda"
    done: dict[str, str] = field(default_factory=dict)  # step -> digest
    running: str | None = None
    tty: bool = field(default_factory=sys.stdout.isatty)

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def log(self) -> Path:
        return self.folder / "setup.log"

    @property
    def record(self) -> Path:
        return self.folder / "setup.json"

    @property
    def site_packages(self) -> Path:
        return self.folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.record.with_suffix(".part")
        draft.write_text(json.dumps({"done": self.done, "running": self.running}, indent=1) + "\n")
        os.replace(draft, self.record)


class Console:
    """Progress: a line per step, and what a long one is at (rewritten on a terminal, else rarely)."""

    def __init__(self, tty: bool) -> None:
        self.tty = tty
        self.label = ""
        self.started = self.last = time.monotonic()

    def begin(self, number: int, total: int, title: str) -> None:
        self.label = f"[{number}/{total}] {title}"
        self.started = self.last = time.monotonic()
        print(f"{self.label} ...", end="" if self.tty else "\n", flush=True)

    def at(self, activity: str) -> None:
        now = time.monotonic()
        if now - self.last < (0.5 if self.tty else 30.0):
            return
        self.last = now
        line = f"{self.label} ... {now - self.started:.0f} s: {activity}"
        print(f"\r\x1b[K{line[:110]}" if self.tty else line, end="" if self.tty else "\n", flush=True)

    def end(self) -> None:
        start = "\r\x1b[K" if self.tty else ""
        print(f"{start}{self.label}: done in {time.monotonic() - self.started:.1f} s", flush=True)

    def broken_off(self) -> None:
        if self.tty:
            print()


def run(command: Sequence[str | Path], environment: Environment, console: Console) -> str:
    """Run a command, its output appended to the log and returned; a failure becomes a SetupError."""
    # Settings of the calling shell that would send packages or imports somewhere else.
    elsewhere = {
        "PYTHONPATH",
        "PYTHONHOME",
        "VIRTUAL_ENV",
        "PIP_USER",
        "PIP_TARGET",
        "PIP_PREFIX",
        "PIP_ROOT",
    }
    variables = {name: value for name, value in os.environ.items() if name not in elsewhere}
    words = [str(word) for word in command]
    with environment.log.open("ab") as log:
        log.write(f"\n$ {' '.join(words)}\n".encode())
        log.flush()
        begin = log.tell()
        # The lock travels with the child: if this process is killed, the next set-up waits for a live pip.
        child = subprocess.Popen(
            words,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=variables,
            pass_fds=LOCKS,
        )
        try:
            while True:
                try:
                    status = child.wait(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    console.at(last_activity(environment.log))
        except BaseException:
            child.terminate()
            child.wait()
            raise
    with environment.log.open("rb") as log:
        log.seek(begin)
        output = log.read().decode(errors="replace")
    if status != 0:
        raise explain(output, environment)
    return output


def last_activity(log: Path) -> str:
    """What pip said last, without the sizes and addresses that follow."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 4000))
        lines = stream.read().decode(errors="replace").split("\n")
    telling = [
        line.strip() for line in lines if re.match(r"\s*(Collecting|Downloading|Building|Installing|Processing)", line)
    ]
    if not telling:
        return "starting"
    verb, what = telling[-1].split()[:2]
    return f"{verb} {what.rsplit('/', 1)[-1]}"


def explain(output: str, environment: Environment) -> SetupError:
    """A failed command's output as one sentence with a cure."""
    log = f"the whole log is {environment.log}"
    missing = NOT_OFFERED.search(output)
    if DISK_FULL.search(output):
        return SetupError(f"the disk is full: free some space and run make again, it goes on from here; {log}.")
    if UNREACHABLE.search(output):
        return SetupError(
            "no package index could be reached: check the network and pip's settings (`pip config list`) "
            f"and run make again, it goes on from here; {log}."
        )
    if missing:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        if NOTHING_FOUND in output:
            return SetupError(
                f"pip found no {missing[1]} at all for Python {version}: check the network and pip's "
                f"settings (`pip config list`) and run make again, it goes on from here; {log}."
            )
        return NotOfferedError(
            f"the package indexes that pip is set to use do not offer {missing[1]} for Python {version} "
            f"on this machine: try another Python (`make PYTHON=python3.11 setup`) or another index; {log}."
        )
    tail = "\n".join(output.strip().split("\n")[-15:])
    print(f"\n{tail}", file=sys.stderr)
    return SetupError(f"a step of the set-up failed, its last lines are above; {log}.")


def pip(environment: Environment, console: Console, *arguments: str | Path) -> str:
    words = [environment.python, "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    return run(words, environment, console)
