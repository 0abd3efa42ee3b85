"""Providers of the GPU benchmark for attention_mass: eager, text-row softmax, path A, path B; and what must hold first.

One layer of Qwen2.5-VL-7B (28 query heads, 4 key heads of 128): text queries after a latent span against the span
(region 0) and the image (region 1). Eager runs one sequence, the scoring layer a micro-batch: their configs say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_vocab import Measurement
from torch import Tensor

from rl_lvr.ops.attention_mass import (
    attention_entropy,
    attention_mass,
    attention_mass_flash,
    attention_mass_reduced,
    labelled_positions,
    log_sum_exp,
)

HEADS, KEY_HEADS, WIDTH, HIDDEN, INNER = 28, 4, 128, 3584, 18944
SHAPES = ((2048, 256, 8), (4096, 512, 32), (8192, 1024, 64), (16384, 1024, 64))  # tokens, text queries, span
BATCH, SCORING_TOKENS = 64, 16384
SMALL_SHAPES = ((64, 16, 4), (96, 24, 8))
EPSILON = 1e-5


@dataclass(frozen=True)
class Layer:
    """query [B,Hq,T,d] and key [B,Hkv,T,d] strided as transformers has them; spans [B,T] and regions [B,T] labels."""

    query: Tensor
    key: Tensor
    spans: Tensor
    regions: Tensor
    rows: Tensor  # text after the span
    latents: Tensor  # rows of the span
    scale: float

    @property
    def batch(self) -> int:
        return self.query.shape[0]


def layer(
    device: torch.device, batch: int, shape: tuple[int, int, int], *, small: bool, dtype: torch.dtype = torch.bfloat16
) -> Layer:
    tokens, texts, span = shape
    heads, key_heads, width = (4, 2, 16) if small else (HEADS, KEY_HEADS, WIDTH)
    random = torch.Generator(device).manual_seed(tokens)

    def normal(count: int) -> Tensor:
        return torch.randn(batch, tokens, count, width, generator=random, device=device, dtype=dtype).transpose(1, 2)

    end = tokens - texts
    spans = torch.full((batch, tokens), -1, device=device)
    spans[:, end - span : end] = 0
    regions = spans.clone()
    regions[:, 16 : end - span - 16] = 1
    starts = torch.arange(batch, device=device)[:, None] * tokens
    rows = (starts + torch.arange(end, tokens, device=device)).flatten()
    latents = (starts + torch.arange(end - span, end, device=device)).flatten()
    return Layer(normal(heads), normal(key_heads), spans, regions, rows, latents, width**-0.5)


def eager(given: Layer) -> Tensor:
    """`output_attentions=True`, one sequence: the whole matrix, softmax in float32, cast, kept."""
    key = given.key[:1].repeat_interleave(given.query.shape[1] // given.key.shape[1], dim=1)
    s = (given.query[:1] @ key.transpose(-1, -2)) * given.scale
    tokens = s.shape[-1]
    s = s + torch.full((tokens, tokens), torch.finfo(s.dtype).min, dtype=s.dtype, device=s.device).triu(1)
    return torch.softmax(s, -1, dtype=torch.float32).to(given.query.dtype)


def text_rows(given: Layer) -> Tensor:
    """The best that plain torch offers: text rows only, one sequence at a time. [B*n,H,1]"""
    group = given.query.shape[1] // given.key.shape[1]
    tokens, out = given.query.shape[2], []
    times = given.rows.view(given.batch, -1)[0]
    hidden = torch.arange(tokens, device=times.device) > times[:, None]
    for b in range(given.batch):
        q = given.query[b, :, times].unflatten(0, (-1, group))
        s = torch.matmul(q, given.key[b].transpose(-1, -2)[:, None]).float() * given.scale
        p = torch.softmax(s.masked_fill_(hidden, float("-inf")), -1)
        out.append((p * (given.spans[b] == 0)).sum(-1).flatten(0, 1).T)
    return torch.cat(out)[..., None]


def scoring_layer(device: torch.device, tokens: int, batch: int, *, small: bool) -> Callable[[], Tensor]:
    """One decoder layer without its norms, forward, on a micro-batch: what path A's time is a fraction of."""
    heads, key_heads, width = (4, 2, 16) if small else (HEADS, KEY_HEADS, WIDTH)
    hidden, inner = (64, 128) if small else (HIDDEN, INNER)
    random = torch.Generator(device).manual_seed(0)

    def weight(a: int, b: int) -> Tensor:
        return torch.randn(a, b, generator=random, device=device, dtype=torch.bfloat16) / a**0.5

    to_q, to_k, to_v = weight(hidden, heads * width), *(weight(hidden, key_heads * width) for _ in range(2))
    to_out, down = weight(heads * width, hidden), weight(inner, hidden)
    gate, up = (weight(hidden, inner) for _ in range(2))
    x = torch.randn(batch, tokens, hidden, generator=random, device=device, dtype=torch.bfloat16)

    @torch.no_grad()
    def run() -> Tensor:
        q, k, v = ((x @ w).unflatten(-1, (-1, width)).transpose(1, 2) for w in (to_q, to_k, to_v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y = x + mixed.transpose(1, 2).flatten(2) @ to_out
        return y + (F.silu(y @ gate) * (y @ up)) @ down

    return run


def measurements(device: torch.device, *, small: bool = False) -> Iterator[Measurement]:
    """Every cell; the tensors of one shape are made when its first cell is asked for."""
    for shape in SMALL_SHAPES if small else SHAPES:
        yield from _cells(device, shape, small)


def _cells(device: torch.device, shape: tuple[int, int, int], small: bool) -> Iterator[Measurement]:
    tokens, texts, span = shape
    batch = 2 if small else BATCH
    given = layer(device, batch, shape, small=small)
    near, both = labelled_positions(given.spans), labelled_positions(given.regions)
    # Any finite number will do for the time; the gate has compared values.
    lse = torch.full(given.query.shape[:3], 10.0, device=device)
    weights = torch.full(given.rows.shape, 1 / texts, device=device)
    few = layer(device, min(4, batch), shape, small=small)
    common: dict[str, Any] = {"text": texts, "span": span, "heads": given.query.shape[1], "dtype": "bfloat16"}

    def cell(provider: str, mode: str, run: Callable[[], object], sequences: int = batch) -> Measurement:
        return Measurement(provider, mode, tokens, {**common, "batch": sequences}, run)

    def path_a(on: Layer, positions: Tensor, labels: Tensor, regions: int) -> object:
        count = on.batch
        return attention_mass_reduced(
            on.query, on.key, labels, regions, weights=weights[: len(on.rows)], scale=on.scale, lse=lse[:count],
            rows=on.rows, positions=positions[:count],
        )  # fmt: skip

    micro = 2 if small else max(1, SCORING_TOKENS // tokens)
    yield cell("scoring_layer", "forward", scoring_layer(device, tokens, micro, small=small), micro)
    yield cell("eager", "span", lambda: eager(given), 1)
    yield cell("text_rows", "span", lambda: text_rows(given))
    yield cell("path_a", "span", lambda: path_a(given, near, given.spans, 1))
    yield cell("path_a", "span_micro_batch", lambda: path_a(few, near, few.spans, 1), few.batch)
    yield cell("path_a", "span_and_image", lambda: path_a(given, both, given.regions, 2))
    for mode, labels, regions in (("span", given.spans, 1), ("span_and_image", given.regions, 2)):
        yield cell(
            "path_b", mode, lambda labels=labels, regions=regions: attention_mass(
                given.query, given.key, labels, regions, scale=given.scale, rows=given.rows
            ),
        )  # fmt: skip
    yield cell(
        "path_b", "entropy_of_latents",
        lambda: attention_entropy(given.query, given.key, scale=given.scale, rows=given.latents),
    )  # fmt: skip
    if tokens <= 4096:
        for provider, run in (("ours", _ours), ("one_hot_flash", _flash)):
            yield cell(provider, "backward", lambda run=run: _backward(run, _first(given)), 1)


def _first(given: Layer) -> Layer:
    """The first sequence alone."""
    count = len(given.rows) // given.batch
    slices = (given.query[:1], given.key[:1], given.spans[:1], given.regions[:1])
    return Layer(*slices, given.rows[:count], given.latents[:0], given.scale)


def _ours(on: Layer, query: Tensor, key: Tensor) -> Tensor:
    return attention_mass(query, key, on.spans, 1, scale=on.scale, rows=on.rows)


def _flash(on: Layer, query: Tensor, key: Tensor) -> Tensor:
    return attention_mass_flash(query, key, on.spans, 1, scale=on.scale, rows=on.rows)


def _backward(run: Callable[[Layer, Tensor, Tensor], Tensor], on: Layer) -> tuple[Tensor, ...]:
    inputs = on.query.detach().requires_grad_(), on.key.detach().requires_grad_()
    return torch.autograd.grad(run(on, *inputs).sum(), inputs)


def gate(device: torch.device, *, small: bool = False) -> list[str]:
    """What is wrong, empty if nothing: errors against float64 are at most twice those of plain torch, and 1e-5."""
    faults = []
    for dtype in (torch.bfloat16, torch.float32):
        given = layer(device, 2, (64, 16, 4) if small else (300, 77, 20), small=small, dtype=dtype)
        segments = torch.zeros_like(given.spans)
        segments[0, :9] = -1
        segments[1, -5:] = -1
        for name, seen in (("", None), (" padded", segments)):
            view: dict[str, Any] = {"scale": given.scale, "segments": seen}
            faults += [f"{fault}{name} in {dtype}" for fault in _gate(given, view)]
        expected = _backward(lambda on, q, k: _ours(on, q.float(), k.float()), _first(given))
        for provider, run in (("ours", _ours), ("one_hot_flash", _flash)):
            for found, exact in zip(_backward(run, _first(given)), expected, strict=True):
                error = float((found.float() - exact.float()).norm() / exact.float().norm())
                if not error <= 3e-2:
                    faults.append(f"gradient of {provider} in {dtype}: relative error {error:.1e}")
    return faults


def _gate(given: Layer, view: dict[str, Any]) -> Iterator[str]:
    query, key, labels = given.query, given.key, given.regions
    truth = attention_mass(query, key, labels, 2, rows=given.rows, backend="reference", **view)
    flat = log_sum_exp(query, key, **view)
    lse = flat.view(given.batch, query.shape[2], -1).transpose(1, 2)
    weights = torch.linspace(0, 1, len(given.rows), device=query.device)
    whole = attention_mass(query, key, labels, 2, lse=lse, rows=given.rows, **view)
    sums = attention_mass_reduced(query, key, labels, 2, weights=weights, lse=lse, rows=given.rows, **view)
    split = truth * weights[:, None, None]
    per_head = torch.stack([part.sum(0) for part in split.chunk(given.batch)])
    exact_lse = log_sum_exp(query, key, backend="reference", **view)
    entropy = attention_entropy(query, key, rows=given.rows, **view)
    pairs = {
        "path A": (whole, truth),
        "path B": (attention_mass(query, key, labels, 2, rows=given.rows, **view), truth),
        "mean over heads": (sums.per_query, truth.mean(1)),
        "sum over queries": (sums.per_head / len(given.rows), per_head / len(given.rows)),
        "log-sum-exp": (flat.nan_to_num(neginf=0.0), exact_lse.nan_to_num(neginf=0.0)),
        "entropy": (entropy, attention_entropy(query, key, rows=given.rows, backend="reference", **view)),
    }
    for name, (ours, exact) in pairs.items():
        error = float((ours.double() - exact.double()).abs().max())
        if not error <= EPSILON:
            yield f"{name}: error {error:.1e}"
    if view["segments"] is None:
        oracle = attention_mass_flash(query, key, labels, 2, rows=given.rows, scale=view["scale"])
        if not float((oracle.double() - truth.double()).abs().max()) <= 2e-2:
            yield "stock attention with one-hot values disagrees with the reference"
