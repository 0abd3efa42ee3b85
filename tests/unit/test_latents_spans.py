"""Spans and masks: every malformed row has one meaning, and padding changes none of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rl_lvr.latents.format import FormatIds, LatentFormat
from rl_lvr.latents.spans import RowSpans, Span, SpanStatus, find_spans, span_masks

START, SLOT, END, TEXT, PAD = 11, 12, 13, 14, 15
C, B, T = SpanStatus.CLOSED, SpanStatus.BROKEN, SpanStatus.TRUNCATED
LETTERS = {"[": START, "o": SLOT, "]": END, "x": TEXT}


def markers(*, length: str = "fixed", first: str = "at_start", k: int = 3) -> FormatIds:
    return FormatIds(LatentFormat("test", "o", "[", "]", k=k, length=length, first=first), START, SLOT, END)


MARKERLESS = FormatIds(LatentFormat("bare", "o", k=2, feedback="none"), None, SLOT, None)


def ids(text: str) -> list[int]:
    return [LETTERS[letter] for letter in text]


def slow_parse(text: str) -> RowSpans:
    """An independent parser, written one letter and one state at a time."""
    spans: list[Span] = []
    stray: list[int] = []
    state: tuple[int, int] | None = None  # START's position and the slots seen
    at = 0
    while at < len(text):
        letter = text[at]
        if state is None:
            if letter == "[":
                state = (at, 0)
            elif letter in "o]":
                stray.append(at)
            at += 1
            continue
        start, slots = state
        if letter == "o":
            state = (start, slots + 1)
            at += 1
        elif letter == "]":
            spans.append(Span(start, start + 1, slots, at, C))
            state = None
            at += 1
        else:  # text or a nested START: closes the span, and is read again outside it
            spans.append(Span(start, start + 1, slots, -1, B))
            state = None
    if state is not None:
        spans.append(Span(state[0], state[0] + 1, state[1], -1, T))
    return RowSpans(tuple(spans), tuple(stray))


# Single letters reach every malformed row; whole pieces make long and nested ones likely.
rows = st.lists(st.sampled_from(["[", "o", "]", "x", "[ooo]", "[]", "[o[o]o]", "oo", "xxx", "[oo"]), max_size=12).map(
    "".join
)


# ---- parsing


@pytest.mark.parametrize(
    ("text", "spans", "stray"),
    [
        ("", [], []),
        ("xx", [], []),
        ("x[oo]x", [(1, 2, 4, C)], []),
        ("[]", [(0, 0, 1, C)], []),
        ("[oo][o]", [(0, 2, 3, C), (4, 1, 6, C)], []),
        ("[o[o]", [(0, 1, -1, B), (2, 1, 4, C)], []),
        ("[o[o]o]", [(0, 1, -1, B), (2, 1, 4, C)], [5, 6]),
        ("[ox]", [(0, 1, -1, B)], [3]),
        ("[oxo]", [(0, 1, -1, B)], [3, 4]),
        ("[x", [(0, 0, -1, B)], []),
        ("x[oo", [(1, 2, -1, T)], []),
        ("x[", [(1, 0, -1, T)], []),
        ("[[", [(0, 0, -1, B), (1, 0, -1, T)], []),
        ("o]x", [], [0, 1]),
        ("[o]]", [(0, 1, 2, C)], [3]),
    ],
)
def test_every_kind_of_span(text: str, spans: list[tuple[int, int, int, SpanStatus]], stray: list[int]) -> None:
    expected = tuple(Span(start, start + 1, slots, end, status) for start, slots, end, status in spans)
    assert find_spans(ids(text), markers()) == RowSpans(expected, tuple(stray))
    assert slow_parse(text) == RowSpans(expected, tuple(stray))


@settings(max_examples=400)
@given(rows)
def test_the_fast_parser_agrees_with_the_slow_one(text: str) -> None:
    assert find_spans(ids(text), markers()) == slow_parse(text)


@settings(max_examples=100)
@given(rows)
def test_spans_and_strays_share_out_all_marker_tokens(text: str) -> None:
    found = find_spans(ids(text), markers())
    inside = [at for span in found.spans for at in range(span.begin, span.stop)]
    assert sorted(inside + list(found.stray)) == [at for at, letter in enumerate(text) if letter != "x"]


@settings(max_examples=200)
@given(rows)
def test_a_format_without_markers_has_one_span_per_run_of_slots(text: str) -> None:
    text = text.replace("[", "x").replace("]", "x")
    runs = [run for run in text.split("x") if run]
    found = find_spans(ids(text), MARKERLESS)
    assert [span.slots for span in found.spans] == [len(run) for run in runs]
    assert all(text[span.begin : span.stop] == "o" * span.slots for span in found.spans)
    assert {span.status for span in found.spans} <= {C}
    assert found.stray == ()


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, torch.tensor])
def test_ids_may_come_as_lists_arrays_or_tensors(kind: type) -> None:
    assert find_spans(kind(ids("x[oo]")), markers()) == slow_parse("x[oo]")


def test_latent_positions_include_start_only_if_it_is_overwritten() -> None:
    closed, empty, bare = (
        find_spans(ids(text), which).spans[0]
        for text, which in (("x[oo]", markers()), ("[]", markers()), ("xoo", MARKERLESS))
    )
    assert list(closed.latent_positions("at_start")) == [2, 3]
    assert list(closed.latent_positions("before_start")) == [1, 2, 3]
    assert (list(empty.latent_positions("at_start")), list(empty.latent_positions("before_start"))) == ([], [0])
    assert list(bare.latent_positions("at_start")) == [1, 2]


# ---- masks


def letters_back(masks: object, row: int, length: int) -> str:
    """A row rebuilt from its masks alone, on a background of text."""
    text = ["x"] * length
    for letter, name in (("[", "start"), ("o", "slot"), ("]", "end")):
        for at in torch.nonzero(getattr(masks, name)[row]).flatten().tolist():
            assert text[at] == "x", "two masks claim one position"
            text[at] = letter
    return "".join(text)


def padded(texts: list[str], side: str, width: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Ids, attention mask and the offset of each row. The padding id is a SLOT: the mask alone must keep it out."""
    tokens = torch.full((len(texts), width), SLOT)
    mask = torch.zeros(len(texts), width, dtype=torch.long)
    offsets = [width - len(text) if side == "left" else 0 for text in texts]
    for row, (text, offset) in enumerate(zip(texts, offsets, strict=True)):
        tokens[row, offset : offset + len(text)] = torch.tensor(ids(text), dtype=torch.long)
        mask[row, offset : offset + len(text)] = 1
    return tokens, mask, offsets


