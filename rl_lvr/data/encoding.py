"""Records -> token ids, labels, image inputs and target places: what a training step needs, computed once.

Everything that does not depend on the weights happens here. Oracle vectors depend on them and are taken in the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from rl_lvr.data.image_tokens import ImageTokens
from rl_lvr.data.record import LatentTarget, Record
from rl_lvr.data.records import Records
from rl_lvr.data.refusals import added_tokens, refuse_control, refused
from rl_lvr.data.schema import LATENT
from rl_lvr.data.sources import RowError
from rl_lvr.latents.format import FormatIds, LatentFormat
from rl_lvr.latents.spans import RowSpans, SpanStatus, find_spans, span_masks
from rl_lvr.latents.text import ControlTokens
from rl_lvr.models import Family
from rl_lvr.models.oracle import WHOLE, crop, latent_groups

IGNORED = -100


@dataclass(frozen=True)
class Target:
    """Where the target vector of one latent comes from: the mean of a few image tokens."""

    position: int
    """The latent's position in the row."""
    image: int
    """Which of the row's target images: the prompt's images first, then the record's auxiliary images."""
    tokens: tuple[int, ...]
    """Token indices within that image's features."""


@dataclass(frozen=True)
class Encoded:
    """One record as numbers."""

    input_ids: Tensor
    """[T] int64"""
    labels: Tensor
    """[T] int64, -100 where there is no loss: prompt, forced tokens, padding."""
    images: dict[str, Tensor]
    """The processor's image inputs of this record's prompt; empty without images."""
    prompt_length: int
    targets: tuple[Target, ...] = ()
    """One for each latent that has a target."""
    target_images: dict[str, Tensor] | None = None
    """Image inputs of auxiliary target images, which do not enter the prompt."""


def span_length(record: Record, index: int, latent_format: LatentFormat) -> int:
    """Latents of a record's span: k of the format; in `free` length as many as targets, if there are several."""
    k = latent_format.k
    count = len(record.latents[index]) if record.latents else 0
    if latent_format.length == "free" and 1 < count <= k:
        return count
    if count and k % count:
        raise refused(
            record,
            f"latents[{index}]",
            f"a span of {k} latents cannot share {count} targets evenly",
            f"set latent_k to a multiple of {count}, or give one target per span",
        )
    return k


