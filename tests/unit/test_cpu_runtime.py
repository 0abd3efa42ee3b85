"""The CPU runtime's shims: they do what they are for, say what they cannot do, and keep away from GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).resolve().parents[2] / "tools" / "cpu_runtime"
needs_cpu = pytest.mark.skipif(torch.version.cuda is not None, reason="installed on machines without a GPU only")


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-c", code]
    return subprocess.run(words, capture_output=True, text=True, env={**environment, **variables}, timeout=120)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SOURCE / "src"))
    import rl_lvr_cpu_runtime

    return rl_lvr_cpu_runtime


def test_refuses_a_machine_with_a_gpu(runtime, tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    runtime.refuse_gpu(str(tmp_path))
    (tmp_path / "nvidia0").touch()
    with pytest.raises(ImportError, match=r"nvidia0.*make setup"):
        runtime.refuse_gpu(str(tmp_path))


@needs_cpu
def test_torchvision_imports_thanks_to_the_declared_operators() -> None:
    assert python("import torchvision").returncode == 0
    # Without the finder the import fails, unless this torchvision is a CPU build, whose own operators load.
    loads = "import torch, importlib.util as u, pathlib as p\n" + (
        "torch.ops.load_library(str(p.Path(u.find_spec('torchvision').origin).parent / '_C.so'))"
    )
    without = python(
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'DeclareBeforeImport' not in type(f).__name__]\n"
        "import torchvision"
    )
    assert (without.returncode == 0) == (python(loads).returncode == 0)


@needs_cpu
def test_finder_costs_no_import_of_torch() -> None:
    code = "import sys, rl_lvr_cpu_runtime.torchvision_operators as t\nprint('torch' in sys.modules)"
    assert python(code).stdout.strip() == "False"


KERNEL = """
import torch, triton, triton.language as tl

@triton.jit
def double(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)

x = torch.arange(4.0)
double[(1,)](x, 4, BLOCK=4)
print(x.tolist())
"""


@needs_cpu
def test_kernels_are_interpreted_and_otherwise_refused(tmp_path: Path) -> None:
    file = tmp_path / "kernel.py"  # Triton reads a kernel's source
    file.write_text(KERNEL)
    run = f"import runpy; runpy.run_path({str(file)!r})"
    interpreted = python(run, TRITON_INTERPRET="1")
    assert interpreted.stdout.strip() == "[0.0, 2.0, 4.0, 6.0]", interpreted.stderr
    compiled = python(run)
    assert compiled.returncode != 0
    assert "set TRITON_INTERPRET=1" in compiled.stderr
