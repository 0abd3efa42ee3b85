"""Answers as rows of a JSONL file: the one input of all statistics. Free of torch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rl_lvr.answers import Kind, Source, Verdict, kind_of, match
from rl_lvr.errors import UserError

Key = tuple[str, str, int]
"""id, condition, seed"""


@dataclass(frozen=True)
class Row:
    """One answer to one question under one condition."""

    id: str
    condition: str
    answer: str
    """The reference."""
    text: str
    """The completion without latent spans and special tokens."""
    extracted: str | None
    """The answer in it; None if none can be read."""
    right: bool
    rule: str
    """How the two were compared: the kind of answer, and where it was looked for unless that is `any`."""
    latents: int
    """How many the engine fed."""
    cluster: str
    category: str | None
    seed: int
    donor: str | None = None
    """The question whose latents were fed."""
    signals: dict[str, float | None] = field(default_factory=dict)
    """Of the own latents; None where a completion has nothing to measure."""

    @property
    def key(self) -> Key:
        return self.id, self.condition, self.seed

    def to_json(self) -> str:
        row = asdict(self)
        for name in ("donor", "signals"):
            if not row[name]:
                del row[name]
        return json.dumps(row, ensure_ascii=False)


@dataclass(frozen=True)
class Rule:
    """How an answer is found and compared."""

    kind: Kind = "auto"
    source: Source = "any"
    tolerance: float = 1e-6

    def judge(self, text: str, answer: str) -> tuple[str | None, bool, str]:
        """What `text` answers, whether that is `answer`, and the rule's name.

        Raises:
            UserError: If the reference cannot be read.
        """
        found = match(text, answer, self.kind, self.source, self.tolerance)
        kind = kind_of(answer) if self.kind == "auto" else self.kind
        if found.verdict is Verdict.UNSCORED:
            raise UserError(
                f"the reference {answer!r} is no answer of kind {kind}: correct it, or choose another kind."
            )
        readable = found.verdict is not Verdict.UNREADABLE
        name = kind if self.source == "any" else f"{kind}, {self.source}"
        return found.text if readable else None, found.verdict is Verdict.RIGHT, name

    def require_readable(self, answers: Iterable[str]) -> None:
        """Refuse references that cannot be read, before any question is asked."""
        for answer in answers:
            self.judge("", answer)


class AnswerFile:
    """The rows of an evaluation on disk, and beside them what they were made with.

    Rows are appended as they come; a second evaluation goes on where the first one ended. Nothing is written, and
    nothing is deleted, before `begin`.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """
        Args:
            path: `.jsonl`. `begin` makes the folder.
            settings: What rows of one file have in common.
            overwrite: Start anew: `begin` deletes what is there.

        Raises:
            UserError: If the file holds answers that were made with other settings, or is damaged.
        """
        self.path = path
        self.settings = dict(settings)
        self.rows: list[Row] = []
        self.done: set[Key] = set()
        self._overwrite = overwrite
        if path.is_file() and not overwrite:
            self._check_settings()
            self._take(read_rows(path))

    @property
    def summary_path(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def latents_folder(self) -> Path:
        """Of the own latents that other conditions are made of."""
        return self.path.with_suffix(".latents")

    def begin(self) -> None:
        """Get ready to add rows. The figures of an earlier evaluation stay until `close`."""
        if self._overwrite:
            self.path.unlink(missing_ok=True)
            self.summary_path.unlink(missing_ok=True)
            shutil.rmtree(self.latents_folder, ignore_errors=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            cut_off(self.path)
        else:
            self._write_summary({})

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows; they are on disk when this returns."""
        new = [row for row in rows if row.key not in self.done]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(f"{row.to_json()}\n" for row in new)
            file.flush()
            os.fsync(file.fileno())
        self._take(new)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write the summary beside the rows."""
        self._write_summary(summary)

    def _take(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        self.done |= {row.key for row in rows}

    def _check_settings(self) -> None:
        try:
            known = json.loads(self.summary_path.read_text(encoding="utf-8"))["settings"]
            unequal = [name for name in self.settings if name in known and known[name] != self.settings[name]]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.path} is there, and {self.summary_path.name} beside it does not say what it was made with: "
                "choose another file for --out, or delete it."
            ) from None
        if unequal:
            name = unequal[0]
            raise UserError(
                f"{self.path} holds answers with {name} {_short(known[name])}, and this evaluation has "
                f"{_short(self.settings[name])}: choose another file for --out, or start anew with --overwrite."
            )
        self.settings = {**known, **self.settings}

    def _write_summary(self, summary: Mapping[str, Any]) -> None:
        text = json.dumps({"settings": self.settings, **summary}, indent=1, ensure_ascii=False)
        partial = self.summary_path.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.summary_path)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def cut_off(path: Path) -> None:
    """Cut off a last line that was not written whole, as a kill leaves it."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a `.jsonl` file, but for a last line that was not written whole.

    Raises:
        UserError: If a row is damaged.
    """
    path = Path(path)
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    names = {entry.name for entry in fields(Row)}
    rows = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            values = json.loads(line)
            rows.append(Row(**{name: value for name, value in values.items() if name in names}))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number} is no answer of an evaluation ({error}): remove it.") from error
    return rows


def by_condition(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each condition, in the order of their first rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.condition, []).append(row)
    return found
