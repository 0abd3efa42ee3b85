"""Lets `import torchvision` succeed on a CPU build of torch.

PyPI's torchvision for Linux is linked with CUDA, so on CPU torch its C extension does not load,
`torchvision::nms` is never registered, and the import dies when torchvision attaches a fake kernel to it.
Declaring the two schemas, without a kernel, is enough. torchvision's own CPU build (from PyTorch's index)
registers them itself: then nothing is declared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from rl_lvr_cpu_runtime import nvidia_devices

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
OPERATORS = ("nms", "qnms")
_libraries: list[Any] = []  # a torch Library takes its definitions back when it is collected


class DeclareBeforeImport:
    """A finder that finds nothing: it only notices that torchvision is about to be imported, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare_missing()
        return None


def declare_missing() -> None:
    """Declare torchvision's operators unless its C extension brings them along."""
    spec = PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return  # not installed: the import that asked will say so

    import torch

    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
    except OSError:  # what the dynamic loader raises for a missing CUDA library
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in OPERATORS:
            library.define(operator + SCHEMA)
        _libraries.append(library)


if not nvidia_devices():
    sys.meta_path.insert(0, DeclareBeforeImport())
