"""`gaussian`: noise of one standard deviation in every dimension."""

from __future__ import annotations

from rl_lvr.training.grpo.policies.densities import Density


class Gaussian(Density):
    law = "gaussian"
