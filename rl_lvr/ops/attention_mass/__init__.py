"""How much attention queries pay to regions of keys, without the T x T matrix. `attention_mass` is the entry point.

problem.py: what is computed. reference.py: the definition in float64. torch_chunked.py: any device, and all gradients.
triton_*.py: kernels. flash.py: the same mass from any stock attention. operators.py: registration. api.py: signatures.
"""

from rl_lvr.ops.attention_mass.api import (
    Reduced,
    attention_entropy,
    attention_mass,
    attention_mass_reduced,
    log_sum_exp,
)
from rl_lvr.ops.attention_mass.flash import attention_mass_flash
from rl_lvr.ops.attention_mass.problem import labelled_positions

__all__ = [
    "Reduced",
    "attention_entropy",
    "attention_mass",
    "attention_mass_flash",
    "attention_mass_reduced",
    "labelled_positions",
    "log_sum_exp",
]
