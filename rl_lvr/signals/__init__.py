"""Signals: numbers about what a model does with its latents, from one forward pass. Import from here."""

from rl_lvr.signals.collapse import Collapse, between_samples, pooled
from rl_lvr.signals.forward import Column
from rl_lvr.signals.image_map import ImageMap, image_map
from rl_lvr.signals.measuring import Measured, measure
from rl_lvr.signals.probe import Probe, Reading
from rl_lvr.signals.regions import Regions, find_regions
from rl_lvr.signals.specs import SIGNALS, SignalSpec, parse_signals

__all__ = [
    "SIGNALS",
    "Collapse",
    "Column",
    "ImageMap",
    "Measured",
    "Probe",
    "Reading",
    "Regions",
    "SignalSpec",
    "between_samples",
    "find_regions",
    "image_map",
    "measure",
    "parse_signals",
    "pooled",
]
