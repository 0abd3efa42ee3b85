"""Records, their checks, and the puzzle generators. No torch here: tensors are the collator's business."""

from rl_lvr.data.images import ImageError, ImageRef
from rl_lvr.data.record import LatentSpec, LatentTarget, Record
from rl_lvr.data.records import Records, from_datasets, load_records
from rl_lvr.data.schema import LATENT

__all__ = [
    "LATENT",
    "ImageError",
    "ImageRef",
    "LatentSpec",
    "LatentTarget",
    "Record",
    "Records",
    "from_datasets",
    "load_records",
]
