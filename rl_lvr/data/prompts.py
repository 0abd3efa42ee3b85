"""Records as prompts to be answered: the rows that TRL's GRPO reads, and what a record must hold for its rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import datasets

from rl_lvr.data.encoding import Encoder
from rl_lvr.data.record import Record
from rl_lvr.data.records import Records
from rl_lvr.data.schema import LATENT, Problem, content_text
from rl_lvr.data.sources import RowError

COLUMNS = ("prompt", "images", "id", "answer", "category")
"""Of every row. The entries of a record's `meta` are further columns."""


class PromptJudge:
    """Refuses records that cannot be answered or not be rewarded, and notes the names in `meta`."""

    def __init__(
        self,
        encoder: Encoder,
        needed: Mapping[str, str],
        taken: Sequence[str],
        *,
        room: int = 0,
        limit: int | None = None,
    ) -> None:
        """`needed`: columns and the reward that each is needed for. `taken`: names that no column may have. `room` and
        `limit` are those of `Encoder.judge`."""
        self.encoder, self.room, self.limit = encoder, room, limit
        self.needed = needed
        self.taken = frozenset((*COLUMNS, *taken))
        self.meta: set[str] = set()

    def __call__(self, record: Record) -> None:
        # Targets are of no interest here, so they need not fit the format.
        self.encoder.judge(replace(record, latents=None), learned=False, room=self.room, limit=self.limit)
        for index, message in enumerate(record.prompt_messages):
            text = content_text(message["content"])
            if LATENT in text or self.encoder.control.found(text) is not None:  # a span as literal markers
                self._refuse(
                    record,
                    f"messages[{index}].content",
                    "has latents in the prompt, which nothing fills",
                    "begin with a record whose spans stand in its last answer",
                )
        for name in record.meta:
            if name in self.taken:
                self._refuse(record, f"meta.{name}", "hides a column of that name", "rename it")
        for name, reward in self.needed.items():
            value = _column(record, name)
            if value is None:
                where = name if name in COLUMNS else f"meta.{name}"
                self._refuse(record, where, f"is missing, and reward {reward!r} needs it", "add it, or drop the reward")
        self.meta.update(record.meta)

    @staticmethod
    def _refuse(record: Record, where: str, what: str, cure: str) -> None:
        raise RowError(Problem(where, what, cure), f"record {record.id!r}")


def prompt_rows(records: Records, meta: set[str]) -> datasets.Dataset:
    """One row per record, made when it is read: `COLUMNS` and `meta`, None where a record lacks one.

    `prompt` holds the messages before the assistant's last one, `images` the decoded images of its image parts.
    """
    rows = datasets.Dataset.from_dict({"index": range(len(records))})
    return rows.with_transform(_Rows(records, sorted(meta)))


class _Rows:
    """A transform: it, and so the data set, can be sent to the workers of a data loader."""

    def __init__(self, records: Records, meta: Sequence[str]) -> None:
        self.records, self.meta = records, meta

    def __call__(self, batch: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        # A group repeats its row: the images are decoded once.
        once = {index: self._row(self.records[index]) for index in dict.fromkeys(batch["index"])}
        rows = [once[index] for index in batch["index"]]
        return {name: [row[name] for row in rows] for name in (*COLUMNS, *self.meta)}

    def _row(self, record: Record) -> dict[str, Any]:
        columns = {name: _column(record, name) for name in ("id", "answer", "category", *self.meta)}
        return {"prompt": record.prompt_messages, "images": record.open_images(), **columns}


def _column(record: Record, name: str) -> Any:
    return getattr(record, name) if name in COLUMNS[2:] else record.meta.get(name)
