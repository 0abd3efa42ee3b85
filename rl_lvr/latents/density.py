"""What a latent's probability is: the laws that an engine explores by, and what a policy gradient prices them with.

`mean` is always f(h) of the position *before* the latent. Constants that no parameter enters are left out: ratios and
gradients do not see them. Everything is computed in float32, or in float64 if the vectors are.

- `gaussian`: z = mean + sigma * n, n standard normal (VLPO of Monet, 2511.21395, as it is meant).
- `spherical`: the direction of z is explored on the unit sphere around the mean's, its length is the mean's (after
  the Spherical Gaussian Latent Policy of DLR, 2604.07518, whose latents have length 1). DLR adds noise and projects
  back to the sphere: the density of that law, a projected normal, is an integral. Here the noise is laid into the
  tangent plane and rolled onto the sphere (exponential map), whose density is explicit:
  log p = -a^2 / (2 sigma^2) - (H - 2) log(sin a / a), a the angle between the direction and the mean's. It needs no
  rejection sampling, as a von Mises-Fisher law would, so every engine draws it from the same keyed normal vector.
  Going round the sphere once or more is left out: `check_sigma` keeps its probability below 1e-6.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rl_lvr.errors import UserError

Law = Literal["gaussian", "spherical"]
Scale = Literal["mean", "sum"]

_WIDEST_ANGLE = 0.6
"""Radians, sigma * sqrt(H - 1) at most: the angle is then below pi but for a chance of 1e-6, from H = 2 on."""


def check_sigma(law: Law, sigma: float, hidden_size: int) -> None:
    """Refuse noise so large that the density would not be that of what is drawn."""
    angle = sigma * math.sqrt(hidden_size - 1)
    if law == "spherical" and angle > _WIDEST_ANGLE:
        most = _WIDEST_ANGLE / math.sqrt(hidden_size - 1)
        raise UserError(
            f"spherical noise of sigma {sigma} turns latents of width {hidden_size} by about {angle:.2f} radians: "
            f"choose a sigma of at most {most:.3g}."
        )


def explore(mean: Tensor, noise: Tensor, sigma: Tensor, law: Law) -> Tensor:
    """The latents drawn around `mean` [N, H] with standard normal `noise` [N, H] and `sigma` [N]. float32, [N, H]"""
    mean = _exact(mean)
    if law == "gaussian":
        return mean + sigma[:, None] * noise
    length = mean.norm(dim=-1, keepdim=True)
    direction = mean / length.clamp_min(1e-12)
    tangent = sigma[:, None] * (noise - (noise * direction).sum(-1, keepdim=True) * direction)
    angle = tangent.norm(dim=-1, keepdim=True)
    turned = angle.cos() * direction + torch.where(angle > 0, angle.sin() / angle.clamp_min(1e-12), 1.0) * tangent
    return length * turned


def log_density(z: Tensor, mean: Tensor, sigma: Tensor, law: Law, scale: Scale) -> Tensor:
    """log p(z | mean) up to a constant, [N]. `scale` mean divides it by the dimensions in which the law has noise.

    Without that division a ratio over thousands of dimensions leaves any clip range at once.
    """
    z, mean, sigma = _exact(z), _exact(mean), sigma.to(mean.device)
    dims = z.shape[-1]
    if law == "gaussian":
        value = -(z - mean).square().sum(-1) / (2 * sigma.square())
    else:
        angle = _angle(z, mean)
        dims = dims - 1
        value = -angle.square() / (2 * sigma.square()) - (dims - 1) * torch.log(torch.sinc(angle / math.pi))
    return value / dims if scale == "mean" else value


def divergence(mean: Tensor, reference: Tensor, sigma: Tensor, law: Law, scale: Scale) -> Tensor:
    """KL(law around `mean` || law around `reference`), [N], in closed form.

    gaussian: |mean - reference|^2 / (2 sigma^2), exact. spherical: the squared angle between the two directions in
    the place of the squared distance, which is exact to second order in that angle.
    """
    mean, reference, sigma = _exact(mean), _exact(reference), sigma.to(mean.device)
    if law == "gaussian":
        square, dims = (mean - reference).square().sum(-1), mean.shape[-1]
    else:
        square, dims = _angle(reference, mean).square(), mean.shape[-1] - 1
    value = square / (2 * sigma.square())
    return value / dims if scale == "mean" else value


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _angle(one: Tensor, two: Tensor) -> Tensor:
    """Angle between vectors [N, H], in radians. By atan2: an arccosine is blind to small angles and its slope is not
    finite there."""
    one, two = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (one, two))
    cosine = (one * two).sum(-1)
    across = (one - cosine[..., None] * two).square().sum(-1)
    sine = torch.where(across > 0, across, 1.0).sqrt() * (across > 0)
    return torch.atan2(sine, cosine)
