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
from rl_lvr.rollout.record import FOLDER, drop_from
from rl_lvr.training.grpo.filtering import Idle
from rl_lvr.training.runs.checkpoints import foreign
from rl_lvr.training.runs.resuming import Moment, Resumable
from rl_lvr.wrapping import gathered, unwrapped

_REFERENCE = "reference.safetensors"


class ResumableGRPO(Resumable, GRPOTrainer):
    """TRL's trainer, resumed exactly."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self._sampler: Any = None
        super().__init__(*args, **more)
        self._idle = Idle(self.args.max_idle_steps)

    # ---- the order of the data

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def _init_training_state(self, *args: Any, **more: Any) -> tuple[int, int]:
        """A new `RepeatSampler` would shuffle the epoch that is resumed as it shuffled the first."""
        epochs, steps = super()._init_training_state(*args, **more)
        if self._sampler is not None and self._sampler.shuffle:
            for _ in range(epochs):
                torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)
        drop_from(Path(self.args.output_dir) / FOLDER, self.accelerator.process_index, self.state.global_step)
        return epochs, steps

    # ---- moments

    def _now(self) -> Moment:
        moment = super()._now()
        moment.counters |= {"micro_batches": self._step, "idle": self._idle.count}
        if self.use_adaptive_entropy:  # TRL moves it within the loss, before the step is done
            moment.counters["entropy"] = [self.entropy_coef, self._last_world_entropy]
        moment.buffer = self._buffered_inputs
        return moment

    def _take(self, moment: Moment) -> None:
        super()._take(moment)
        self._step = moment.counters["micro_batches"]
        self._idle.count = moment.counters["idle"]
        if self.use_adaptive_entropy and "entropy" in moment.counters:
            self.entropy_coef, self._last_world_entropy = moment.counters["entropy"]
            self._entropy_window_stats = None  # whole at the end of a step
        self._buffered_inputs = moment.buffer

    @property
    def _inside_generation_batch(self) -> bool:
        return self._step % (self.args.steps_per_generation * self.num_iterations) != 0

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._inside_generation_batch and self._buffered_inputs is not None:
            save_batches(self._buffered_inputs, self._buffer_path(Path(output_dir)))
        if self.args.sync_ref_model:
            self._save_reference(Path(output_dir) / _REFERENCE)

    def _load_moment(self, checkpoint: Path) -> None:
        count = len(list(checkpoint.glob("generation-*.safetensors")))
        if count not in (0, self.args.world_size):
            raise UserError(
                f"{checkpoint} lies inside a generation batch of {count} processes: resume it with as many."
            )
        super()._load_moment(checkpoint)
        if self.args.sync_ref_model and not foreign(checkpoint):  # TRL begins with a new reference there
            self._load_reference(checkpoint / _REFERENCE)

    def _load_buffer(self, checkpoint: Path) -> list[dict[str, Any]] | None:
        path = self._buffer_path(checkpoint)
        return load_batches(path, self.accelerator.device) if path.is_file() else None

    def _buffer_path(self, folder: Path) -> Path:
        return folder / f"generation-{self.args.process_index:05d}.safetensors"

    # ---- a reference model that follows the policy

    def _save_reference(self, path: Path) -> None:
        """Every process takes part: under ZeRO-3 each holds a part of every weight."""
        kept: dict[str, Tensor] = {}
        for name, parameter in unwrapped(self.ref_model).named_parameters():
            with gathered(parameter):
                if self.args.should_save:
                    kept[name] = parameter.detach().cpu().clone()
        if self.args.should_save:
            save_file(kept, path)

    def _load_reference(self, path: Path) -> None:
        with safe_open(str(path), framework="pt") as file:
            for name, parameter in unwrapped(self.ref_model).named_parameters():
                with gathered(parameter, write=True), torch.no_grad():
                    if not hasattr(parameter, "ds_id") or self.accelerator.is_main_process:
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
