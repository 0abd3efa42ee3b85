"""What a machine without an NVIDIA GPU needs so that the real vLLM runs on it: for tests and the demo only.

Two shims live here: `torchvision_operators` (started by a .pth file) and `triton_backend` (found by Triton
through its entry point). Neither is ever active on a GPU machine. Imported at every start of the interpreter:
keep it light.
"""

from __future__ import annotations

import glob


def nvidia_devices(device_folder: str = "/dev") -> list[str]:
    """Device files of NVIDIA GPUs: /dev/nvidia0, /dev/nvidia1 and so on."""
    return sorted(glob.glob(f"{device_folder}/nvidia[0-9]*"))


def refuse_gpu(device_folder: str = "/dev") -> None:
    """Raise where a GPU is present: these shims would hide it from Triton and vLLM."""
    devices = nvidia_devices(device_folder)
    if devices:
        raise ImportError(
            f"rl-lvr-cpu-runtime is for machines without an NVIDIA GPU, but this one has {devices[0]}: "
            "remove .venv and run `make setup` again, which installs the CUDA runtime."
        )
