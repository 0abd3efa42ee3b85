"""The laws of latents: what is drawn has the density that prices it, and the loss is the derivative by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from rl_lvr.errors import UserError
from rl_lvr.latents.density import check_sigma, divergence, explore, log_density
from rl_lvr.latents.noise import keyed_normal
from rl_lvr.training.grpo.config import LatentGRPOConfig
from rl_lvr.training.grpo.policies import LatentActions, LatentPolicy, policy_of

LAWS = ("gaussian", "spherical")


def draws(law: str, mean: Tensor, sigma: float, count: int) -> tuple[Tensor, Tensor]:
    """`count` latents around one mean, and that mean repeated."""
    means = mean.expand(count, -1)
    noise = keyed_normal(torch.zeros(count, dtype=torch.long), torch.arange(count), mean.shape[-1])
    return explore(means, noise, torch.full((count,), sigma), law), means


def test_gaussian_is_the_normal_density() -> None:
    torch.manual_seed(0)
    z, one, two = torch.randn(3, 5, 7)
    sigma = torch.rand(5) + 0.1
    expected = [Normal(mean, sigma[:, None]).log_prob(z).sum(1) for mean in (one, two)]
    found = [log_density(z, mean, sigma, "gaussian", "sum") for mean in (one, two)]
    assert torch.allclose(found[0] - found[1], expected[0] - expected[1], atol=1e-3, rtol=1e-4)
    per_dimension = log_density(z, one, sigma, "gaussian", "mean")
    assert torch.allclose(per_dimension * 7, found[0], rtol=1e-5)
    kl = kl_divergence(Normal(one, sigma[:, None]), Normal(two, sigma[:, None])).sum(1)
    assert torch.allclose(divergence(one, two, sigma, "gaussian", "sum"), kl, rtol=1e-4)


@pytest.mark.parametrize("law", LAWS)
def test_what_is_drawn_has_that_density(law: str) -> None:
    """E_p[q / p] = 1 for any other mean: wrong by the missing Jacobian if the density is another law's."""
    mean = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    other = torch.tensor([[2 * math.cos(0.3), 2 * math.sin(0.3), 0.0, 0.0]])
    sigma = 0.3
    z, means = draws(law, mean, sigma, 200_000)
    at = torch.full((len(z),), sigma)
    ratio = (log_density(z, other, at, law, "sum") - log_density(z, means, at, law, "sum")).exp()
    error = float(ratio.std()) / math.sqrt(len(z))
    assert float(ratio.mean()) == pytest.approx(1.0, abs=4 * error)
    if law == "spherical":
        assert torch.allclose(z.norm(dim=1), torch.full((len(z),), 2.0), atol=1e-5)
        chord = (z / 2 - means / 2).norm(dim=1)
        flat = -(2 * (chord / 2).asin()).square() / (2 * sigma**2)  # the control: the Jacobian left out
        there = -(2 * ((z / 2 - other / 2).norm(dim=1) / 2).asin()).square() / (2 * sigma**2)
        assert float((there - flat).exp().mean()) != pytest.approx(1.0, abs=4 * error)


def test_spherical_divergence_to_second_order() -> None:
    mean, other = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[math.cos(0.05), math.sin(0.05), 0, 0]])
    z, means = draws("spherical", mean, 0.2, 200_000)
    at = torch.full((len(z),), 0.2)
    sampled = log_density(z, means, at, "spherical", "sum") - log_density(z, other, at, "spherical", "sum")
    closed = float(divergence(mean, other, at[:1], "spherical", "sum"))
    assert closed == pytest.approx(0.05**2 / (2 * 0.2**2), rel=1e-4)
    assert float(sampled.mean()) == pytest.approx(closed, rel=0.1, abs=4 * float(sampled.std()) / len(z) ** 0.5)


@pytest.mark.parametrize("law", LAWS)
def test_zero_noise_has_zero_gradient(law: str) -> None:
    """Monet's rollouts: a latent that equals its mean. The density then has no slope, whatever the advantage."""
    mean = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z = mean.detach().clone()
    log_density(z, mean, torch.full((4,), 0.1), law, "sum").sum().backward()
    assert mean.grad is not None
    assert float(mean.grad.abs().max()) < 1e-3  # rounding of the unit vectors, divided by sigma squared
    moved = mean.detach().clone().requires_grad_()
    noise = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    log_density(
        explore(z, noise, torch.full((4,), 0.1), law), moved, torch.full((4,), 0.1), law, "sum"
    ).sum().backward()
    assert moved.grad is not None
    assert float(moved.grad.abs().max()) > 0.1


