"""Whether two LaTeX expressions are equal, by math-verify in a process of its own.

An expression such as 9^{9^{9^9}} can occupy a computer algebra system for ever, and no thread can be stopped. So the
checker is a child process (math_worker.py) that is ended and started anew when it takes too long.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

START_SECONDS = 120.0
"""Importing sympy on a busy machine."""
SECONDS = 5.0
"""For one comparison."""
LONGEST = 2000
"""Characters of an expression; a longer one is no answer."""


class _Checker:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, gold: str, given: str) -> bool | None:
        """True or False; None if `gold` cannot be read. An answer that takes too long is not equal."""
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            process.stdin.write(json.dumps([gold, given]).encode() + b"\n")
            process.stdin.flush()
            line = _line(process, SECONDS)
            if not line:
                self._end()
                return False
            return json.loads(line)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        worker = Path(__file__).with_name("math_worker.py")
        # -P: this folder must not shadow modules of the same names.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # of an expression that it dies of; why it did not start comes as an answer
            bufsize=0,
        )
        ready = _line(self._process, START_SECONDS)
        if ready.strip() != b'"ready"':
            self._end()
            raise RuntimeError(
                "the checker of kind 'math' did not start: install math-verify, or choose kind numeric or exact"
                + (f" ({json.loads(ready)})" if ready else "")
            )
        return self._process

    def _end(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()
        self._process = None


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """The next line; empty if the process takes longer, or has ended. It writes whole lines, one per question."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.readline() if ready else b""


_checker = _Checker()


@lru_cache(maxsize=65536)
def same_mathematics(gold: str, given: str) -> bool | None:
    """Whether `given` equals `gold`; None if `gold` cannot be read."""
    if len(gold) > LONGEST:
        return None
    return False if len(given) > LONGEST else _checker.ask(gold, given)
