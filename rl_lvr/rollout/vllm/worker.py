"""What an engine asks its workers, through `collective_rpc`. Bytes and plain lists only: they cross processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_lvr.rollout.vllm import weights as checks

EXTENSION = "rl_lvr.rollout.vllm.worker.LatentWorker"


class LatentWorker:
    """vLLM mixes this into its worker class (`worker_extension_cls`)."""

    model_runner: Any
    is_driver_worker: bool
    """Of the ranks of one engine the first. Engines beside a trainer's ranks have a `rank` of the trainer's."""

    def latent_status(self) -> dict[str, Any]:
        """Whether latents work in this worker at all: vLLM only logs it when a plugin fails to load."""
        state: Any = getattr(self.model_runner, "model_state", None)
        if type(state).__name__ != "LatentModelState":
            return {"ready": False, "model": type(self.model_runner.model).__name__}
        markers = state.settings.markers
        return {
            "ready": True,
            "model": type(self.model_runner.model).__name__,
            "markers": [markers.start, markers.slot, markers.end],
            "counters": vars(state.counters),
            "tables": state.history.counts(),
        }

    def latent_pop(self, uids: list[str], every_rank: bool = False) -> dict[str, list[list[Any]]]:
        """The latents of these uids, once; see `history.Latents.as_row`. All ranks have them, the driver answers."""
        found = self.model_runner.model_state.history.pop(uids)
        if not self.is_driver_worker and not every_rank:
            return {}
        return {uid: [row.as_row() for row in rows] for uid, rows in found.items()}

    def latent_hidden(self) -> bytes:
        """float32, the hidden state of the first row of the last step."""
        return self.model_runner.model.latent_hidden[0].float().cpu().numpy().tobytes()

    def latent_load(self, weights: Iterable[tuple[str, Tensor]]) -> list[Any]:
        """Take over weights under the names of a checkpoint; returns what `weights.Receipt.as_row` says of them."""
        with torch.no_grad():
            return checks.load(self.model_runner, weights).as_row()

    def latent_load_files(self, folder: str) -> list[Any]:
        """The same from a folder of safetensors files, for workers in other processes."""
        return self.latent_load(_read(sorted(Path(folder).glob("*.safetensors"))))


def _read(paths: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
