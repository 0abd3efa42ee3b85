"""What a checkpoint of GRPO holds besides that of any trainer, so that a resumed run is the run itself.

TRL counts micro-batches from zero after a resumption and makes new completions; here the count goes on, and a
checkpoint that falls inside a generation batch carries what is left of it. (To save only at the borders of generation
batches would be simpler, and could not be kept: a signal comes when it comes, and with `num_iterations` or long
batches the last border may be many steps ago.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from trl import GRPOTrainer

from rl_lvr.errors import UserError
from rl_lvr.training.runs.checkpoints import foreign
from rl_lvr.training.runs.moments import Moment, Part
from rl_lvr.wrapping import gathered, unwrapped

_REFERENCE = "reference.safetensors"


class Place(Part):
    """Where a run stands in its data and in its generation batch."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer = trainer
        self.sampler: Any = None
        """Of the training data, once TRL has made it."""

    def skip_epochs(self, epochs: int) -> None:
        """Shuffle as often as was done before: a new sampler would shuffle the epoch that is resumed as the first."""
        if self.sampler is not None and self.sampler.shuffle:
            for _ in range(epochs):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)

    def now(self, moment: Moment) -> None:
        trainer = self._trainer
        moment.counters["micro_batches"] = trainer._step
        if trainer.use_adaptive_entropy:  # TRL moves it within the loss, before the step is done
            moment.counters["entropy"] = [trainer.entropy_coef, trainer._last_world_entropy]
        moment.held["generation"] = trainer._buffered_inputs

    def take(self, moment: Moment) -> None:
        trainer = self._trainer
        trainer._step = moment.counters["micro_batches"]
        if trainer.use_adaptive_entropy and "entropy" in moment.counters:
            trainer.entropy_coef, trainer._last_world_entropy = moment.counters["entropy"]
            trainer._entropy_window_stats = None  # whole at the end of a step
        trainer._buffered_inputs = moment.held.get("generation")

    def save(self, folder: Path) -> None:
        trainer = self._trainer
        inside = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0
        if inside and trainer._buffered_inputs is not None:
            save_batches(trainer._buffered_inputs, self._path(folder))

    def load(self, folder: Path, moment: Moment | None) -> None:
        count = len(list(folder.glob("generation-*.safetensors")))
        if count not in (0, self._trainer.args.world_size):
            raise UserError(f"{folder} lies inside a generation batch of {count} processes: resume it with as many.")
        path = self._path(folder)
        if moment is not None and path.is_file():
            moment.held["generation"] = load_batches(path, self._trainer.accelerator.device)

    def _path(self, folder: Path) -> Path:
        return folder / f"generation-{self._trainer.args.process_index:05d}.safetensors"


class Reference(Part):
    """A reference model that follows the policy (`sync_ref_model`). Under ZeRO-3 all processes gather its weights."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer = trainer

    def save(self, folder: Path) -> None:
        kept: dict[str, Tensor] = {}
        for name, parameter in unwrapped(self._trainer.ref_model).named_parameters():
            with gathered(parameter):
                if self._trainer.args.should_save:
                    kept[name] = parameter.detach().cpu().clone()
        if self._trainer.args.should_save:
            save_file(kept, folder / _REFERENCE)

    def load(self, folder: Path, moment: Moment | None) -> None:
        if foreign(folder):  # TRL begins with a new reference there
            return
        with safe_open(str(folder / _REFERENCE), framework="pt") as file:
            for name, parameter in unwrapped(self._trainer.ref_model).named_parameters():
                with gathered(parameter, write=True), torch.no_grad():
                    if not hasattr(parameter, "ds_id") or self._trainer.accelerator.is_main_process:
                        parameter.copy_(file.get_tensor(name))


def save_batches(batches: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Tensors as safetensors, the rest (lists of counts, None) as JSON in the same file's header."""
    tensors: dict[str, Tensor] = {}
    rest: list[dict[str, Any]] = []
    for index, batch in enumerate(batches):
        rest.append({name: value for name, value in batch.items() if not isinstance(value, Tensor)})
        for name, value in batch.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{name}"] = value.detach().cpu().clone().contiguous()
    order = [list(batch) for batch in batches]
    save_file(tensors, path, metadata={"rest": json.dumps(rest), "order": json.dumps(order)})


def load_batches(path: Path, device: torch.device) -> list[dict[str, Any]]:
    """What `save_batches` wrote, keys in their order."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        rest, order = json.loads(metadata["rest"]), json.loads(metadata["order"])
        return [
            {
                name: rest[index][name] if name in rest[index] else file.get_tensor(f"{index}/{name}").to(device)
                for name in names
            }
            for index, names in enumerate(order)
        ]
