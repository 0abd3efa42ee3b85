"""Triton kernels of attention mass. Only what Triton 3.6 has; no autotuning: triton_launch.py chooses the blocks.

A program owns BLOCK_Q consecutive entries of the row list. They may belong to several sequences, so it walks through
those from the first to the last with the others' rows masked: no list of tiles, nothing to wait for on the host.
UPCAST is for the interpreter, which multiplies the bit patterns of bf16 (triton-lang/triton#11584).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: N803, SIM114 - constants are in capitals, as Triton's own kernels have them, and constant `if`s stay apart
# Annotations of a kernel are read by Triton: no `from __future__ import annotations` here.
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
EMPTY = tl.constexpr(-1.0e30)  # the largest score of no key: finite, so that a difference of two is not NaN


@triton.jit
def row_place(at, live, rows, queries, HAS_ROWS: tl.constexpr):
    """Sequence and time of entries of the row list."""
    row = at
    if HAS_ROWS:
        row = tl.load(rows + at, mask=live, other=0).to(tl.int32)  # a division of 64 bits is a slow routine
    return (row // queries).to(tl.int64), (row % queries).to(tl.int64)


@triton.jit
def load_queries(query, place, live, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_Q, BLOCK_D]"""
    d = tl.arange(0, BLOCK_D)
    return tl.load(query + place[:, None] + d[None, :] * stride_d, mask=live[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_keys(key, position, known, stride_t, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Transposed, [BLOCK_D, BLOCK_K]; `key` points at one sequence and head."""
    d = tl.arange(0, BLOCK_D)
    place = position.to(tl.int64) * stride_t
    return tl.load(key + place[None, :] + d[:, None] * stride_d, mask=known[None, :] & (d < D)[:, None], other=0.0)


@triton.jit
def base_2_scores(q, k, scale, softcap, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """s * log2(e). [BLOCK_Q, BLOCK_K] float32"""
    if UPCAST:
        q = q.to(tl.float32)
        k = k.to(tl.float32)
    s = tl.dot(q, k, input_precision=PRECISION)
    if HAS_SOFTCAP:
        x = s * (scale / softcap)
        t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
        tanh = (1.0 - t) / (1.0 + t)
        return tl.where(x < 0, -tanh, tanh) * (softcap * LOG2E)
    return s * (scale * LOG2E)


@triton.jit
def visible_keys(
    here, mine, own, position, known, segment, window, HAS_SEGMENTS: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """`here`: the queries' key positions, `mine`: those of this sequence, `own`: segments. [BLOCK_Q, BLOCK_K]"""
    seen = mine[:, None] & known[None, :] & (position[None, :] <= here[:, None])
    if HAS_WINDOW:
        seen = seen & (position[None, :] > here[:, None] - window)
    if HAS_SEGMENTS:
        seen = seen & (segment[None, :] == own[:, None]) & (own >= 0)[:, None]
    return seen


@triton.jit
def sum_by_label(p, label, regions, BLOCK_R: tl.constexpr):
    """p [BLOCK_Q, BLOCK_K] -> [BLOCK_Q, BLOCK_R]. A product with one-hot columns would round p or spill registers."""
    r = tl.arange(0, BLOCK_R)
    out = tl.zeros([p.shape[0], BLOCK_R], tl.float32)
    for region in range(regions):
        share = tl.sum(tl.where((label == region)[None, :], p, 0.0), axis=1)
        out += tl.where((r == region)[None, :], share[:, None], 0.0)
    return out


@triton.jit
def mass_given_lse(
    query, key, labels, positions, lse, rows, segments, weights,
    starts, heads, columns, out, per_head,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    lse_stride_b, lse_stride_h, lse_stride_t,
    size, queries, keys, width, count, regions, group, window, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    REDUCE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Path A: sum of exp(s - lse) over the labelled keys, for the heads of one key head.

    REDUCE False: out [size, count, regions]. True: out [groups, size, regions] is the sum over this program's heads and
    per_head [tiles + sequences, count, regions] the weighted sum over its queries of one sequence; both are added up
    afterwards, in a fixed order. Entry tile + sequence is unique because rows increase.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    at = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = at < size
    r = tl.arange(0, BLOCK_R)
    sequence, time = row_place(at, live, rows, queries, HAS_ROWS)
    here = time + (keys - queries)
    own = here
    if HAS_SEGMENTS:
        own = tl.load(segments + sequence * keys + here, mask=live, other=-1).to(tl.int64)
    if REDUCE:
        weight = tl.load(weights + at, mask=live, other=0.0)
    total = tl.zeros([BLOCK_Q, BLOCK_R], tl.float32)
    first = tl.min(tl.where(live, sequence, 1 << 40))
    last = tl.max(tl.where(live, sequence, -1))
    for b in range(first, last + 1):
        mine = live & (sequence == b)
        for c in range(tl.load(starts + part), tl.load(starts + part + 1)):
            head = tl.load(heads + c).to(tl.int64)
            column = tl.load(columns + c)
            place = sequence * q_stride_b + head * q_stride_h + time * q_stride_t
            q = load_queries(query, place, mine, q_stride_d, D, BLOCK_D)
            place = sequence * lse_stride_b + head * lse_stride_h + time * lse_stride_t
            log_sum = tl.load(lse + place, mask=mine, other=0.0) * LOG2E
            key_head = key + b * k_stride_b + (head // group) * k_stride_h
            acc = tl.zeros([BLOCK_Q, BLOCK_R], tl.float32)
            for start in range(0, width, BLOCK_K):
                s_at = start + tl.arange(0, BLOCK_K)
                position = tl.load(positions + b * width + s_at, mask=s_at < width, other=-1)
                known = position >= 0
                label = tl.load(labels + b * keys + position, mask=known, other=-1)
                segment = position
                if HAS_SEGMENTS:
                    segment = tl.load(segments + b * keys + position, mask=known, other=-1)
                k = load_keys(key_head, position, known, k_stride_t, k_stride_d, D, BLOCK_D)
                s = base_2_scores(q, k, scale, softcap, HAS_SOFTCAP, UPCAST, PRECISION)
                seen = visible_keys(here, mine, own, position, known, segment, window, HAS_SEGMENTS, HAS_WINDOW)
                p = tl.where(seen, tl.exp2(s - log_sum[:, None]), 0.0)
                acc += sum_by_label(p, label, regions, BLOCK_R)
            if REDUCE:
                total += acc
                share = tl.sum(acc * weight[:, None], axis=0)
                tl.store(per_head + ((tile + b) * count + column) * regions + r, share, mask=r < regions)
            else:
                to = (at.to(tl.int64) * count + column) * regions
                tl.store(out + to[:, None] + r[None, :], acc, mask=mine[:, None] & (r < regions)[None, :])
    if REDUCE:
        to = (part.to(tl.int64) * size + at) * regions
        tl.store(out + to[:, None] + r[None, :], total, mask=live[:, None] & (r < regions)[None, :])


@triton.jit
def sum_entries(
    parts, bounds, out, count, regions, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr
):
    """per_head's second stage: entries from bounds[b] // BLOCK_Q + b on are sequence b's. out [B, count, regions]."""
    b, column = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(bounds + b), tl.load(bounds + b + 1)
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_R], tl.float32)
    if end > begin:
        stop = (end - 1) // BLOCK_Q + b + 1
        for start in range(begin // BLOCK_Q + b, stop, BLOCK_S):
            entry = start + tl.arange(0, BLOCK_S)
            place = (entry.to(tl.int64) * count + column) * regions
            mask = (entry < stop)[:, None] & (r < regions)[None, :]
            acc += tl.sum(tl.load(parts + place[:, None] + r[None, :], mask=mask, other=0.0), axis=0)
    tl.store(out + (b * count + column) * regions + r, acc, mask=r < regions)


@triton.jit
def mass_one_pass(
    query, key, labels, rows, segments, sinks, heads, out,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    size, queries, keys, count, regions, group, window, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Path B: flash attention's forward pass without values; one head. out [size, count, regions]."""
    tile, column = tl.program_id(0), tl.program_id(1)
    at = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = at < size
    r = tl.arange(0, BLOCK_R)
    head = tl.load(heads + column).to(tl.int64)
    sequence, time = row_place(at, live, rows, queries, HAS_ROWS)
    here = time + (keys - queries)
    own = here
    if HAS_SEGMENTS:
        own = tl.load(segments + sequence * keys + here, mask=live, other=-1).to(tl.int64)
    place = sequence * q_stride_b + head * q_stride_h + time * q_stride_t
    q = load_queries(query, place, live, q_stride_d, D, BLOCK_D)
    top = tl.full([BLOCK_Q], EMPTY, tl.float32)
    norm = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_R], tl.float32)
    first = tl.min(tl.where(live, sequence, 1 << 40))
    last = tl.max(tl.where(live, sequence, -1))
    for b in range(first, last + 1):
        mine = live & (sequence == b)
        key_head = key + b * k_stride_b + (head // group) * k_stride_h
        lowest = tl.min(tl.where(mine, here, 1 << 40))
        begin = lowest * 0
        if HAS_WINDOW:
            begin = tl.maximum(lowest - window + 1, 0) // BLOCK_K * BLOCK_K
        for start in range(begin, tl.max(tl.where(mine, here, -1)) + 1, BLOCK_K):
            position = start + tl.arange(0, BLOCK_K)
            known = position < keys
            label = tl.load(labels + b * keys + position, mask=known, other=-1)
            k = load_keys(key_head, position, known, k_stride_t, k_stride_d, D, BLOCK_D)
            s = base_2_scores(q, k, scale, softcap, HAS_SOFTCAP, UPCAST, PRECISION)
            if HAS_SEGMENTS:
                segment = tl.load(segments + b * keys + position, mask=known, other=-1)
                seen = visible_keys(here, mine, own, position, known, segment, window, HAS_SEGMENTS, HAS_WINDOW)
                s = tl.where(seen, s, EMPTY)
            elif HAS_WINDOW:
                seen = visible_keys(here, mine, own, position, known, position, window, HAS_SEGMENTS, HAS_WINDOW)
                s = tl.where(seen, s, EMPTY)
            elif (first < last) | (start + BLOCK_K > lowest + 1):
                seen = visible_keys(here, mine, own, position, known, position, window, HAS_SEGMENTS, HAS_WINDOW)
                s = tl.where(seen, s, EMPTY)
            # A row that has seen no key yet adds 1 per masked key; the next `rescale` is 0 and takes it away again.
            new_top = tl.maximum(top, tl.max(s, axis=1))
            rescale = tl.exp2(top - new_top)
            p = tl.exp2(s - new_top[:, None])
            norm = norm * rescale + tl.sum(p, axis=1)
            acc = acc * rescale[:, None]
            if tl.max(label) >= 0:
                acc += sum_by_label(p, label, regions, BLOCK_R)
            top = new_top
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        norm = norm + tl.exp2(sink - top)
    # A visible NaN is not in `top` (a maximum leaves NaN out), but it is in `norm`, and has to come out.
    seen_any = (top > 0.5 * EMPTY) | (norm != norm)
    share = tl.where(seen_any[:, None], acc / norm[:, None], 0.0)
    to = (at.to(tl.int64) * count + column) * regions
    tl.store(out + to[:, None] + r[None, :], share, mask=live[:, None] & (r < regions)[None, :])


@triton.jit
def statistics_one_pass(
    query, key, rows, segments, heads, tops, rests, belows,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    size, queries, keys, count, group, window, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For log-sum-exp and entropy: the largest score, sum of 2^y and sum of y 2^y without it, y = score less largest.

    Scores in base 2; tops, rests, belows [size, count]. Nothing seen: EMPTY, -1, 0, the identity of the merge.
    """
    tile, column = tl.program_id(0), tl.program_id(1)
    at = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = at < size
    head = tl.load(heads + column).to(tl.int64)
    sequence, time = row_place(at, live, rows, queries, HAS_ROWS)
    here = time + (keys - queries)
    own = here
    if HAS_SEGMENTS:
        own = tl.load(segments + sequence * keys + here, mask=live, other=-1).to(tl.int64)
    place = sequence * q_stride_b + head * q_stride_h + time * q_stride_t
    q = load_queries(query, place, live, q_stride_d, D, BLOCK_D)
    top = tl.full([BLOCK_Q], EMPTY, tl.float32)
    rest = tl.full([BLOCK_Q], -1.0, tl.float32)
    below = tl.zeros([BLOCK_Q], tl.float32)
    first = tl.min(tl.where(live, sequence, 1 << 40))
    last = tl.max(tl.where(live, sequence, -1))
    for b in range(first, last + 1):
        mine = live & (sequence == b)
        key_head = key + b * k_stride_b + (head // group) * k_stride_h
        lowest = tl.min(tl.where(mine, here, 1 << 40))
        begin = lowest * 0
        if HAS_WINDOW:
            begin = tl.maximum(lowest - window + 1, 0) // BLOCK_K * BLOCK_K
        for start in range(begin, tl.max(tl.where(mine, here, -1)) + 1, BLOCK_K):
            position = start + tl.arange(0, BLOCK_K)
            known = position < keys
            segment = position
            if HAS_SEGMENTS:
                segment = tl.load(segments + b * keys + position, mask=known, other=-1).to(tl.int64)
            k = load_keys(key_head, position, known, k_stride_t, k_stride_d, D, BLOCK_D)
            s = base_2_scores(q, k, scale, softcap, HAS_SOFTCAP, UPCAST, PRECISION)
            seen = visible_keys(here, mine, own, position, known, segment, window, HAS_SEGMENTS, HAS_WINDOW)
            s = tl.where(seen, s, EMPTY)
            tile_top = tl.max(s, axis=1)
            y = s - tile_top[:, None]
            largest = y == 0.0
            e = tl.exp2(y)
            tile_rest = tl.sum(tl.where(largest, 0.0, e), axis=1) + (tl.sum(largest.to(tl.float32), axis=1) - 1.0)
            none = (tile_top <= 0.5 * EMPTY) & (tile_rest == tile_rest)  # a visible NaN is not nothing
            tile_rest = tl.where(none, -1.0, tile_rest)
            tile_below = tl.where(none, 0.0, tl.sum(y * e, axis=1))
            wins = top >= tile_top
            d = -tl.abs(top - tile_top)
            scale_down = tl.exp2(d)
            lost = 1.0 + tl.where(wins, tile_rest, rest)
            lost_below = tl.where(wins, tile_below, below)
            rest = tl.where(wins, rest, tile_rest) + scale_down * lost
            below = tl.where(wins, below, tile_below) + scale_down * (lost_below + d * lost)
            top = tl.maximum(top, tile_top)
    to = at.to(tl.int64) * count + column
    tl.store(tops + to, top, mask=live)
    tl.store(rests + to, rest, mask=live)
    tl.store(belows + to, below, mask=live)
