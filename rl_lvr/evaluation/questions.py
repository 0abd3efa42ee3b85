"""Questions with known answers, encoded when they are asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from rl_lvr.data.encoding import Collator, Encoded, Encoder
from rl_lvr.data.record import Record
from rl_lvr.data.records import Records
from rl_lvr.data.targets import target_vectors
from rl_lvr.errors import UserError
from rl_lvr.models import Family
from rl_lvr.rollout.types import Request
from rl_lvr.wrapping import input_embeddings


@dataclass(frozen=True)
class Question:
    """What is known about a question beside its prompt."""

    id: str
    answer: str
    cluster: str | None = None
    """Rows of one cluster are not independent of each other; None: the question is a cluster of its own."""
    category: str | None = None

    @property
    def group(self) -> str:
        """The cluster's name."""
        return self.id if self.cluster is None else self.cluster


class Questions(Sequence[Question]):
    """Questions, their prompts and their target vectors. Prompts and images are encoded on each call and not kept."""

    def __init__(
        self,
        questions: Sequence[Question],
        encode: Callable[[Sequence[int]], Sequence[Encoded]],
        family: Family,
        pictures: Callable[[int], tuple[Image.Image, ...]] | None = None,
    ) -> None:
        """
        Args:
            questions: In the order of the records.
            encode: Numbers of questions -> their records, encoded.
            family: Of the model.
            pictures: Number of a question -> its images, which engines in another process need.
        """
        self._questions = list(questions)
        self._encode = encode
        self._family = family
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> Question:  # type: ignore[override]
        return self._questions[index]

    @property
    def answers(self) -> list[str]:
        return [question.answer for question in self._questions]

    @property
    def clusters(self) -> list[str]:
        """The cluster of every question."""
        return [question.group for question in self._questions]

    def requests(self, rows: Sequence[int]) -> list[Request]:
        """The prompts of questions."""
        return [
            Request(
                prompt_ids=encoded.input_ids[: encoded.prompt_length].tolist(),
                images=encoded.images,
                pictures=() if self._pictures is None else self._pictures(row),
            )
            for row, encoded in zip(rows, self._encode(rows), strict=True)
        ]

    @torch.no_grad()
    def oracles(self, model: nn.Module, rows: Sequence[int]) -> list[Tensor]:
        """The target vectors [k, H] of each question's completion, in order of position."""
        device = input_embeddings(model).weight.device
        encoded = self._encode(rows)
        batch = Collator([encoded], self._family, 0)([{"index": i} for i in range(len(rows))])
        targets = batch["targets"].to(device)
        images = {key: batch[key].to(device) for key in self._family.image_keys if key in batch}
        vectors, _ = target_vectors(self._family, model, images, targets)
        found: list[Tensor] = []
        for row, one in enumerate(encoded):
            mine = (targets.rows == row) & (targets.positions >= one.prompt_length)
            order = targets.positions[mine].argsort()
            found.append(vectors[mine][order].cpu())
        return found


def questions_of(
    records: Records, encoder: Encoder, *, cluster: str | None = None, category: str | None = None
) -> Questions:
    """Questions out of records.

    Args:
        records: Each with an answer.
        encoder: With markers where target vectors are wanted: then each record must have latent targets.
        cluster: Key of `meta` that names what a record belongs to.
        category: Key of `meta`, or `category` for the field of that name.

    Raises:
        UserError: If a record lacks something.
    """
    found = []
    for record in records:
        if record.answer is None:
            raise UserError(f"record {record.id!r} has no answer to compare with: add it, or take the record out.")
        if encoder.markers is not None and not record.targets:
            raise UserError(f"record {record.id!r} has no latent targets: leave the condition oracle out.")
        columns = [_column(record, name, why) for name, why in ((cluster, "cluster"), (category, "category"))]
        found.append(Question(record.id, record.answer, *columns))
    return Questions(
        found,
        lambda rows: encoder.encode([records[row] for row in rows]),
        encoder.family,
        lambda row: tuple(records[row].open_images()),
    )


def _column(record: Record, name: str | None, why: str) -> str | None:
    if name is None:
        return None
    value: Any = record.category if name == "category" else record.meta.get(name)
    if value is None:
        known = sorted({*record.meta, *(["category"] if record.category is not None else [])})
        raise UserError(
            f"record {record.id!r} has no {name!r}, which is to be its {why}: its columns are "
            f"{', '.join(known) or 'none'}."
        )
    return str(value)
