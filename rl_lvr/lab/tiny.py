"""A tiny model of a family with random weights, its tokenizer and processor, saved as a Hugging Face folder.

Real transformers classes, no downloads: `AutoProcessor` and `AutoModelForImageTextToText` (or `AutoModelForCausalLM`)
load the folder as they would load a 7B checkpoint. The tokenizer is in `lab/tokenizer.py`; the configuration of a small
model of a family stands in the family's own module.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from rl_lvr.errors import UserError
from rl_lvr.lab.tokenizer import ROLES, build_tokenizer
from rl_lvr.models import Family, TinySpec, family_class


def build_tiny(spec: TinySpec, folder: str | Path) -> Path:
    """Build the model of `spec` and save it, its tokenizer and its processor as the new folder `folder`."""
    import torch

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: choose a new folder for the tiny model, or delete it first.")
    family = family_class(spec.family)
    tokenizer = build_tokenizer(spec.family, (*ROLES, *spec.words), spec.markers)
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        model, processor = family.tiny(spec, tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id

    # Save beside the target and rename: a run that is stopped leaves no half model behind.
    folder.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(half)
        _name_as_released(half / "model.safetensors", family(model.config))
        processor.save_pretrained(half)
        half.chmod(0o755)  # mkdtemp makes it private
        os.replace(half, folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return folder


def _name_as_released(weights: Path, family: Family) -> None:
    """Give the parameters the names that they have in released checkpoints, which vLLM looks for.

    transformers writes these only for a model that it has read under them.
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    released = {family.released_name(name): tensor for name, tensor in tensors.items()}
    if released.keys() != tensors.keys():
        save_file(released, weights, metadata={"format": "pt"})
