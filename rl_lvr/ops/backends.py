"""Which implementation of a fused operation runs: one rule, the sentence that prints it, and clear refusals.

Nothing falls back: what cannot run is an error with its cure. Imports neither torch nor Triton, so that
`rl-lvr doctor` can ask without loading them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rl_lvr.errors import UserError

if TYPE_CHECKING:
    import torch

BACKENDS = ("reference", "torch", "triton")
RULE = "triton for float32, bfloat16 and float16 on CUDA, torch for everything else, reference only by name"
KERNEL_DTYPES = ("float32", "bfloat16", "float16")


def choose(op: str, device: torch.device, dtype: torch.dtype, asked: str = "auto") -> str:
    """The backend of `BACKENDS` that runs `op` on tensors of `device` and `dtype`: `asked`, or by `RULE` for "auto"."""
    if asked not in ("auto", *BACKENDS):
        raise UserError(f"{op}: there is no backend {asked!r}: choose one of auto, {', '.join(BACKENDS)}.")
    kind = str(dtype).removeprefix("torch.")
    chosen = by_rule(device.type, kind) if asked == "auto" else asked
    if chosen == "triton":
        fault = _fault_of_triton(device.type, kind)
        if fault:
            raise UserError(f"{op}: backend triton {fault}")
    return chosen


def by_rule(device: str, dtype: str = "float32") -> str:
    """`RULE` for a kind of device ("cuda", "cpu") and a dtype's name."""
    return "triton" if device == "cuda" and dtype in KERNEL_DTYPES else "torch"


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, which it decides when it is first imported."""
    import triton.language as tl

    return type(tl.sum).__name__ == "InterpretedFunction"


def _fault_of_triton(device: str, dtype: str) -> str | None:
    if dtype not in KERNEL_DTYPES:
        return f"has no kernel for {dtype}: pass {', '.join(KERNEL_DTYPES)}, or backend='torch'."
    if find_spec("triton") is None:
        return "is not installed: run `make setup`, or pass backend='torch'."
    if device != "cuda" and not interpreted():
        return (
            f"cannot run on {device}: pass backend='torch', or for a test set TRITON_INTERPRET=1 "
            "in the environment before Triton is imported."
        )
    return None


@dataclass(frozen=True)
class KernelExample:
    """One ahead-of-time compilation of a kernel: `triton.compile(ASTSource(kernel, signature, constexprs))`.

    `signature` has every argument: a Triton type such as "*fp32" or "i32", or "constexpr" for those in `constexprs`.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