formats = st.sampled_from(
    [
        *(markers(length=a, first=b) for a in ("fixed", "free") for b in ("at_start", "before_start")),
        MARKERLESS,
    ]
)


@settings(max_examples=300)
@given(rows, st.sampled_from(["fixed", "free"]), st.sampled_from(["at_start", "before_start"]))
@example("[o[o]o]x[oo", "free", "before_start")
def test_spans_to_masks_to_spans(text: str, length: str, first: str) -> None:
    ids_of_format = markers(length=length, first=first)
    masks = span_masks(torch.tensor([ids(text)], dtype=torch.long), ids_of_format)
    again = find_spans(ids(letters_back(masks, 0, len(text))), ids_of_format)
    assert again.spans == find_spans(ids(text), ids_of_format).spans
    assert again.stray == ()


def test_the_round_trip_notices_a_lost_token() -> None:
    """Negative control of the test above: each mask carries something that the others do not."""
    text = "x[oo]x[o"
    masks = span_masks(torch.tensor([ids(text)]), markers())
    spans = find_spans(ids(text), markers()).spans
    assert find_spans(ids(letters_back(masks, 0, len(text))), markers()).spans == spans
    for name in ("start", "slot", "end"):
        lost = getattr(masks, name).clone()
        lost[0, int(torch.nonzero(lost[0])[0])] = False
        damaged = letters_back(replace(masks, **{name: lost}), 0, len(text))
        assert find_spans(ids(damaged), markers()).spans != spans


@settings(max_examples=200)
@given(st.lists(rows, min_size=1, max_size=4), st.integers(0, 5), st.sampled_from(["left", "right"]), formats)
def test_padding_moves_masks_and_changes_nothing_else(
    texts: list[str], extra: int, side: str, which: FormatIds
) -> None:
    tokens, attention, offsets = padded(texts, side, max(map(len, texts)) + extra)
    batch = span_masks(tokens, which, attention)
    for row, (text, offset) in enumerate(zip(texts, offsets, strict=True)):
        alone = span_masks(torch.tensor([ids(text)], dtype=torch.long), which)
        kept = slice(offset, offset + len(text))
        for name in ("start", "slot", "end", "latent", "forced", "after", "index", "inside"):
            assert torch.equal(getattr(batch, name)[row, kept], getattr(alone, name)[0]), name
            background = getattr(batch, name)[row][attention[row] == 0]
            assert (background == (-1 if name == "index" else False)).all(), name


