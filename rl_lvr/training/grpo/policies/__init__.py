"""Latent policies: one file each, found by the name in a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import cast

from trl import GRPOConfig

from rl_lvr.errors import UserError, exits_refused, near_miss
from rl_lvr.plugins import Kind, find, installed
from rl_lvr.training.grpo.policies.base import OF_POLICIES, LatentActions, LatentLoss, LatentPolicy, PassInputs
from rl_lvr.training.grpo.policies.context import Context
from rl_lvr.training.grpo.policies.gaussian import Gaussian
from rl_lvr.training.grpo.policies.spherical import Spherical
from rl_lvr.training.grpo.policies.unrolled import Unrolled
from rl_lvr.training.rewards.options import with_options
from rl_lvr.training.runs.settings import refuse_unused

__all__ = ["LatentActions", "LatentLoss", "LatentPolicy", "PassInputs", "policy_of"]

BUILT_IN: dict[str, type[LatentPolicy]] = {
    "context": Context,
    "unrolled": Unrolled,
    "gaussian": Gaussian,
    "spherical": Spherical,
}
POLICY = Kind("latent_policy", "rl_lvr.latent_policies", thing="Class")


def policy_of(config: GRPOConfig) -> LatentPolicy:
    """Return the policy that the settings name, built with its options and checked against the other settings."""
    what = f"latent_policy {config.latent_policy!r}"
    options = config.latent_policy_options or {}
    if not isinstance(options, Mapping):
        raise UserError(f"latent_policy_options is {options!r}; write name: value.")
    with exits_refused(what):
        policy = cast("LatentPolicy", with_options(_class_of(config.latent_policy), options, what, config=config))
    unread = {name: why for name, why in OF_POLICIES.items() if name not in policy.settings}
    refuse_unused(config, unread, f"with latent_policy {policy.name}")
    policy.check()
    return policy


def _class_of(reference: str) -> type[LatentPolicy]:
    if reference in BUILT_IN:
        return BUILT_IN[reference]
    if ":" not in reference and reference not in (others := installed(POLICY)):
        names = [*BUILT_IN, *others]
        hint = near_miss(reference, names, f"; choose {', '.join(names)}.")
        raise UserError(f"no latent_policy {reference!r}{hint}")
    found = find(POLICY, reference)
    if not (inspect.isclass(found.target) and issubclass(found.target, LatentPolicy)):
        raise UserError(f"latent_policy {reference!r}: {found.where} is not a subclass of LatentPolicy.")
    return found.target
