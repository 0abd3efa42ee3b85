"""Gradients of vocab_stats to the hidden states against float64 autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vocab_stats_cases import DIFFERENTIABLE, Case, case, from_logits, here, plain

from rl_lvr.errors import UserError
from rl_lvr.ops.vocab_stats import vocab_stats

WEIGHTS = torch.tensor([0.3, -1.0, 2.0, 0.7, -0.2, 1.1])
RECOMPUTED = 6 * 4 * 300  # bytes: less than all logits of the case


@pytest.fixture
def backend() -> str:
    return here()


def gradient(given: Case, name: str, backend: str, **changes: int) -> Tensor:
    hidden = given.hidden.clone().requires_grad_()
    stats = Case(hidden, given.weight, given.asked).run(backend, **changes)
    (result,) = torch.autograd.grad((getattr(stats, name) * WEIGHTS).sum(), hidden)
    return result


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("workspace", [64 << 20, RECOMPUTED, 1], ids=["kept", "recomputed", "narrow"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient(backend: str, name: str, workspace: int) -> None:
    given = case(vocabulary=1003 if workspace > 1 else 300)
    truth = gradient(given.to(torch.float64), name, "reference")
    assert relative(gradient(given, name, backend, workspace_bytes=workspace), truth) < 1e-5
    other = "entropy" if name != "entropy" else "log_z"
    assert relative(gradient(given, other, backend), truth) > 1e-2  # control


@pytest.mark.parametrize("workspace", [64 << 20, 6 * 4 * 1003], ids=["whole", "kept in slices"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_error_in_half_precision_is_at_most_twice_that_of_plain_torch(backend: str, name: str, workspace: int) -> None:
    given = case().to(torch.bfloat16)
    truth = gradient(given.to(torch.float64), name, "reference")
    ours = gradient(given, name, backend, workspace_bytes=workspace)
    assert ours.dtype == torch.bfloat16
    hidden = given.hidden.clone().requires_grad_()
    theirs = getattr(plain(Case(hidden, given.weight, given.asked).logits(), given), name)
    (theirs,) = torch.autograd.grad((theirs * WEIGHTS).sum(), hidden)
    assert relative(ours, truth) <= 2 * relative(theirs, truth) + 1e-5


@pytest.mark.parametrize("name", ["entropy", "not_top1", "renyi2", "chosen_logprob"])
def test_confident_rows_keep_their_gradient(backend: str, name: str) -> None:
    """Of 1e-6 and less. The textbook gradient in float32 has lost it."""
    logits = torch.randn(2, 900, generator=torch.Generator().manual_seed(0))
    logits[0, 5], logits[1, 800] = 27.0, 33.0
    hidden, weight = from_logits(logits)
    chosen = torch.tensor([5, 800])

    def of(run_on: str, dtype: torch.dtype) -> Tensor:
        h = hidden.to(dtype).requires_grad_()
        stats = vocab_stats(h, weight.to(dtype), chosen=chosen, backend=run_on)
        return torch.autograd.grad(getattr(stats, name).sum(), h)[0].double()

    truth = of("reference", torch.float64)
    assert 0 < float(truth.abs().max()) < 1e-5
    assert relative(of(backend, torch.float32), truth) < 1e-5
    h = hidden.clone().requires_grad_()
    logp = (h @ weight.T).log_softmax(-1)
    textbook = {
        "entropy": lambda: -(logp.exp() * logp).sum(),
        "not_top1": lambda: (1 - logp.exp().amax(-1)).sum(),
        "renyi2": lambda: -(logp.exp() ** 2).sum(-1).log().sum(),
        "chosen_logprob": lambda: logp.gather(-1, chosen[:, None]).sum(),
    }[name]()
    assert relative(torch.autograd.grad(textbook, h)[0], truth) > 1e-3


def test_banned_ids_get_none(backend: str) -> None:
    given = case(vocabulary=200)
    bias = given.asked["bias"].clone()
    bias[50:120] = -torch.inf
    banned = Case(given.hidden, given.weight, {**given.asked, "bias": bias})
    keep = torch.cat([torch.arange(50), torch.arange(120, 200)])
    a, b, scaling = given.asked["lora"]
    asked = {**given.asked, "bias": bias[keep], "lora": (a, b[keep], scaling), "chosen": None}
    truth = gradient(Case(given.hidden, given.weight[keep], asked).to(torch.float64), "entropy", "reference")
    assert relative(gradient(banned, "entropy", backend), truth) < 1e-5


def test_only_what_has_a_gradient_gives_one(backend: str) -> None:
    given = case()
    hidden = given.hidden.clone().requires_grad_()
    stats = Case(hidden, given.weight, given.asked).run(backend)
    assert all(getattr(stats, name).requires_grad for name in DIFFERENTIABLE)
    assert not any(t.requires_grad for t in (stats.kl_next, stats.topk_mass, stats.top1_id))
    with torch.no_grad():
        assert not Case(hidden, given.weight, given.asked).run(backend).entropy.requires_grad


def test_a_head_that_waits_for_a_gradient_is_refused(backend: str) -> None:
    given = case()
    weight, hidden = given.weight.clone().requires_grad_(), given.hidden.clone().requires_grad_()
    with pytest.raises(UserError, match=r"the head gets no gradient here: detach"):
        vocab_stats(hidden, weight, backend=backend)
    assert vocab_stats(given.hidden, weight, backend=backend).entropy.shape == (6,)
    with torch.no_grad():
        vocab_stats(hidden, weight, backend=backend)
