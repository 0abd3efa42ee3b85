"""Build of the CPU runtime: setuptools knows no option for a .pth file, so the build copies it.

Refuses on a machine with an NVIDIA GPU.
"""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SOURCE = Path(__file__).resolve().parent / "src"
sys.path.insert(0, str(SOURCE))

from rl_lvr_cpu_runtime import refuse_gpu  # noqa: E402

PTH = "rl_lvr_cpu_runtime.pth"


class BuildWithPth(build_py):
    """A .pth file at the top of the wheel lands in site-packages, where Python reads it at start-up."""

    def run(self) -> None:
        super().run()
        shutil.copyfile(SOURCE / PTH, Path(self.build_lib) / PTH)


refuse_gpu()
setup(cmdclass={"build_py": BuildWithPth})
