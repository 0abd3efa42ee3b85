"""The lab's model: small enough to train from scratch on two cores, large enough to follow a path."""

from __future__ import annotations

from pathlib import Path

from rl_lvr.data.puzzles import PuzzleConfig
from rl_lvr.errors import UserError
from rl_lvr.lab.tiny import TinySpec, build_tiny

PATCH = 4  # pixels; a token is 2 x 2 patches, which is one cell of 8 pixels


def build_lab_model(
    out: str | Path,
    *,
    family: str = "qwen2_5_vl",
    grid: str = "3x3",
    layers: int = 3,
    hidden: int = 128,
    seed: int = 0,
) -> Path:
    """An untrained model whose tokenizer knows the words of the pointer puzzles of this grid."""
    rows, _, cols = grid.partition("x")
    if not (rows.isdigit() and cols.isdigit()):
        raise UserError(f"--grid is {grid!r}; write rows x columns, such as 3x3.")
    if Path(out).exists():
        raise UserError(f"{out} exists already; choose another folder.")
    puzzles = PuzzleConfig(rows=int(rows), cols=int(cols), hops=1, latents="none")
    spec = TinySpec(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=4,
        kv_heads=2,
        intermediate=2 * hidden,
        vision_depth=2,
        vision_hidden=64,
        vision_heads=2,
        patch=PATCH,
        words=puzzles.words,
        init_std=0.02,
        seed=seed,
    )
    return build_tiny(spec, out)
