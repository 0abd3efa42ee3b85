"""attention_mass as an operator of torch: opcheck, torch.compile, memory, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_mass_cases import VARIANTS, Case, case, worst
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rl_lvr.errors import UserError
from rl_lvr.ops.attention_mass import attention_mass, attention_mass_reduced, torch_chunked


def view(given: Case) -> tuple[Any, ...]:
    names = ("scale", "rows", "segments", "window", "softcap", "heads")
    return (*(given.asked.get(name) for name in names), "torch")


def with_gradient(given: Case) -> tuple[Tensor, Tensor]:
    return given.query.clone().requires_grad_(), given.key.clone().requires_grad_()


@pytest.mark.parametrize("variant", ["plain", "window", "sinks"])
def test_opcheck(variant: str) -> None:
    given = case(variant)
    operators = torch.ops.rl_lvr
    regions = (given.labels, 3)
    softmax = (None, None, given.asked.get("sinks"))
    rows = given.problem.size
    inputs = (*with_gradient(given), *regions, *softmax, *view(given))
    torch.library.opcheck(operators.attention_mass.default, inputs)
    inputs = (*with_gradient(given), *regions, torch.rand(rows), *softmax, *view(given))
    torch.library.opcheck(operators.attention_mass_reduced.default, inputs)
    torch.library.opcheck(operators.attention_statistics.default, (*with_gradient(given), *view(given)))
    upstream = torch.randn(rows, len(given.problem.heads), 3)
    d_lse, d_entropy = torch.randn(2, rows, len(given.problem.heads))
    for others in ((None, None), (d_lse, None), (None, d_entropy), (d_lse, d_entropy)):
        inputs = (given.query, given.key, given.labels, None, softmax[2], upstream, *others, *view(given))
        torch.library.opcheck(operators.attention_gradients.default, inputs)


def test_opcheck_with_a_given_log_sum_exp() -> None:
    given, operators = case("rows"), torch.ops.rl_lvr
    softmax = (given.lse("torch"), None, None)
    inputs = (*with_gradient(given), given.labels, 3, *softmax, *view(given))
    torch.library.opcheck(operators.attention_mass.default, inputs)
    rows = given.problem.size
    inputs = (*with_gradient(given), given.labels, 3, torch.rand(rows), *softmax, *view(given))
    torch.library.opcheck(operators.attention_mass_reduced.default, inputs)
    upstream = torch.randn(rows, len(given.problem.heads), 3)
    inputs = (given.query, given.key, given.labels, softmax[0], None, upstream, None, None, *view(given))
    torch.library.opcheck(operators.attention_gradients.default, inputs)


@pytest.mark.parametrize("path", ["A", "B"])
def test_compiles_without_a_break(path: str) -> None:
    given = case("window")
    asked = given.given_lse() if path == "A" else given.asked
    weights = torch.rand(given.problem.size)

    def loss(query: Tensor, key: Tensor) -> Tensor:
        mass = attention_mass(query * 2, key, given.labels, 3, **asked)
        reduced = attention_mass_reduced(query * 2, key, given.labels, 3, weights=weights, **asked)
        return mass.square().sum() + reduced.per_head.sum()

    eager, compiled = with_gradient(given), with_gradient(given)
    expected = loss(*eager)
    expected.backward()
    result = torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled)
    result.backward()
    torch.testing.assert_close(result, expected)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
        assert b.grad is not None
        assert b.grad.any()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(made) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *(x.untyped_storage().nbytes() // x.element_size() for x in tensors)])
        return made


@pytest.mark.parametrize("path", ["A", "B"])
def test_the_matrix_of_all_heads_is_never_made(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(batch=1, queries=300, keys=300)
    matrix = 6 * 300 * 300
    monkeypatch.setattr(torch_chunked, "BLOCK_ELEMENTS", matrix // 50)
    asked = given.given_lse() if path == "A" else given.asked
    with Largest() as ours:
        attention_mass(given.query, given.key, given.labels, 3, **asked)
    with Largest() as eager:
        given.plain()
    assert ours.elements <= matrix // 20
    assert eager.elements >= matrix  # control: the measure sees one


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path", ["A", "B"])
def test_values_do_not_depend_on_how_rows_are_cut(path: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a row or two, the last one shorter; in float64, where the difference is rounding alone."""
    given = case(variant).to(torch.float64)
    truth = given.exact()
    assert worst(given.mass("torch", path), truth) <= 1e-12
    for elements in (1, 100, 700):
        monkeypatch.setattr(torch_chunked, "BLOCK_ELEMENTS", elements)
        assert worst(given.mass("torch", path), truth) <= 1e-12
    shifted = given.mass("torch", path).roll(1, dims=0)
    assert worst(shifted, truth) > 1e-3  # control: a piece that is written one row too far


def test_refusals() -> None:
    given = case("sinks")
    asked = {"scale": 1.0}
    with pytest.raises(ValueError, match="already holds the sinks"):
        given.but(lse=given.lse("torch")).mass("torch")
    with pytest.raises(ValueError, match=r"lse .* is not \[B,Hq,Tq\]"):
        given.but(lse=given.lse("torch").mT, sinks=None).mass("torch")
    with pytest.raises(ValueError, match=r"sinks .* are not \[Hq\]"):
        given.but(sinks=torch.ones(2)).mass("torch")
    with pytest.raises(ValueError, match="labels"):
        attention_mass(given.query, given.key, given.labels[:, 1:], 3, **asked)
    with pytest.raises(ValueError, match="strictly increasing"):
        given.but(rows=torch.tensor([3, 2])).mass("torch")
    with pytest.raises(ValueError, match="2 x 37 queries"):
        given.but(rows=torch.tensor([3, 74])).mass("torch")
    with pytest.raises(ValueError, match=r"heads \[6\]"):
        given.but(heads=[6]).mass("torch")
    with pytest.raises(ValueError, match="asked for twice"):
        given.but(heads=[1, 1]).mass("torch")
    with pytest.raises(ValueError, match="weights"):
        given.reduced(torch.ones(3), "torch")
    with pytest.raises(ValueError, match="as many keys as queries"):
        attention_mass(given.query, given.key[:, :, :20], given.labels[:, :20], 3, **asked)
    with pytest.raises(UserError, match="backend='torch'"):
        attention_mass(given.query.double(), given.key.double(), given.labels, 3, **asked, backend="triton")
    assert worst(given.mass("auto"), given.exact()) <= 1e-5