def test_without_the_attention_mask_padding_would_be_read_as_text() -> None:
    """Negative control of the test above: there is something for the attention mask to keep out."""
    tokens, attention, _ = padded(["[oo", "x"], "right", 5)
    assert span_masks(tokens, markers()).slot[0].sum() == 4
    assert span_masks(tokens, markers(), attention).slot[0].sum() == 2
    assert span_masks(tokens, MARKERLESS).slot[1].sum() == 4


def test_a_row_of_padding_alone_has_no_spans() -> None:
    tokens, attention, _ = padded(["[o]", ""], "left", 3)
    assert not span_masks(tokens, markers(), attention).inside[1].any()


def test_an_attention_mask_with_a_gap_is_refused() -> None:
    tokens = torch.tensor([ids("xx[oo]")])
    span_masks(tokens, markers(), torch.tensor([[0, 1, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="row 0: the attention mask has a gap between positions 0 and 5"):
        span_masks(tokens, markers(), torch.tensor([[1, 1, 1, 0, 1, 1]]))


def marked(mask: torch.Tensor) -> str:
    return "".join("1" if value else "." for value in mask[0].tolist())


@pytest.mark.parametrize(
    ("text", "length", "first", "latent", "forced", "after"),
    [
        #                                     latent        forced        after
        ("x[ooo]xx", "fixed", "at_start", "..111...", "..1111..", "......11"),
        ("x[oo]xx", "fixed", "before_start", ".111...", "..111..", ".....11"),
        ("x[ooo]xx", "free", "at_start", "..111...", ".....1..", "......11"),  # the cap closed it
        ("x[oo]xx", "free", "at_start", "..11...", ".......", ".....11"),  # END was chosen
        ("x[oo]xx", "free", "before_start", ".111...", "....1..", ".....11"),  # the cap: START holds a latent
        ("x[o]xx", "free", "before_start", ".11...", "......", "....11"),
        ("[]x", "fixed", "at_start", "...", ".1.", "..1"),
        ("[]x", "free", "at_start", "...", "...", "..1"),
        ("[]x", "free", "before_start", "1..", "...", "..1"),
        ("x[oo", "fixed", "at_start", "..11", "..11", "...."),
        ("x[oo", "free", "at_start", "..11", "....", "...."),
        ("[ox[ooo]x", "fixed", "at_start", ".1..111..", ".1..1111.", "........1"),
        ("[ox]x", "free", "at_start", ".1...", ".....", "..111"),
        ("xx", "fixed", "at_start", "..", "..", ".."),
    ],
)
def test_latent_forced_and_after(text: str, length: str, first: str, latent: str, forced: str, after: str) -> None:
    masks = span_masks(torch.tensor([ids(text)]), markers(length=length, first=first, k=3))
    assert (marked(masks.latent), marked(masks.forced), marked(masks.after)) == (latent, forced, after)


def test_slots_without_markers_are_all_forced() -> None:
    masks = span_masks(torch.tensor([ids("xooxo")]), MARKERLESS)
    assert (marked(masks.latent), marked(masks.forced), marked(masks.after)) == (".11.1", ".11.1", ".....")


@settings(max_examples=200)
@given(rows, formats)
def test_masks_relate_to_each_other(text: str, which: FormatIds) -> None:
    if which is MARKERLESS:
        text = text.replace("[", "x").replace("]", "x")
    masks = span_masks(torch.tensor([ids(text)], dtype=torch.long), which)
    assert torch.equal(masks.inside, masks.start | masks.slot | masks.end)
    assert torch.equal(masks.latent & ~masks.start, masks.slot)
    assert bool((masks.latent & masks.start).any()) == (
        which.format.first == "before_start" and bool(masks.start.any())
    )
    assert not (masks.forced & ~(masks.slot | masks.end)).any()  # START is always a choice of the model
    assert not (masks.after & masks.inside).any()
    spans = find_spans(ids(text), which).spans
    assert masks.index.max() == len(spans) - 1 if text else masks.index.numel() == 0


def test_masks_keep_the_device_and_shape_of_the_ids() -> None:
    masks = span_masks(torch.zeros(2, 0, dtype=torch.long), markers())
    assert masks.slot.shape == (2, 0)
