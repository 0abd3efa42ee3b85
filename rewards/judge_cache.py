"""Scores of a judge on disk: one JSON line each, appended; a line that cannot be read is a score not known."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class JudgeCache:
    """Scores by key, in memory and, if there is a path, in a JSONL file that several processes may append to."""

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else Path(path)
        self._lock = threading.Lock()
        self._scores: dict[str, float] = {}
        if self._path is not None and self._path.is_file():
            self._scores = _read(self._path)

    @staticmethod
    def key(url: str, body: dict[str, Any], scale: Sequence[float]) -> str:
        """Everything that a score depends on."""
        return hashlib.sha256(json.dumps([url, body, list(scale)], sort_keys=True).encode()).hexdigest()

    def __contains__(self, key: str) -> bool:
        return key in self._scores

    def __getitem__(self, key: str) -> float:
        return self._scores[key]

    def __setitem__(self, key: str, score: float) -> None:
        self._scores[key] = score
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "score": score}) + "\n"
        with self._lock, self._path.open("a+b") as file:
            if file.seek(0, 2):
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # cut off by a crash; what follows must not be glued to it
                    line = "\n" + line
            file.write(line.encode())


def _read(path: Path) -> dict[str, float]:
    scores = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            scores[str(entry["key"])] = float(entry["score"])
        except (ValueError, KeyError, TypeError):
            continue
    return scores
