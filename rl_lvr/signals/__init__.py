"""Signals: numbers about what a model does with its latents, from one forward pass. Import from here."""

from rl_lvr.signals.collapse import Collapse, between_samples, pooled
from rl_lvr.signals.declaring import Needs, signal
from rl_lvr.signals.forward import Forward
from rl_lvr.signals.image_map import ImageMap, image_map
from rl_lvr.signals.measuring import Measured, SignalTensors, measure, signal_tensors
from rl_lvr.signals.parameters import Range
from rl_lvr.signals.probe import Probe, Reading
from rl_lvr.signals.regions import Regions, find_regions
from rl_lvr.signals.specs import SIGNALS, SignalSpec, parse_signals
from rl_lvr.signals.values import Column, Values

__all__ = [
    "SIGNALS",
    "Collapse",
    "Column",
    "Forward",
    "ImageMap",
    "Measured",
    "Needs",
    "Probe",
    "Range",
    "Reading",
    "Regions",
    "SignalSpec",
    "SignalTensors",
    "Values",
    "between_samples",
    "find_regions",
    "image_map",
    "measure",
    "parse_signals",
    "pooled",
    "signal",
    "signal_tensors",
]
