"""What differs between backbone families, and nothing else. Import from here, and from `models.oracle`."""

from rl_lvr.models.base import Family, ImageFrame, Positions, TokenGrid
from rl_lvr.models.loading import load_model, load_processor, load_weights
from rl_lvr.models.registry import UnsupportedFamily, family_class, family_of, register_family
from rl_lvr.models.tiny import TinySpec

__all__ = [
    "Family",
    "ImageFrame",
    "Positions",
    "TinySpec",
    "TokenGrid",
    "UnsupportedFamily",
    "family_class",
    "family_of",
    "load_model",
    "load_processor",
    "load_weights",
    "register_family",
]
