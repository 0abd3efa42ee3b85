"""The driver half: always active, answers Triton's and vLLM's questions about the device with the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from triton.backends import compiler as _compiler
from triton.backends import driver as _base

if TYPE_CHECKING:
    import torch

TARGET = _compiler.GPUTarget("cpu", 0, 1)


class InterpreterDriver(_base.DriverBase):
    """Torch is imported by the methods only: finding the backends must stay cheap."""

    def __init__(self) -> None:
        self.utils = None  # the place of the compiled launcher's helpers: the interpreter has none

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> Any:
        return TARGET

    def get_active_torch_device(self) -> torch.device:
        import torch

        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        import torch

        return torch.cpu

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return (0, 0)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one CPU."""

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return time_once

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        import torch

        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None:
        """Nothing is cached between two interpreted runs."""

    def assemble_tensormap_to_arg(self, tensormaps_info: Any, args: Any) -> NoReturn:
        raise RuntimeError("tensor maps (TMA) exist on NVIDIA GPUs only; the CPU interpreter has none")


def time_once(function: Callable[[], Any], **options: Any) -> list[float]:
    """Milliseconds of one run, thrice: an interpreted run is slow, and its quantiles mean nothing."""
    start = time.perf_counter()
    function()
    return [1e3 * (time.perf_counter() - start)] * 3
