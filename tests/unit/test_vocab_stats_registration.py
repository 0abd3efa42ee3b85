"""vocab_stats as an operator of torch: opcheck, torch.compile, numerical gradients, memory, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vocab_stats_cases import DIFFERENTIABLE, Case, case

from rl_lvr.errors import UserError
from rl_lvr.ops.vocab_stats import partial_stats, vocab_stats


def arguments(given: Case, hidden: Tensor, keep: bool) -> tuple[Any, ...]:
    asked = given.asked
    a, b, scaling = asked["lora"]
    rest = (asked["top_k"], asked["temperature"], 64 << 20, keep, "torch")
    return (hidden, given.weight, asked["bias"], a, b, scaling, asked["chosen"], asked["next_row"], *rest)


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck(keep: bool) -> None:
    given = case(vocabulary=150)
    operator = torch.ops.rl_lvr.vocab_stats.default
    torch.library.opcheck(operator, arguments(given, given.hidden.clone().requires_grad_(), keep))
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    torch.library.opcheck(
        operator, (hidden, weight, None, None, None, 1.0, None, None, 0, 1.0, 1 << 20, False, "torch")
    )


def test_opcheck_of_the_backward_operator() -> None:
    given = case(vocabulary=150)
    inputs = arguments(given, given.hidden, False)
    values, argmax, top_ids, sums, logits = torch.ops.rl_lvr.vocab_stats(*inputs)
    hidden, weight, bias, a, b, scaling, chosen = inputs[:7]
    wanted = torch.randn_like(values)
    torch.library.opcheck(
        torch.ops.rl_lvr.vocab_stats_backward.default,
        (hidden, weight, bias, a, b, scaling, chosen, argmax, top_ids, sums, logits, wanted, 0.7, 1 << 20, "torch"),
    )


@pytest.mark.slow
def test_compiles_without_a_break() -> None:
    given = case(vocabulary=200)

    def loss(hidden: Tensor) -> Tensor:
        stats = vocab_stats(hidden * 2, given.weight, **given.asked)
        assert stats.kl_next is not None
        return stats.entropy.sum() + stats.chosen_logprob.sum() + stats.kl_next.sum()

    eager, compiled = (given.hidden.clone().requires_grad_() for _ in range(2))
    expected = loss(eager)
    expected.backward()
    result = torch.compile(loss, fullgraph=True)(compiled)
    result.backward()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(compiled.grad, eager.grad)
    assert eager.grad.abs().max() > 0


@pytest.mark.parametrize("workspace", [1 << 20, 1], ids=["kept", "recomputed"])
def test_numerical_gradient(workspace: int) -> None:
    given = case(rows=3, width=4, vocabulary=31, sharpness=0.5).to(torch.float64)

    def values(hidden: Tensor) -> tuple[Tensor, ...]:
        stats = Case(hidden, given.weight, given.asked).run("torch", workspace_bytes=workspace)
        return tuple(getattr(stats, name) for name in DIFFERENTIABLE)

    assert torch.autograd.gradcheck(values, given.hidden.clone().requires_grad_())


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, Tensor) and not item._is_view():
                self.largest = max(self.largest, item.numel() * item.element_size())
        return result


def test_memory_is_bounded_by_the_workspace() -> None:
    given = case(rows=64, vocabulary=40_000)
    asked = {name: value for name, value in given.asked.items() if name != "bias"}
    workspace = 1 << 20
    with LargestTensor() as seen:
        partial_stats(given.hidden, given.weight, 0, **asked, workspace_bytes=workspace)
    assert seen.largest <= workspace
    with LargestTensor() as control:
        given.hidden @ given.weight.T
    assert control.largest == 64 * 40_000 * 4 > 9 * workspace


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"top_k": 65}, "top_k is 65: choose 0 to 64"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"chosen": torch.zeros(5, dtype=torch.int64)}, r"chosen has to be \[N\] int64"),
        ({"next_row": torch.zeros(6)}, r"next_row has to be \[N\] bool"),
        ({"backend": "cuda"}, "no backend 'cuda'"),
    ],
)
def test_refusals(changes: dict[str, Any], says: str) -> None:
    given = case()
    with pytest.raises(UserError, match=says):
        vocab_stats(given.hidden, given.weight, **changes)


def test_shapes_and_quantised_weights_are_refused() -> None:
    given = case()
    with pytest.raises(UserError, match=r"\(6, 16\) and \(1003, 12\)"):
        vocab_stats(given.hidden, given.weight[:, :12])
    with pytest.raises(UserError, match="head_weights"):
        vocab_stats(given.hidden, torch.empty(0))  # as ZeRO-3 leaves it
    with pytest.raises(UserError, match="quantised"):
        vocab_stats(given.hidden, given.weight.to(torch.int8))
    with pytest.raises(RuntimeError, match="not in the vocabulary"):
        vocab_stats(given.hidden, given.weight, chosen=torch.full((6,), 1003))
