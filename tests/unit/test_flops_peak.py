"""What a GPU could do, by its name, and the utilisation that follows from it."""

from __future__ import annotations

import pytest
import torch

from rl_lvr.errors import UserError
from rl_lvr.training.grpo.flops import peak_flops, peak_of
from rl_lvr.training.grpo.timing import Phases


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 5090", 209),
    ],
)
def test_a_known_part(name: str, tflops: float) -> None:
    assert peak_of(name) == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA RTX 4000 Ada Generation",
        "NVIDIA H20",
        "NVIDIA H800",
        "NVIDIA A1000",
        "Tesla T4",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_another_part_is_not_taken_for_one(name: str) -> None:
    assert peak_of(name) is None


def test_a_gpu_is_asked_for_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {0: "NVIDIA H100 NVL", 1: "NVIDIA L4", 2: "Tesla T4"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    cuda = [torch.device("cuda", index) for index in names]
    assert [peak_flops(device, torch.bfloat16) for device in cuda] == [835e12, 121e12, None]
    assert peak_flops(cuda[1], torch.float16) == 121e12
    assert peak_flops(cuda[1], torch.float32) is None
    assert peak_flops(cuda[2], torch.bfloat16, 65.0) == peak_flops(torch.device("cpu"), torch.float32, 65.0) == 65e12
    assert peak_flops(cuda[1], torch.bfloat16, 100.0) == 100e12
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="peak_tflops is"):
            peak_flops(cuda[0], torch.bfloat16, wrong)


def test_utilisation_is_work_over_time_over_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr("rl_lvr.training.grpo.timing.time.perf_counter", lambda: next(clock))
    phases = Phases(torch.device("cpu"))
    for name, flops in (("score", 3e12), ("loss", 2e12)):
        phases.work(name, flops)
        with phases(name):
            pass
    peak = peak_of("NVIDIA GeForce RTX 4090")
    figures = phases.flush(peak)
    assert figures["phase/score_mfu"] == pytest.approx(3 / 2 / 165)
    assert figures["phase/loss_mfu"] == pytest.approx(2 / 4 / 165)
    assert not any(name.endswith("mfu") for name in phases.flush(peak_of("NVIDIA H800")))
