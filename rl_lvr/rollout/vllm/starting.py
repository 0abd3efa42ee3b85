"""A vLLM that cannot start says so in one sentence; its tracebacks go into a file that the sentence names."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rl_lvr.errors import UserError

LONGEST = 400
_TROUBLE = re.compile(rb"Traceback \(most recent call last\)|\bERROR\b|^Process \w+")
_REASON = re.compile(r"(?:^|[\s\]])(?:[\w.]*\.)?(\w*(?:Error|Exception)): (.+)$", re.MULTILINE)
_HERALDS = ("Engine core initialization failed", "WorkerProc initialization failed")
"""How vLLM's processes tell each other that one of them has failed, without the reason."""


@contextmanager
def one_sentence(*, processes: bool) -> Iterator[None]:
    """Turn any failure inside into a UserError with the reason and the place of the log.

    `processes`: the start makes processes, which write their own tracebacks. What they say goes on to this process's
    stderr as it comes, but not from the first sign of trouble until it is known how the start ended.
    """
    handle, name = tempfile.mkstemp(prefix="rl-lvr-vllm-", suffix=".log")
    os.close(handle)
    log = Path(name)
    relay = _Relay(log) if processes else None
    failed = False
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        failed = True
        if relay is not None:
            relay.end(forward=False)
        said = log.read_text(encoding="utf-8", errors="replace")
        with log.open("a", encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)))
        raise UserError(f"vLLM could not start: {_reason(said, error)} Its log is {log}.") from error
    finally:
        if not failed:
            if relay is not None:
                relay.end(forward=True)
            log.unlink()


def _reason(said: str, error: Exception) -> str:
    """The last error in a log that is not about another, else `error` itself; a sentence."""
    text = f"{type(error).__name__}: {error}"
    found = [words for words in _REASON.findall(f"{text}\n{said}") if not words[1].startswith(_HERALDS)]
    kind, words = found[-1] if found else ("", " ".join(str(error).replace("See root cause above. ", "").split()))
    sentence = words if kind in ("", "UserError", "ValueError", "RuntimeError") else f"{kind}: {words}"
    sentence = sentence.strip()[:LONGEST]
    return sentence if sentence.endswith(".") else f"{sentence}."


class _Relay:
    """What this process and those that it starts write to stdout and stderr: into a file, and on to stderr.

    The processes keep writing here for as long as they live; this one gets its own stdout and stderr back at `end`.
    """

    def __init__(self, log: Path) -> None:
        self._log = log.open("wb", buffering=0)
        self._held: list[bytes] | None = None
        self._lock = threading.Lock()
        self._stage = "starting"
        self._own = [os.dup(1), os.dup(2)]
        reading, writing = os.pipe()
        self._flush()
        for number in (1, 2):
            os.dup2(writing, number)
        os.close(writing)
        self._thread = threading.Thread(target=self._pass_on, args=(reading,), daemon=True)
        self._thread.start()

    def end(self, *, forward: bool) -> None:
        """Give this process its outputs back; what was held back goes on, or stays in the file alone."""
        self._flush()
        for number, own in zip((1, 2), self._own, strict=True):
            os.dup2(own, number)
        if not forward:
            self._thread.join(2.0)  # until the processes that failed are gone, and have said all
        with self._lock:
            self._stage = "running" if forward else "failed"
            if forward and self._held:
                self._write(b"".join(self._held))
            self._held = None
            self._log.close()
            os.close(self._own[0])

    def _flush(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    def _pass_on(self, reading: int) -> None:
        with open(reading, "rb") as lines:
            for line in lines:
                with self._lock:
                    self._take(line)

    def _take(self, line: bytes) -> None:
        if self._stage == "running":
            self._write(line)
        if self._stage != "starting":
            return
        self._log.write(line)
        if self._held is None and _TROUBLE.search(line):
            self._held = []
        if self._held is None:
            self._write(line)
        else:
            self._held.append(line)

    def _write(self, data: bytes) -> None:
        os.write(self._own[1], data)
