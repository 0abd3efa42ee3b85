"""Columns that the trainer makes for rewards, and what is written down about a rollout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL.Image import Image
from trl.chat_template_utils import parse_response

from rl_lvr.answers import text_of
from rl_lvr.data.images import SOURCE
from rl_lvr.errors import UserError
from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.spans import find_spans
from rl_lvr.latents.text import completion_text, without_markers
from rl_lvr.rollout.record import RecordedRollout, recorded, span_facts
from rl_lvr.rollout.types import Rollout
from rl_lvr.training.grpo.batch import Again, Turn
from rl_lvr.training.rewards.load import MADE_BY_TRAINER, RewardSpec

_RECORDED = ("markers", "necessity_completions", "necessity_continuations")
"""Columns that cannot be made again from the rest of a record."""
_TAKEN = ("prompt", "image", "images", "answer", "category")


def require_columns(specs: Sequence[RewardSpec], *, without_latents: bool = False) -> None:
    """Refuse rewards that read what this trainer does not make."""
    for spec in specs:
        wanted = sorted(spec.takes & set(MADE_BY_TRAINER))
        if without_latents and wanted:
            raise UserError(f"reward {spec.name!r} reads {wanted[0]!r}, which is made with a latent format only.")


def made_columns(
    specs: Sequence[RewardSpec], turn: Turn, markers: FormatIds, groups: Sequence[int], tokenizer: Any
) -> dict[str, list[Any]]:
    """Those of `MADE_BY_TRAINER` that some reward takes."""
    wanted = {name for spec in specs for name in spec.takes}
    columns: dict[str, list[Any]] = {}
    if "spans" in wanted:
        columns["spans"] = [span_facts(rollout, markers, tokenizer) for rollout in turn.rollouts]
    if "group" in wanted:
        columns["group"] = list(groups)
    if "stop_reason" in wanted:
        columns["stop_reason"] = [rollout.stop_reason.value for rollout in turn.rollouts]
    if "markers" in wanted:
        columns["markers"] = [marker_order(rollout, markers) for rollout in turn.rollouts]
    if turn.again is not None:
        texts = zip(turn.rollouts, turn.again, strict=True)
        columns["necessity_completions"] = [None if again is None else again.text for again in turn.again]
        columns["necessity_continuations"] = [
            again.continuation if again is not None and _closes(rollout, markers) else None for rollout, again in texts
        ]
    turn.made = {name: columns[name] for name in _RECORDED if name in columns}
    return columns


def rolls_out_again(specs: Sequence[RewardSpec]) -> bool:
    """Whether a reward asks for what comes of a prompt without latents."""
    return any(name.startswith("necessity_") for spec in specs for name in spec.takes & set(MADE_BY_TRAINER))


def again_of(rollout: Rollout, tokenizer: Any, markers: FormatIds) -> Again:
    """The text of a second rollout, whole, and what of it follows its first pair of markers."""
    ids = list(rollout.completion_ids)
    begin = len(rollout.prompt_ids)
    first = next((span.stop - begin for span in find_spans(rollout.ids, markers).spans if span.stop > begin), 0)
    return Again(completion_text(ids, tokenizer, markers), completion_text(ids[first:], tokenizer, markers))


def marker_order(rollout: Rollout, markers: FormatIds) -> list[str]:
    """`start` or `end` for each marker token of the prompt and the completion."""
    names = {markers.start: "start", markers.end: "end"}
    return [names[token] for token in rollout.ids if token in names]


def _closes(rollout: Rollout, markers: FormatIds) -> bool:
    """Whether an END follows the completion's first START."""
    ids = list(rollout.completion_ids)
    return markers.start in ids and markers.end in ids[ids.index(markers.start) :]


def read_completions(
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    completions: Sequence[Any],
    markers: FormatIds,
    ends: Sequence[int] = (),
) -> list[Any]:
    """TRL's `completions`, text or messages by row, read once more from the ids without spans and markers.

    A tokenizer with a `response_template` splits a message into fields by its special tokens, so these stay for it.
    The last one goes if it is one of `ends` that TRL, which knows the tokenizer's own alone, would leave in the text.
    """
    parses = any(getattr(tokenizer, f"response_{kind}", None) is not None for kind in ("template", "schema"))
    found: list[Any] = []
    for prompt, ids, completion in zip(prompt_ids, completion_ids, completions, strict=True):
        if isinstance(completion, str):
            found.append(completion_text(ids, tokenizer, markers))
        elif parses and (kept := without_markers(ids, markers)):
            if kept[-1] in ends and kept[-1] != tokenizer.eos_token_id:
                kept.pop()
            message = parse_response(tokenizer, kept, prefix=list(prompt)) if kept else {"content": ""}
            found.append([{"role": "assistant", **message}])
        else:
            found.append([{"role": "assistant", "content": completion_text(ids, tokenizer, markers)}])
    return found


def texts_of(completion_ids: Sequence[Sequence[int]], tokenizer: Any, markers: FormatIds | None) -> list[str]:
    """The column `texts`: each completion's plain text, without latent spans and special tokens."""
    return [completion_text(ids, tokenizer, markers) for ids in completion_ids]


def has_span(rollout: Rollout, markers: FormatIds) -> bool:
    """Whether the completion holds a span, closed or not."""
    return any(fact["status"] != "stray" for fact in span_facts(rollout, markers))


def record(
    turn: Turn,
    inputs: Sequence[dict[str, Any]],
    said: Sequence[tuple[Any, Any]],
    rewards: Sequence[Sequence[float]],
    groups: Sequence[int],
    names: Sequence[str],
    tokenizer: Any,
    markers: FormatIds,
) -> list[RecordedRollout]:
    """What is known about each rollout. `said`: prompt and completion as rewards see them; `rewards` [B][R], NaN where
    not scored."""
    return [
        recorded(
            rollout,
            tokenizer,
            markers,
            prompt=_without_images(said[row][0]),
            completion=said[row][1],
            text=_unless_said(said[row][1], completion_text(rollout.completion_ids, tokenizer, markers)),
            group=groups[row],
            answer=_text(inputs[row].get("answer")),
            category=_text(inputs[row].get("category")),
            rewards={
                name: None if math.isnan(value) else value for name, value in zip(names, rewards[row], strict=True)
            },
            signals={name: column.values[row] for name, column in turn.columns.items()},
            images=_paths(inputs[row]),
            columns={name: value for name, value in inputs[row].items() if name not in _TAKEN and _plain(value)}
            | {name: values[row] for name, values in turn.made.items()},
        )
        for row, rollout in enumerate(turn.rollouts)
    ]


def _without_images(prompt: Any) -> Any:
    """Messages whose image parts say only that an image stands there."""
    if isinstance(prompt, str):
        return prompt
    return [
        message
        if isinstance(message["content"], str)
        else {
            **message,
            "content": [{k: part[k] for k in ("type", "text") if k in part} for part in message["content"]],
        }
        for message in prompt
    ]


def _unless_said(completion: Any, text: str) -> str | None:
    """The text, if a completion as rewards see it does not say it already."""
    return None if text_of(completion) == text else text


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _paths(row: Mapping[str, Any]) -> list[str]:
    """Files that the row's images were opened from; images made in memory have none."""
    images = row.get("images") or [row.get("image")]
    known = [image.info.get(SOURCE) or getattr(image, "filename", "") for image in images if isinstance(image, Image)]
    return [str(path) for path in known if path]


def _plain(value: Any) -> bool:
    """Whether it can stand in a line of JSON; pictures and the like cannot."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
