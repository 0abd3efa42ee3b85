"""Columns that the trainer makes for rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl.chat_template_utils import parse_response

from rl_lvr.errors import UserError
from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.spans import find_spans
from rl_lvr.latents.text import completion_text, without_markers
from rl_lvr.rollout.record import span_facts
from rl_lvr.rollout.types import Rollout
from rl_lvr.training.grpo.batch import Again, GenerationBatch
from rl_lvr.training.rewards.load import MADE_BY_TRAINER, NECESSITY, RewardSpec

_RECORDED = ("markers", *NECESSITY)
"""Columns that cannot be made again from the rest of a record."""


def refuse_columns(specs: Sequence[RewardSpec]) -> None:
    """Refuse rewards that read what only a trainer with latents makes."""
    for spec in specs:
        wanted = sorted(spec.takes & set(MADE_BY_TRAINER))
        if wanted:
            raise UserError(f"reward {spec.name!r} reads {wanted[0]!r}, which is made with a latent format only.")


def reward_columns(
    specs: Sequence[RewardSpec], batch: GenerationBatch, markers: FormatIds, groups: Sequence[int], tokenizer: Any
) -> dict[str, list[Any]]:
    """Those of `MADE_BY_TRAINER` that some reward takes, and the signals."""
    wanted = {name for spec in specs for name in spec.takes}
    columns: dict[str, list[Any]] = {}
    if "spans" in wanted:
        columns["spans"] = [span_facts(rollout, markers, tokenizer) for rollout in batch.rollouts]
    if "group" in wanted:
        columns["group"] = list(groups)
    if "stop_reason" in wanted:
        columns["stop_reason"] = [rollout.stop_reason.value for rollout in batch.rollouts]
    if "markers" in wanted:
        columns["markers"] = [marker_order(rollout, markers) for rollout in batch.rollouts]
    if batch.again is not None:
        texts = zip(batch.rollouts, batch.again, strict=True)
        columns["necessity_completions"] = [None if again is None else again.text for again in batch.again]
        columns["necessity_continuations"] = [
            again.continuation if again is not None and _closes(rollout, markers) else None for rollout, again in texts
        ]
    batch.made = {name: columns[name] for name in _RECORDED if name in columns}
    return columns | {name: column.values for name, column in batch.columns.items()}


def with_columns(rows: Sequence[dict[str, Any]], columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The rows with `columns` beside their own; a name that both have is refused."""
    clash = sorted(set(columns) & set(rows[0]))
    if clash:
        raise UserError(f"the data has a column {clash[0]!r}, which the trainer makes itself: rename it.")
    return [{**row, **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(rows)]


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


def has_span(rollout: Rollout, markers: FormatIds) -> bool:
    """Whether the completion holds a span, closed or not."""
    return any(fact["status"] != "stray" for fact in span_facts(rollout, markers))
