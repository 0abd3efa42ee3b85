"""Imported before anything that may import Triton: on a machine without a GPU its kernels, vLLM's and ours, are
interpreted, and Triton decides that once, on import."""

from __future__ import annotations

import os

import torch

if torch.version.cuda is None:
    os.environ["TRITON_INTERPRET"] = "1"