class Encoder:
    """Turns records into `Encoded`, for one processor, family and format.

    `markers` None trains without latents: `<latent>` is taken out of the text. This is the twin of a latent run.
    `crops` takes the targets of boxes from crops of their own instead of the image's tokens under the box.
    """

    def __init__(
        self,
        processor: Any,
        family: Family,
        markers: FormatIds | None,
        *,
        crops: bool = False,
    ) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.family = family
        self.markers = markers
        self.crops = crops
        self._placeholders = frozenset(family.placeholder_ids(self.tokenizer).values())
        self.control = ControlTokens(self.tokenizer, markers, self._placeholders)
        self._image_tokens = ImageTokens(processor)
        self.positions = int(family.config.get_text_config().max_position_embeddings)
        """What the model takes at most, prompt and completion together."""
        self.tokenizer("", add_special_tokens=False)  # settles padding and truncation before several threads tokenize

    def encode(self, records: Sequence[Record]) -> list[Encoded]:
        """Several records at once: the image processor works on all their images in one call."""
        texts = [self._texts(record) for record in records]
        images = [record.open_images() for record in records]
        prompts = self._process([prompt for prompt, _ in texts], images)
        encoded = []
        for record, (_, completion), (ids, inputs) in zip(records, texts, prompts, strict=True):
            encoded.append(self._one(record, ids, completion, inputs))
        return encoded

    def prompts(self, records: Sequence[Record]) -> list[tuple[list[int], dict[str, Tensor]]]:
        """Prompt ids with image placeholders expanded, and image inputs: what an engine's request holds."""
        return self._process([self._texts(r)[0] for r in records], [r.open_images() for r in records])

    def judge(self, record: Record, *, learned: bool, room: int = 0, limit: int | None = None) -> None:
        """Refuse a record that a run could not use, by the model's own tokenizer, template and image processor.

        One to be `learned` from needs an assistant's turn; one to be answered, `room` tokens for its completion, below
        the `limit` of an engine that takes fewer positions than the model.
        """
        if learned and record.is_prompt_only:
            raise refused(
                record, "messages", "end with the user: there is no answer to learn from", "add the assistant's turn"
            )
        if self.markers is not None:
            for index in range(len(record.latents or ())):
                span_length(record, index, self.markers.format)
        prompt, completion = self._texts(record)
        images = added_tokens(record, self._image_tokens, crops=self.crops)
        begin, end = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion))
        if self.markers is not None:
            self._spans(record, np.asarray([*begin, *end]), self.markers)
        length = len(begin) + images + (len(end) if learned else room)
        limit = self.positions if limit is None else min(limit, self.positions)
        if length > limit:
            raise self._too_long(record, len(begin) + images, len(end) if learned else room, limit)

    @staticmethod
    def _too_long(record: Record, prompt: int, completion: int, limit: int) -> RowError:
        return refused(
            record,
            "messages",
            f"take {prompt} tokens of prompt and {completion} of completion, and {limit} is the most in all",
            "shorten the record, scale its images down, or allow fewer latents or completion tokens",
        )

    # ---- text

    def _texts(self, record: Record) -> tuple[str, str]:
        """Prompt and completion as the chat template writes them, spans expanded."""
        refuse_control(record, self.control, self._placeholders)
        spans = iter(self._span_texts(record))
        messages = [
            {
                "role": m["role"],
                "content": [
                    p if p["type"] != "text" else {"type": "text", "text": self._expand(p["text"], m["role"], spans)}
                    for p in m["content"]
                ],
            }
            for m in record.messages
        ]
        if self.family.text_only:
            messages = [{**m, "content": self._plain(record, m["content"])} for m in messages]
        count = len(record.prompt_messages)
        try:
            prompt = self.processor.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=True)
            if record.is_prompt_only:
                return prompt, ""
            whole = self.processor.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            raise refused(
                record, "messages", f"are refused by the chat template ({error})", "change them, or the template"
            ) from error
        if not whole.startswith(prompt):
            raise refused(
                record,
                "messages",
                "are written by a chat template that rewrites the prompt once an answer follows (often because it "
                "drops earlier thinking)",
                "use a template whose prompt is a prefix of the whole",
            )
        return prompt, whole[len(prompt) :]

    def _plain(self, record: Record, content: list[dict[str, Any]]) -> str:
        """A message's content for the templates of text-only models, which know strings only."""
        if any(part["type"] != "text" for part in content):
            raise refused(
                record, "messages", f"show an image, and {self.family.name} takes none", "take a vision-language model"
            )
        return "".join(part["text"] for part in content)

    def _span_texts(self, record: Record) -> Iterator[str]:
        if self.markers is None:
            return
        for index in range(record.spans):
            yield self.markers.format.text(span_length(record, index, self.markers.format))

    def _expand(self, text: str, role: str, spans: Iterator[str]) -> str:
        if role != "assistant" or LATENT not in text:
            return text
        pieces = text.split(LATENT)
        if self.markers is None:
            return "".join(pieces)
        return "".join(piece + next(spans) for piece in pieces[:-1]) + pieces[-1]

    # ---- numbers

    def _process(self, texts: list[str], images: list[list[Image.Image]]) -> list[tuple[list[int], dict[str, Tensor]]]:
        counts = [len(row) for row in images]
        if not any(counts):
            return [(ids, {}) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        if not all(counts):  # processors want an image in every row, or in none
            return [self._process([t], [i])[0] for t, i in zip(texts, images, strict=True)]
        batch = self.processor(text=texts, images=images, add_special_tokens=False)
        return list(zip(batch["input_ids"], self.family.split_images(batch, counts), strict=True))

    def _one(self, record: Record, prompt: list[int], completion: str, images: dict[str, Tensor]) -> Encoded:
        answer = self.tokenizer(completion, add_special_tokens=False)["input_ids"] if completion else []
        ids = torch.tensor([*prompt, *answer])
        if len(ids) > self.positions:
            raise self._too_long(record, len(prompt), len(answer), self.positions)
        labels = ids.clone()
        labels[: len(prompt)] = IGNORED
        if self.markers is None:
            return Encoded(ids, labels, images, len(prompt))
        labels[span_masks(ids[None], self.markers).forced[0]] = IGNORED
        targets, extra = self._targets(record, ids, images)
        return Encoded(ids, labels, images, len(prompt), targets, extra)

    def _spans(self, record: Record, ids: np.ndarray, markers: FormatIds) -> RowSpans:
        """The spans of a record, which are whole; with targets, each is one that the record wrote as `<latent>`."""
        row = find_spans(ids, markers)
        if row.stray or any(span.status is not SpanStatus.CLOSED for span in row.spans):
            raise refused(
                record,
                "messages",
                f"hold marker tokens of latent format {markers.format.name!r} that do not form whole spans",
                f"write {LATENT} where a span belongs",
            )
        if record.latents and len(row.spans) != record.spans:
            raise refused(
                record,
                "latents",
                f"are for {record.spans} {LATENT}, and the text has {len(row.spans)} spans",
                f"write each span as {LATENT}, with text between two of them if the format has no markers",
            )
        return row

    def _targets(
        self, record: Record, ids: Tensor, images: dict[str, Tensor]
    ) -> tuple[tuple[Target, ...], dict[str, Tensor] | None]:
        assert self.markers is not None
        row = self._spans(record, ids.numpy(), self.markers)
        targets = record.targets
        if not targets:
            return (), None
        places = [tuple(span.latent_positions(self.markers.format.first)) for span in row.spans]
        if record.is_prompt_only:  # where the spans of the answer would stand if they came first
            lengths = [span_length(record, i, self.markers.format) for i in range(len(targets))][len(places) :]
            starts = [len(ids) + sum(lengths[:i]) for i in range(len(lengths))]
            places += [tuple(range(a, a + k)) for a, k in zip(starts, lengths, strict=True)]
        grids = self.family.token_grid(images) if images else []
        found: list[Target] = []
        extra: list[Image.Image] = []
        shares: list[tuple[int, ...]] = []  # of the latents, one for each extra image
        for target, positions in zip(targets, places, strict=True):
            if target.boxes and not self.crops:
                image = target.image or 0
                groups = latent_groups(grids[image], target.boxes, len(positions))
                found += [Target(p, image, group) for p, group in zip(positions, groups, strict=True)]
                continue
            pictures = self._pictures(record, target)
            share = len(positions) // len(pictures)
            shares += [positions[i * share : (i + 1) * share] for i in range(len(pictures))]
            extra += pictures
        if not extra:
            return tuple(found), None
        inputs = self._extra_inputs(extra)
        for i, (positions, grid) in enumerate(zip(shares, self.family.token_grid(inputs), strict=True)):
            groups = latent_groups(grid, [WHOLE], len(positions))
            found += [Target(p, len(record.images) + i, group) for p, group in zip(positions, groups, strict=True)]
        return tuple(found), inputs

    def _pictures(self, record: Record, target: LatentTarget) -> list[Image.Image]:
        if target.aux_images:
            return [image.open() for image in target.aux_images]
        image = record.images[target.image or 0].open()
        return [crop(image, box) for box in target.boxes]

    def _extra_inputs(self, pictures: list[Image.Image]) -> dict[str, Tensor]:
        return self.family.image_inputs(self.processor.image_processor(images=pictures, return_tensors="pt"))


class LazyEncoded(Sequence[Encoded]):
    """Records encoded each time they are asked for: for data whose processed images would not fit on disk."""

    def __init__(self, records: Records, encoder: Encoder) -> None:
        self.records = records
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Encoded:  # type: ignore[override]
        return self.encoder.encode([self.records[index]])[0]


@dataclass(frozen=True)
class TargetBatch:
    """The target places of a batch, flat over all latents that have a target. L of them."""

    rows: Tensor
    """[L] batch row"""
    positions: Tensor
    """[L] position in the padded row"""
    images: Tensor
    """[L] index into the features of the batch's prompt images, then its auxiliary images"""
    tokens: Tensor
    """[L, G] token indices within that image, -1 behind the last"""
    aux_images: dict[str, Tensor]
    """Image inputs of the auxiliary images of all rows."""

    def to(self, device: torch.device) -> TargetBatch:
        return TargetBatch(
            self.rows.to(device),
            self.positions.to(device),
            self.images.to(device),
            self.tokens.to(device),
            {key: value.to(device) for key, value in self.aux_images.items()},
        )


class Collator:
    """Pads encoded records on the right into one batch.

    It stands in for TRL's `DataCollatorForVisionLanguageModeling`, which runs the image processor in every step and
    has no place for targets. The examples that it gets are row numbers: TRL asks for a `datasets.Dataset`, whose
    image columns it would process itself.
    """

    def __init__(self, sets: Sequence[Sequence[Encoded]], family: Family, pad_id: int) -> None:
        """Row numbers count through the `sets`, one after another."""
        self.sets = sets
        self.family = family
        self.pad_id = pad_id

    def __call__(self, examples: list[dict[str, int]]) -> dict[str, Any]:
        rows = [self._row(example["index"]) for example in examples]
        width = max(len(row.input_ids) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id)
        labels = torch.full((len(rows), width), IGNORED)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for b, row in enumerate(rows):
            n = len(row.input_ids)
            ids[b, :n], labels[b, :n], mask[b, :n] = row.input_ids, row.labels, 1
        batch: dict[str, Any] = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        batch |= self.family.join_images([row.images for row in rows if row.images])
        batch["targets"] = self._targets(rows)
        return batch

    def _row(self, index: int) -> Encoded:
        for rows in self.sets:
            if index < len(rows):
                return rows[index]
            index -= len(rows)
        raise IndexError(index)

    def _targets(self, rows: list[Encoded]) -> TargetBatch:
        main = [self.family.count_images(row.images) for row in rows]
        aux = [self.family.count_images(row.target_images or {}) for row in rows]
        first_main = np.cumsum([0, *main])
        first_aux = sum(main) + np.cumsum([0, *aux])
        where: list[int] = []
        positions: list[int] = []
        images: list[int] = []
        groups: list[tuple[int, ...]] = []
        for b, row in enumerate(rows):
            for target in row.targets:
                own = target.image < main[b]
                image = first_main[b] + target.image if own else first_aux[b] + target.image - main[b]
                where.append(b)
                positions.append(target.position)
                images.append(int(image))
                groups.append(target.tokens)
        tokens = torch.full((len(groups), max(map(len, groups), default=0)), -1)
        for i, group in enumerate(groups):
            tokens[i, : len(group)] = torch.tensor(group)
        extra = self.family.join_images([row.target_images for row in rows if row.target_images])
        long = torch.long  # also where there is nothing to infer it from
        return TargetBatch(
            torch.tensor(where, dtype=long),
            torch.tensor(positions, dtype=long),
            torch.tensor(images, dtype=long),
            tokens,
            extra,
        )
