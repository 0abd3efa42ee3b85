"""Models and puzzles of the lab's experiments."""

from __future__ import annotations

from dataclasses import dataclass

from rl_lvr.data.puzzles import PuzzleConfig


@dataclass(frozen=True)
class LabConfig:
    """What an experiment builds. A folder made with one config is not continued with another."""

    family: str = "qwen2_5_vl"
    rows: int = 3
    cols: int = 3
    hops: int = 5
    train: int = 24000
    test: int = 1000
    max_steps: int | None = None
    """Steps of every training run, for a quick look; None takes the recipes'."""

    def puzzles(self, name: str) -> PuzzleConfig:
        """The puzzles of a set by name."""
        grid = {"rows": self.rows, "cols": self.cols}
        return {
            "one_hop": PuzzleConfig(**grid, hops=1, latents="none", seed=1),
            "diagnostic": PuzzleConfig(**grid, hops=self.hops, latents="path", seed=2),
            "weak": PuzzleConfig(**grid, hops=1, latents="decorative", k=self.hops, seed=3),
        }[name]
