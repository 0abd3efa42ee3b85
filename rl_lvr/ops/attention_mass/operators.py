"""torch.library operators: dispatch to a backend, shapes for tracing, autograd formulas.

They take plain tensors and numbers only, and what reads the data happens inside, so that torch.compile can trace them.
`view` is the tail that all of them share: scale, rows, segments, window, softcap, heads, backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from rl_lvr.ops import backends
from rl_lvr.ops.attention_mass import reference, torch_chunked
from rl_lvr.ops.attention_mass.problem import Problem, labelled_positions
from rl_lvr.ops.attention_mass.torch_chunked import Upstream

VIEW = "float scale, Tensor? rows, Tensor? segments, int? window, float? softcap, int[]? heads, str backend"
KEYS = "Tensor query, Tensor key"
REGIONS = "Tensor labels, int regions"
SOFTMAX = "Tensor? lse, Tensor? positions, Tensor? sinks"


def problem_of(query: Tensor, key: Tensor, *view: Any) -> tuple[Problem, str]:
    scale, rows, segments, window, softcap, heads, backend = view
    chosen = tuple(range(query.shape[1])) if heads is None else tuple(heads)
    problem = Problem(query, key, scale, rows, segments, window, softcap, chosen)
    problem.check()
    return problem, backend


Result = TypeVar("Result")


def as_given(operator: Callable[..., Result]) -> Callable[..., Result]:
    """In the precision of the arguments: autocast is still on inside an operator, and would round float32 to bf16."""

    @wraps(operator)
    def run(query: Tensor, *rest: Any) -> Result:
        with torch.autocast(query.device.type, enabled=False):
            return operator(query, *rest)

    return run


def chosen_backend(problem: Problem, asked: str) -> str:
    return backends.choose("attention_mass", problem.query.device, problem.query.dtype, asked)


# --- mass per query and head ------------------------------------------------------------------------------


def _mass(
    query: Tensor,
    key: Tensor,
    labels: Tensor,
    regions: int,
    lse: Tensor | None,
    positions: Tensor | None,
    sinks: Tensor | None,
    *view: Any,
) -> Tensor:
    problem, asked = problem_of(query, key, *view)
    backend = chosen_backend(problem, asked)
    if backend == "reference":
        return reference.mass(problem, labels, regions, sinks, lse).to(problem.dtype)
    if lse is not None and positions is None:
        positions = labelled_positions(labels)
    if backend == "torch":
        return torch_chunked.mass(problem, labels, regions, positions, lse, sinks)
    from rl_lvr.ops.attention_mass import triton_launch

    return triton_launch.mass(problem, labels, regions, positions, lse, sinks)


mass = torch.library.custom_op(
    "rl_lvr::attention_mass",
    as_given(_mass),
    mutates_args=(),
    schema=f"({KEYS}, {REGIONS}, {SOFTMAX}, {VIEW}) -> Tensor",
)


@mass.register_fake
def _(query: Tensor, key: Tensor, labels: Tensor, regions: int, *rest: Any) -> Tensor:
    problem, _ = problem_of(query, key, *rest[3:])
    return query.new_empty(problem.size, len(problem.heads), regions, dtype=problem.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, labels, _, lse, _, sinks, *view = inputs
    _save(ctx, query, key, labels, lse, sinks, view)


def _save(ctx: Any, query: Tensor, key: Tensor, labels: Any, lse: Any, sinks: Any, view: list[Any]) -> None:
    scale, rows, segments, *rest = view
    ctx.save_for_backward(query, key, labels, lse, sinks, rows, segments)
    ctx.scale, ctx.rest = scale, rest


def _backward(ctx: Any, d_mass: Tensor | None, d_lse: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor, Tensor]:
    query, key, labels, lse, sinks, rows, segments = ctx.saved_tensors
    upstream = d_mass, d_lse, d_entropy
    return gradients(query, key, labels, lse, sinks, *upstream, ctx.scale, rows, segments, *ctx.rest)


def _mass_backward(ctx: Any, d_mass: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(ctx, d_mass, None, None), *[None] * 12)


mass.register_autograd(_mass_backward, setup_context=_keep)


# --- mass, summed up --------------------------------------------------------------------------------------


def sequence_of_rows(problem: Problem) -> Tensor:
    """[N] int64"""
    return problem.all_rows() // problem.query.shape[2]


def _reduced(
    query: Tensor,
    key: Tensor,
    labels: Tensor,
    regions: int,
    weights: Tensor,
    lse: Tensor | None,
    positions: Tensor | None,
    sinks: Tensor | None,
    *view: Any,
) -> tuple[Tensor, Tensor]:
    problem, asked = problem_of(query, key, *view)
    if weights.shape != (problem.size,):
        raise ValueError(f"weights {tuple(weights.shape)}, but there are {problem.size} rows.")
    if chosen_backend(problem, asked) == "triton" and lse is not None:
        from rl_lvr.ops.attention_mass import triton_launch

        positions = labelled_positions(labels) if positions is None else positions
        return triton_launch.reduced(problem, labels, regions, weights, positions, lse)
    whole = _mass(query, key, labels, regions, lse, positions, sinks, *view)
    batch = query.shape[0]
    of_sequence = torch.arange(batch, device=query.device)[:, None] == sequence_of_rows(problem)
    per_head = torch.einsum("bn,nhr->bhr", of_sequence * weights.to(whole.dtype), whole)
    return whole.mean(1), per_head


reduced = torch.library.custom_op(
    "rl_lvr::attention_mass_reduced",
    as_given(_reduced),
    mutates_args=(),
    schema=f"({KEYS}, {REGIONS}, Tensor weights, {SOFTMAX}, {VIEW}) -> (Tensor, Tensor)",
)


@reduced.register_fake
def _(query: Tensor, key: Tensor, labels: Tensor, regions: int, *rest: Any) -> tuple[Tensor, Tensor]:
    problem, _ = problem_of(query, key, *rest[4:])
    per_head = query.new_empty(query.shape[0], len(problem.heads), regions, dtype=problem.dtype)
    return query.new_empty(problem.size, regions, dtype=problem.dtype), per_head


def _keep_reduced(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, labels, _, weights, lse, _, sinks, *view = inputs
    _save(ctx, query, key, labels, lse, sinks, view)
    ctx.weights = weights.detach()


def _reduced_backward(ctx: Any, d_query: Tensor, d_head: Tensor) -> tuple[Tensor | None, ...]:
    query, _, _, _, _, rows, _ = ctx.saved_tensors
    batch, _, times, _ = query.shape
    sequence = (torch.arange(batch * times, device=query.device) if rows is None else rows) // times
    d_mass = (d_query / d_head.shape[1])[:, None, :] + d_head[sequence] * ctx.weights[:, None, None]
    return (*_backward(ctx, d_mass, None, None), *[None] * 13)


reduced.register_autograd(_reduced_backward, setup_context=_keep_reduced)


# --- log-sum-exp and entropy ------------------------------------------------------------------------------


def _statistics(query: Tensor, key: Tensor, *view: Any) -> tuple[Tensor, Tensor]:
    problem, asked = problem_of(query, key, *view)
    backend = chosen_backend(problem, asked)
    if backend == "reference":
        lse, entropy = reference.statistics(problem)
        return lse.to(problem.dtype), entropy.to(problem.dtype)
    if backend == "torch":
        return torch_chunked.statistics(problem)
    from rl_lvr.ops.attention_mass import triton_launch

    return triton_launch.statistics(problem)


statistics = torch.library.custom_op(
    "rl_lvr::attention_statistics",
    as_given(_statistics),
    mutates_args=(),
    schema=f"({KEYS}, {VIEW}) -> (Tensor, Tensor)",
)


@statistics.register_fake
def _(query: Tensor, key: Tensor, *view: Any) -> tuple[Tensor, Tensor]:
    problem, _ = problem_of(query, key, *view)
    lse = query.new_empty(problem.size, len(problem.heads), dtype=problem.dtype)
    return lse, torch.empty_like(lse)


def _keep_statistics(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, *view = inputs
    _save(ctx, query, key, None, None, None, view)


def _statistics_backward(ctx: Any, d_lse: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(ctx, None, d_lse, d_entropy), *[None] * 7)


statistics.register_autograd(_statistics_backward, setup_context=_keep_statistics)


# --- gradients --------------------------------------------------------------------------------------------


def _gradients(
    query: Tensor,
    key: Tensor,
    labels: Tensor | None,
    lse: Tensor | None,
    sinks: Tensor | None,
    d_mass: Tensor | None,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    *view: Any,
) -> tuple[Tensor, Tensor]:
    problem, asked = problem_of(query, key, *view)
    upstream = Upstream(d_mass, d_lse, d_entropy)
    if chosen_backend(problem, asked) != "reference":
        return torch_chunked.gradients(problem, upstream, labels, lse, sinks)
    exact = replace(problem, query=query.double(), key=key.double())
    d_query, d_key = torch_chunked.gradients(exact, upstream, labels, lse, sinks)
    return d_query.to(query.dtype), d_key.to(key.dtype)


gradients = torch.library.custom_op(
    "rl_lvr::attention_gradients",
    as_given(_gradients),
    mutates_args=(),
    schema=f"({KEYS}, Tensor? labels, Tensor? lse, Tensor? sinks, Tensor? d_mass, Tensor? d_lse, Tensor? d_entropy, "
    f"{VIEW}) -> (Tensor, Tensor)",
)


@gradients.register_fake
def _(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key)
