"""Where the time and the memory of a step go: generate, score, reward, loss, optimizer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from rl_lvr.training.grpo.calling import RewardedGRPO
from rl_lvr.training.grpo.flops import BACKWARD, forward_flops, peak_flops

PHASES = ("generate", "score", "reward", "loss", "optimizer")
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_MIB = 2**20


class Phases:
    """Seconds and peak memory of each phase since the last `flush`. One may come several times, none inside another.

    Memory is what CUDA's allocator gave out at most, or without a GPU the largest resident size of the process, which
    Linux alone tells for a stretch of time; elsewhere it is left out.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._peaks: dict[str, float] = defaultdict(float)
        self._flops: dict[str, float] = defaultdict(float)
        self._began = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.begin()
        try:
            yield
        finally:
            self.end(name)

    def begin(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        elif _CLEAR.exists():
            _CLEAR.write_text("5")  # the high-water mark starts anew
        self._began = time.perf_counter()

    def end(self, name: str) -> None:
        peak = None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device) / _MIB
        elif _CLEAR.exists():
            peak = _high_water() / _MIB
        self._seconds[name] += time.perf_counter() - self._began
        if peak is not None:
            self._peaks[name] = max(self._peaks[name], peak)

    def work(self, name: str, flops: float) -> None:
        """Operations that a phase needed."""
        self._flops[name] += flops

    def flush(self, peak_flops: float | None) -> dict[str, float]:
        """Metrics of this step. A phase that did not come, as where rollouts are used again, took 0 seconds."""
        found = {f"phase/{name}_seconds": self._seconds[name] for name in PHASES}
        found |= {f"phase/{name}_peak_mib": peak for name, peak in self._peaks.items()}
        if peak_flops is not None:
            found |= {
                f"phase/{name}_mfu": flops / self._seconds[name] / peak_flops for name, flops in self._flops.items()
            }
        for table in (self._seconds, self._peaks, self._flops):
            table.clear()
        return found


def _high_water() -> int:
    """Bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


class TimedGRPO(RewardedGRPO):
    """The parts of `LatentGRPOTrainer` that measure its phases. Figures are those of the first process."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.phases = Phases(self.accelerator.device)
        config: Any = self.accelerator.unwrap_model(self.model).config
        self._text_config = config.get_text_config()
        half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self.model.dtype
        self._peak_flops = peak_flops(self.accelerator.device, half, self.args.peak_tflops)
        if self.markers is not None:
            self.add_callback(_StepEnds(self))

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return self.phases(name) if self._mode == "train" else nullcontext()

    def _note_work(self, name: str, attention_mask: Tensor, scored: int) -> None:
        if self._peak_flops is None or self._mode != "train":
            return
        positions = int(attention_mask[:, -scored:].sum())
        flops = forward_flops(self._text_config, attention_mask.sum(1).tolist(), positions)
        self.phases.work(name, flops * (1 + BACKWARD) if name == "loss" else flops)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """The parent makes rollouts in here; its loss and the backward pass come after."""
        inputs = super()._prepare_inputs(generation_batch)
        if self.markers is not None and self._mode == "train":
            self.phases.begin()
        return inputs

    def training_step(self, *args: Any, **more: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **more)
        if self.markers is not None:
            self.phases.end("loss")
        return loss

    def _note_phases(self) -> None:
        for name, value in self.phases.flush(self._peak_flops).items():
            self._metrics["train"][name].append(value)


class _StepEnds(TrainerCallback):
    """The optimizer's step is the loop's own, and only callbacks see it. (DeepSpeed's engine steps within backward.)"""

    def __init__(self, trainer: TimedGRPO) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._trainer.phases.begin()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._trainer.phases.end("optimizer")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._trainer._note_phases()
