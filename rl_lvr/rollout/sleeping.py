"""An engine that holds no memory while it does not work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rl_lvr.rollout.types import Request, Rollout, Sampling


class Sleeper:
    """An engine that holds memory only while it works, and leaves the rest of the time to the trainer.

    It sleeps deeply (level 2): nothing is parked on the host, and the weights come from the trainer at every awakening.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.markers = engine.markers
        self.capabilities = engine.capabilities
        self._model: nn.Module | None = None
        self._awake = True
        self._sleep()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        if not self._awake:
            if self._model is None:
                raise RuntimeError("an engine that has slept has no weights: call sync_weights first.")
            self.sync_weights(self._model)
        try:
            rollouts: list[Rollout] = self.engine.generate(requests, sampling)
        finally:
            self._sleep()
        return rollouts

    def sync_weights(self, model: nn.Module) -> None:
        """Wake up with these weights; they are looked up again at every later awakening."""
        if not self._awake:
            try:
                self.engine.wake()
            except Exception:
                from rl_lvr.rollout.vllm.weights import take_part

                take_part(model)  # other ranks, which woke up, wait for this one
                raise
            self._awake = True
        self.engine.sync_weights(model)
        self._model = model

    def close(self) -> None:
        self.engine.close()

    def _sleep(self) -> None:
        self.engine.sleep(2)
        self._awake = False