@settings(max_examples=30)
@given(st.integers(2, 12), st.integers(0, 10_000), st.sampled_from(LAWS))
def test_densities_do_not_see_rotations(width: int, seed: int, law: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, mean = torch.randn(2, 3, width, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    sigma = torch.full((3,), 0.5)
    here, there = log_density(z, mean, sigma, law, "mean"), log_density(z @ turn, mean @ turn, sigma, law, "mean")
    assert torch.allclose(here, there, rtol=1e-6, atol=1e-6)


def test_noise_that_goes_round_the_sphere_is_refused() -> None:
    check_sigma("spherical", 0.01, 3584)
    check_sigma("gaussian", 10.0, 3584)
    with pytest.raises(UserError, match="choose a sigma of at most"):
        check_sigma("spherical", 0.1, 3584)


# ---- the loss


def actions(law: str, rows: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> LatentActions:
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(rows, 3, 6, generator=generator, dtype=dtype)
    sigma = torch.full((rows,), 0.2)
    noise = torch.randn(rows * 3, 6, generator=generator, dtype=dtype)
    z = explore(old.flatten(0, 1), noise, sigma.repeat_interleave(3), law).view_as(old).to(dtype)
    chosen = torch.ones(rows, 3, dtype=torch.bool)
    chosen[0, 1:] = False
    chosen[1] = False
    means = old + 0.05 * torch.randn(old.shape, generator=generator, dtype=dtype)
    advantages = torch.randn(rows, generator=generator, dtype=dtype)
    return LatentActions(z, chosen, sigma, means, old, old + 0.1, advantages, torch.ones_like(advantages))


def priced(law: str, scale: str, epsilon: float, beta: float) -> LatentPolicy:
    config = LatentGRPOConfig(
        "unused", latent_policy=law, latent_sigma=0.2, latent_scale=scale, latent_epsilon=epsilon, beta=beta
    )
    return policy_of(config)


@pytest.mark.parametrize("law", LAWS)
def test_the_loss_by_finite_differences(law: str) -> None:
    made = actions(law)
    pricing = priced(law, "sum", 10.0, 0.3)
    means = made.means.clone().requires_grad_()
    pricing.loss(replace(made, means=means)).loss.backward()
    assert means.grad is not None
    assert float(means.grad[~made.chosen].abs().max()) == 0
    direction = torch.randn(means.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    step = 1e-6
    up, down = (float(pricing.loss(replace(made, means=made.means + sign * step * direction)).loss) for sign in (1, -1))
    assert (up - down) / (2 * step) == pytest.approx(float((means.grad * direction).sum()), rel=1e-5)


def test_the_loss_by_hand() -> None:
    one = torch.zeros(1, 1, 2, dtype=torch.float64)
    made = LatentActions(
        values=one + 0.3,
        chosen=torch.tensor([[True]]),
        sigma=torch.tensor([0.5]),
        means=one + 0.1,
        old_means=one,
        reference_means=one,
        advantages=torch.tensor([2.0], dtype=torch.float64),
        weights=torch.tensor([1.0], dtype=torch.float64),
    )
    ratio = math.exp((0.09 - 0.04) * 2 / (2 * 0.25))  # |z|^2 - |z - 0.1|^2 over 2 sigma^2, two dimensions
    kl = 0.01 * 2 / (2 * 0.25)
    found = priced("gaussian", "sum", 0.5, 0.1).loss(made)
    assert float(found.loss) == pytest.approx(-2.0 * ratio + 0.1 * kl, rel=1e-5)
    assert int(found.clipped) == 0
    half = replace(made, weights=made.weights / 2)  # as TRL weighs tokens: the policy's part, and not the KL
    assert float(priced("gaussian", "sum", 0.5, 0.1).loss(half).loss) == pytest.approx(-ratio + 0.1 * kl, rel=1e-5)
    clipped = priced("gaussian", "sum", 0.1, 0.0).loss(made)
    assert float(clipped.loss) == pytest.approx(-2.2, rel=1e-5)
    assert int(clipped.clipped) == 1
    on_policy = priced("gaussian", "mean", 0.2, 0.0).loss(replace(made, means=one, reference_means=None))
    assert float(on_policy.loss) == pytest.approx(-2.0)


def test_equal_parts_of_a_batch_give_the_same_loss() -> None:
    made, pricing = actions("gaussian"), priced("gaussian", "mean", 0.2, 0.1)

    def part(a: int, b: int) -> LatentActions:
        return LatentActions(*(getattr(made, name)[a:b] for name in LatentActions.__dataclass_fields__))

    whole = float(pricing.loss(made).loss)
    halves = [float(pricing.loss(part(a, a + 2)).loss) for a in (0, 2)]
    assert whole == pytest.approx(sum(halves) / 2)


def test_the_sum_over_thousands_of_dimensions_leaves_every_clip_range() -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(8, 3584, generator=generator)
    z = explore(old, torch.randn(8, 3584, generator=generator), torch.full((8,), 0.1), "gaussian")
    new = old + 0.005 * torch.randn(old.shape, generator=generator)
    sigma = torch.full((8,), 0.1)
    spread = {
        scale: (log_density(z, new, sigma, "gaussian", scale) - log_density(z, old, sigma, "gaussian", scale)).abs()
        for scale in ("sum", "mean")
    }
    assert float(spread["sum"].max()) > 0.3
    assert float(spread["mean"].max()) < 0.01
