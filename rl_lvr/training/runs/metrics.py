"""Figures of the step in progress, in TRL's own store: TRL averages and logs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from rl_lvr.agreement import concatenated, mean_of_all


class Metrics:
    """What parts of a trainer add figures to. Means and maxima are over all processes, which all add them."""

    def __init__(self, store: Mapping[str, dict[str, list[float]]], training: Callable[[], bool]) -> None:
        """`store` is the trainer's `_metrics`; `training` tells whether a step or an evaluation is in progress."""
        self._store, self._training = store, training

    @property
    def training(self) -> bool:
        return self._training()

    def add(self, name: str, value: float) -> None:
        self._store["train" if self.training else "eval"][name].append(value)

    def add_mean(self, name: str, total: float, count: int) -> float | None:
        """Return the mean; nothing is added where nothing was counted."""
        mean = mean_of_all(total, count)
        if mean is not None:
            self.add(name, mean)
        return mean

    def add_largest(self, name: str, value: float) -> None:
        self.add(name, float(concatenated(torch.tensor([value])).max()))
