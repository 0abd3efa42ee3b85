"""`rl-lvr grpo` in two real processes on the CPU, DDP, ZeRO-2 and ZeRO-3, against one process."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from lab_tools import MEMORY, grpo, grpo_command, logged, sharded, weights

pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

STEPS = 10
SIGNAL = "signal/attention_mass_layers_0"  # of the reward `attention`
REWARD = (
    MEMORY
    + '''
def letters(completions, id, **_):
    """Any number that depends on the text and on nothing else."""
    return [float(sum(map(ord, str(text))) % 7) for text in completions]


class Remembers(Memory):
    """A number that also depends on how often a question was answered before, in whichever process."""

    def __call__(self, texts, id, **_):
        self.found += id
        return [float((sum(map(ord, text)) + self.answered.get(one, 0)) % 5) for text, one in zip(texts, id)]
'''
)
REMEMBERED = "rewards/Remembers/mean"
POLICIES: dict[str, dict[str, Any]] = {
    "unrolled": {"latent_policy": "unrolled"},
    "gaussian": {"latent_policy": "gaussian", "latent_sigma": 0.1},
}
TWO = {"num_processes": 2, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def runs(opener: Path, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In one process `one`, `other` by seed, and a run per policy; in two `ddp`, `zero2`, `zero3`, and per policy."""
    work = tmp_path_factory.mktemp("processes")
    (work / "reward.py").write_text(REWARD)
    data = place / "data"
    whole = both(work)
    short = whole | {"max_steps": 3}
    assert grpo(opener, data, work / "one", **whole) == 0
    assert grpo(opener, data, work / "other", seed=7, **short) == 0
    for name, policy in POLICIES.items():
        assert grpo(opener, data, work / f"one_{name}", **short, **policy) == 0

    # With gradient checkpointing DDP does not look for parameters without a gradient: it waits for all of them.
    words = grpo_command(
        opener, data, work / "ddp", accelerate_config="ddp", gradient_checkpointing=True, **whole, **TWO
    )
    done = subprocess.run([sys.executable, "-m", "rl_lvr.cli", *words], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-5000:]
    codes, said = sharded(
        work / "sharded",
        grpo_command(opener, data, work / "zero2", accelerate_config="zero2", **whole, **TWO),
        grpo_command(opener, data, work / "zero3", accelerate_config="zero3", **whole, **TWO),
        *(
            grpo_command(opener, data, work / f"zero3_{name}", accelerate_config="zero3", **short, **policy, **TWO)
            for name, policy in POLICIES.items()
        ),
    )
    assert codes == [0] * (2 + len(POLICIES)), said
    return work


@pytest.fixture(scope="module")
def offloaded(runs: Path, opener: Path, place: Path) -> Path:
    """A run with DeepSpeed's CPU Adam, which is compiled first."""
    if shutil.which("c++") is None or not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        pytest.skip("needs a C++ compiler and Python's headers")
    settings = both(runs) | {"accelerate_config": "zero3_offload", "max_steps": STEPS} | TWO
    # A folder of its own: in the usual one an interrupted build leaves a lock, and the next one waits for ever.
    extensions = str(runs / "extensions")
    codes, said = sharded(
        runs / "offloaded",
        grpo_command(opener, place / "data", runs / "zero3_offload", **settings),
        timeout=400,
        TORCH_EXTENSIONS_DIR=extensions,
        PATH=os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"])),  # of ninja
    )
    assert codes == [0], said
    return runs


def both(work: Path) -> dict[str, Any]:
    """Settings of all runs. Without a gradient in the policy pass of `context`: the projector."""
    rewards = [f"{work / 'reward.py'}:letters", "attention", f"{work / 'reward.py'}:Remembers"]
    return {"rewards": rewards, "max_steps": STEPS, "learning_rate": 3e-4, "latent_projector": "mlp"}


def curve(out: Path, name: str = "loss") -> list[float]:
    """A figure of every step, NaN where there is none: a signal of latents where no row had any."""
    return [row.get(name, math.nan) for row in logged(out)]


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_two_processes_learn_as_one(runs: Path, name: str) -> None:
    as_one(runs, name)


def test_offloading_learns_as_one(offloaded: Path) -> None:
    as_one(offloaded, "zero3_offload")


def as_one(runs: Path, name: str) -> None:
    for figure in ("loss", "reward", REMEMBERED, SIGNAL, "latent/rate"):
        assert len(curve(runs / name, figure)) == STEPS
        assert curve(runs / name, figure) == pytest.approx(curve(runs / "one", figure), abs=1e-4, nan_ok=True), figure
    assert any(value > 0 for value in curve(runs / name, SIGNAL))
    assert max(curve(runs / name, "latent/rate")) > 0
    assert max(curve(runs / name, "latent/replay_logp_diff")) < 1e-3
    assert curve(runs / "other", "reward") != pytest.approx(curve(runs / "one", "reward")[:3], abs=1e-2)  # control


@pytest.mark.parametrize("name", POLICIES)
def test_latent_policies_under_zero3(runs: Path, name: str) -> None:
    assert curve(runs / f"zero3_{name}") == pytest.approx(curve(runs / f"one_{name}"), abs=1e-4)
    assert curve(runs / f"one_{name}") != pytest.approx(curve(runs / "one")[:3], abs=1e-4)  # the policy matters
    assert max(curve(runs / f"zero3_{name}", "latent/replay_logp_diff")) < 1e-3


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_the_saved_model_is_that_of_one_process(runs: Path, opener: Path, name: str) -> None:
    mine, theirs, start = weights(runs / name), weights(runs / "one"), weights(opener)
    assert {key: tensor.shape for key, tensor in mine.items()} == {key: t.shape for key, t in theirs.items()}
    for key in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        moved = (theirs[key] - start[key]).norm()
        assert moved > 0
        assert (mine[key] - theirs[key]).norm() < 0.05 * moved


def test_each_process_records_its_rollouts(runs: Path) -> None:
    assert len(list((runs / "ddp" / "rollouts").glob("*.jsonl"))) == 2
