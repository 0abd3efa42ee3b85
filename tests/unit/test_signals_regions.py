"""Regions, query sets and reductions over sequences: the same however a batch is padded or packed."""

from __future__ import annotations

import pytest
import torch
from helpers import paper_b_masks
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_lvr.latents.format import FormatIds, LatentFormat
from rl_lvr.signals import Column, Regions, find_regions
from rl_lvr.signals.confidence import first_latents
from rl_lvr.signals.forward import Forward
from rl_lvr.signals.region_entropy import region_entropy
from rl_lvr.signals.regions import REGIONS

WORD, IMAGE, START, SLOT, END = range(1, 6)
FORMATS = {
    first: FormatIds(LatentFormat("t", "<s>", "<a>", "<e>", k=3, first=first), START, SLOT, END)
    for first in ("at_start", "before_start")
}
ROWS = st.lists(st.lists(st.integers(WORD, END), min_size=1, max_size=12), min_size=1, max_size=4)


def padded(rows: list[list[int]], side: str, markers: FormatIds) -> Regions:
    """The second half of each row is its completion."""
    width = max(map(len, rows)) + 1
    ids, mask, completion = torch.zeros(len(rows), width).long(), torch.zeros(len(rows), width).long(), None
    completion = torch.zeros(len(rows), width).bool()
    for b, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[b, start : start + len(row)] = torch.tensor(row)
        mask[b, start : start + len(row)] = 1
        completion[b, start + len(row) // 2 : start + len(row)] = True
    return find_regions(ids, mask, completion, markers, IMAGE)


def together(rows: list[list[int]], markers: FormatIds) -> Regions:
    """All rows in one."""
    ids = torch.tensor([[token for row in rows for token in row]])
    segments = torch.tensor([[7 * b for b, row in enumerate(rows) for _ in row]])
    completion = torch.tensor([[i >= len(row) // 2 for row in rows for i in range(len(row))]])
    return find_regions(ids, torch.ones_like(ids), completion, markers, IMAGE, segments)


@settings(max_examples=60)
@given(rows=ROWS, first=st.sampled_from(["at_start", "before_start"]))
def test_padding_and_packing_change_nothing(rows, first):
    markers = FORMATS[first]
    left, right, one = padded(rows, "left", markers), padded(rows, "right", markers), together(rows, markers)
    for other in (right, one):
        assert other.count == left.count == len(rows)
        for sequence in range(len(rows)):
            here, there = left.sequences == sequence, other.sequences == sequence
            assert torch.equal(left.labels[here], other.labels[there])
            for queries in ("after", "text", "completion", "latent", "paper_b"):
                assert torch.equal(left.queries(queries)[here], other.queries(queries)[there])
    assert bool((left.labels[left.sequences < 0] == -1).all())


def test_labels_of_a_span():
    row = [WORD, IMAGE, IMAGE, WORD, START, SLOT, SLOT, END, WORD]
    at_start, before = (padded([row], "left", FORMATS[first]).labels[0, 1:] for first in ("at_start", "before_start"))
    assert at_start.tolist() == [4, 2, 2, -1, 3, 0, 0, 3, -1]
    assert before.tolist() == [4, 2, 2, -1, 1, 0, 0, 3, -1]  # START holds a latent, and is a marker still
    assert set(REGIONS["latent"]) & set(REGIONS["markers"]) == {1}


@settings(max_examples=60)
@given(rows=ROWS)
def test_image_tokens_are_numbered_within_their_sequence(rows):
    for regions in (padded(rows, "left", FORMATS["at_start"]), together(rows, FORMATS["at_start"])):
        columns, counts = regions.image_columns()
        assert counts.tolist() == [row.count(IMAGE) for row in rows]
        assert torch.equal(columns >= 0, regions.image)
        for sequence, row in enumerate(rows):
            mine = columns[(regions.sequences == sequence) & regions.image]
            assert mine.tolist() == list(range(row.count(IMAGE)))


def test_queries():
    row = [WORD, WORD, START, SLOT, END, WORD, START, SLOT, SLOT, END, WORD, WORD, WORD, WORD]
    regions = find_regions(
        torch.tensor([row]), torch.ones(1, 14), torch.arange(14)[None] >= 5, FORMATS["at_start"], IMAGE
    )
    found = {name: regions.queries(name)[0].nonzero()[:, 0].tolist() for name in ("after", "text", "latent")}
    assert found == {"after": [10, 11, 12, 13], "text": [5, 10, 11, 12, 13], "latent": [3, 7, 8]}


SPAN = [START, SLOT, SLOT, END]


@pytest.mark.parametrize(
    "completion",
    [
        [WORD, *SPAN, WORD, WORD],
        [WORD, *SPAN],  # nothing behind it: the whole completion
        [*SPAN, WORD, *SPAN, WORD],
        [WORD, *SPAN, WORD, START, SLOT],  # truncated
        [WORD, START, SLOT],
        [WORD, START],
        [START, END, WORD],  # empty
        [WORD, WORD],
    ],
)
def test_queries_and_keys_of_paper_b(completion):
    row = [WORD, IMAGE, *completion]
    regions = find_regions(
        torch.tensor([row]), torch.ones(1, len(row)), torch.arange(len(row))[None] >= 2, FORMATS["at_start"], IMAGE
    )
    steps = completion.count(SLOT) or None
    keys = torch.isin(regions.labels[0], torch.tensor(REGIONS["closed_slot"])).nonzero()[:, 0].tolist()
    assert (regions.queries("paper_b")[0].nonzero()[:, 0].tolist(), keys) == paper_b_masks(row, 2, steps, START, END)
    slots = torch.isin(regions.labels[0], torch.tensor(REGIONS["slot"])).nonzero()[:, 0].tolist()
    assert slots == [i for i, token in enumerate(row) if token == SLOT]


@settings(deadline=None, max_examples=60)
@given(row=st.lists(st.sampled_from([START, SLOT, END, WORD]), min_size=4, max_size=14))
def test_queries_of_paper_b_for_any_row(row):
    regions = find_regions(
        torch.tensor([row]), torch.ones(1, len(row)), torch.arange(len(row))[None] >= 2, FORMATS["at_start"], IMAGE
    )
    steps = int((regions.spans.latent & regions.completion).sum()) or None
    assert regions.queries("paper_b")[0].nonzero()[:, 0].tolist() == paper_b_masks(row, 2, steps, START, END)[0]


def test_a_gap_in_the_mask_is_refused():
    with pytest.raises(ValueError, match="gap"):
        find_regions(
            torch.ones(1, 3).long(), torch.tensor([[1, 0, 1]]), torch.ones(1, 3).bool(), FORMATS["at_start"], IMAGE
        )


def test_first_latents():
    row = [WORD, START, SLOT, SLOT, END, START, SLOT, END]
    for first, at, before in (("at_start", [2, 6], [1, 5]), ("before_start", [1, 5], [0, 4])):
        spans = padded([row], "right", FORMATS[first]).spans
        assert first_latents(spans.latent, spans.index)[0].nonzero()[:, 0].tolist() == at
        assert first_latents(spans.latent, spans.index, before=True)[0].nonzero()[:, 0].tolist() == before


def forward_of(regions: Regions) -> Forward:
    rows = torch.arange(regions.labels.numel())
    return Forward(regions, rows, {}, rows, lambda k: None, lambda space, mask: rows)


def test_means_counts_and_lists():
    rows = [[WORD, WORD, WORD, WORD], [WORD, START, SLOT, END, WORD, WORD]]
    regions = padded(rows, "left", FORMATS["at_start"])
    forward = forward_of(regions)
    places = regions.queries("after").flatten().nonzero()[:, 0]
    values = torch.tensor([0.25, 0.75])
    assert forward.per_sequence(values, places).column() == Column([0.0, 0.5], [0, 2])
    assert forward.per_row(values, places).column() == Column([[], [0.25, 0.75]], [0, 2])
    assert forward.per_token(values, places).column() == Column([[0.0, 0.0], [0.0, 0.25, 0.75]], [0, 2])


def test_lists_and_means_carry_gradients():
    regions = padded([[WORD, WORD], [WORD, START, SLOT, END, WORD, WORD]], "left", FORMATS["at_start"])
    forward = forward_of(regions)
    places = regions.queries("after").flatten().nonzero()[:, 0]
    values = torch.tensor([0.25, 0.75], dtype=torch.float64, requires_grad=True)
    for reduce in (forward.per_sequence, forward.per_row, forward.per_token):
        assert torch.autograd.gradcheck(lambda v, reduce=reduce: reduce(v, places).values, (values,))


def test_neighbours_stay_in_their_span():
    rows = [[START, SLOT, SLOT, END, START, SLOT, SLOT], [START, SLOT, SLOT, SLOT]]
    regions = padded(rows, "right", FORMATS["at_start"])
    latents = regions.spans.latent.flatten().nonzero()[:, 0]
    assert forward_of(regions).neighbours(latents).tolist() == [True, False, True, False, True, True]


# ---- entropy within a region


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), window=st.sampled_from([None, 3]), scale=st.sampled_from([0.1, 1.0, 8.0]))
def test_region_entropy_is_its_definition(seed, window, scale):
    draw = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 4, 9, 8, generator=draw), torch.randn(2, 2, 9, 8, generator=draw)
    region = torch.rand(2, 9, generator=draw) < 0.6
    segments = torch.randint(0, 2, (2, 9), generator=draw).sort(1).values
    rows = torch.arange(18)[torch.rand(18, generator=draw) < 0.5]
    got = region_entropy(query, key, region, rows, scale=scale, segments=segments, window=window, heads=[0, 3])
    for i, row in enumerate(rows.tolist()):
        b, t = divmod(row, 9)
        keys = [
            j
            for j in range(t + 1)
            if region[b, j] and segments[b, j] == segments[b, t] and (window is None or t - j < window)
        ]
        for column, head in enumerate([0, 3]):
            s = torch.stack(
                [scale * query[b, head, t].double() @ key[b, head // 2, j].double() for j in keys] or [torch.zeros(())]
            )
            p = s.softmax(0)
            assert got[i, column] == pytest.approx(float(-(p * s.log_softmax(0)).sum()), abs=1e-5)
