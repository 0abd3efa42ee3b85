"""What differs between backbone families, and nothing else. Import from here, and from `models.oracle`."""

from rl_lvr.models.base import Family, Positions, TokenGrid
from rl_lvr.models.loading import load_model, load_processor, load_weights
from rl_lvr.models.registry import UnsupportedFamily, family_of, register_family

__all__ = [
    "Family",
    "Positions",
    "TokenGrid",
    "UnsupportedFamily",
    "family_of",
    "load_model",
    "load_processor",
    "load_weights",
    "register_family",
]
