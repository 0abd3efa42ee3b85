"""Where the time and the memory of a step go: generate, score, reward, loss, optimizer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rl_lvr.training.grpo.config import LatentGRPOConfig
from rl_lvr.training.grpo.flops import BACKWARD, forward_flops, peak_flops
from rl_lvr.training.runs.metrics import Metrics
from rl_lvr.wrapping import unwrapped

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


class Timing(TrainerCallback):
    """The phases of a trainer's steps. Figures are those of the first process.

    TRL's `profiling_context` measures seconds alone, and hands them to W&B and MLflow, not to the log.
    """

    def __init__(self, model: nn.Module, config: LatentGRPOConfig, metrics: Metrics) -> None:
        self.phases = Phases(config.device)
        self._metrics = metrics
        text: Any = unwrapped(model).config
        self._text_config = text.get_text_config()
        half = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else next(model.parameters()).dtype
        self.peak_flops = peak_flops(config.device, half, config.peak_tflops)

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """Return a context that is measured as the phase `name`, in training."""
        return self.phases(name) if self._metrics.training else nullcontext()

    def note_work(self, name: str, attention_mask: Tensor, scored: int) -> None:
        """Count the operations of a pass over rows whose last `scored` tokens it scores."""
        if self.peak_flops is None or not self._metrics.training:
            return
        positions = int(attention_mask[:, -scored:].sum())
        flops = forward_flops(self._text_config, attention_mask.sum(1).tolist(), positions)
        self.phases.work(name, flops * (1 + BACKWARD) if name == "loss" else flops)

    # ---- the optimizer's step is the loop's own, and only callbacks see it (DeepSpeed's engine steps within backward)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.phases.begin()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.phases.end("optimizer")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Hand the step's figures to the log."""
        for name, value in self.phases.flush(self.peak_flops).items():
            self._metrics.add(name, value)
