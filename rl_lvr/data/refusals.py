"""What of a record a model could not take, found without its pixels: its images' sizes, and control tokens in texts."""

from __future__ import annotations

from rl_lvr.data.image_tokens import ImageTokens
from rl_lvr.data.record import Record
from rl_lvr.data.schema import Problem
from rl_lvr.data.sources import RowError
from rl_lvr.latents.text import ControlTokens, joined_parts
from rl_lvr.models.oracle import crop_edges


def refused(record: Record, where: str, what: str, cure: str) -> RowError:
    return RowError(Problem(where, what, cure), f"record {record.id!r}")


def refuse_control(record: Record, control: ControlTokens, placeholders: frozenset[int]) -> None:
    """A control token in a text would act as one: end a turn, open a span, or stand for an image.

    The format's own markers may stand in the assistant's text, where they form spans.
    """
    for index, message in enumerate(record.messages):
        allowed = control.markers if message["role"] == "assistant" else frozenset[int]()
        for _, text in joined_parts(message["content"]):
            token = control.found(text, allowed)
            if token is None:
                continue
            name, place = control.tokenizer.convert_ids_to_tokens(token), f"messages[{index}].content"
            if token in placeholders:
                what, cure = "stands for an image", 'write a part {"type": "image"} where an image belongs, and spell'
                raise refused(record, place, f"holds the token {name!r}, which {what}", f"{cure} the token differently")
            raise refused(
                record, place, f"holds the control token {name!r}, which would act as one", "spell it differently"
            )


def added_tokens(record: Record, tokens: ImageTokens, *, crops: bool) -> int:
    """The tokens that the record's images add to its text, where each is one already. Refuses images, and with `crops`
    crops of them, that the processor does."""
    sizes = {f"images[{index}]": image.size() for index, image in enumerate(record.images)}
    shown = len(sizes)
    for index, (spec, target) in enumerate(zip(record.latents or (), record.targets, strict=True)):
        sizes |= {f"latents[{index}].images[{i}]": image.size() for i, image in enumerate(target.aux_images)}
        if crops and spec.images is None:
            width, height = record.images[spec.image].size()
            for number, box in enumerate(target.boxes):
                left, top, right, bottom = crop_edges(box, width, height)
                sizes[f"latents[{index}].{'boxes' if spec.boxes else 'cells'}[{number}]"] = (right - left, bottom - top)
    added = 0
    for number, (where, (width, height)) in enumerate(sizes.items()):
        try:
            count = tokens(width, height)
        except ValueError as error:
            raise refused(
                record,
                where,
                f"is {width} x {height} pixels, which the model's image processor refuses ({error})",
                "crop, pad or scale it, or leave it out",
            ) from error
        added += count - 1 if number < shown else 0
    return added
