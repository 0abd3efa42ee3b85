"""Imported before anything that may import Triton: on a machine without a GPU its kernels, vLLM's and ours, are
interpreted, and Triton decides that once, on import."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

import torch

if torch.version.cuda is None:
    os.environ["TRITON_INTERPRET"] = "1"
capability = os.environ.get("ATEN_CPU_CAPABILITY")
if capability is not None:
    # Inductor's cache does not tell code for one instruction set from code for another, which does not compile there.
    cache = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
