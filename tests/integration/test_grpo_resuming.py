"""GRPO that is interrupted anywhere, by SIGTERM or kill -9, ends with the parameters of a run that was left alone.

Real processes of `rl-lvr grpo`, forked from one that has imported everything (grpo_interrupt_worker.py).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_tools import MEMORY, build_model, logged, same, weights, write_puzzles

from rl_lvr.latents.format import get_format
from rl_lvr.models import load_model
from rl_lvr.rollout.record import read_rollouts
from rl_lvr.training.runs.checkpoints import PARTIAL, defect

pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
pytestmark = pytest.mark.timeout(900)  # a test is a dozen runs, and they share the machine with other tests

WORKER = Path(__file__).with_name("grpo_interrupt_worker.py")
REWARD = (
    MEMORY
    + """
import os

calls = 0

def letters(completions, **_):
    return [float(sum(map(ord, str(c))) % 7) for c in completions]

class Remembers(Memory):
    # As `letters`, and how often the question was answered before.
    def __call__(self, completions, id, **_):
        self.found += id
        return [(v + self.answered.get(one, 0) * (v + 1)) % 7 for v, one in zip(letters(completions), id)]

def needed(completions, necessity_completions, **_):
    return [value + (text is not None) for value, text in zip(letters(completions), necessity_completions)]

def one_fails(completions, **_):
    global calls
    calls += 1
    if calls == 2 and os.environ["RANK"] == "1":
        raise ValueError("here alone")
    return letters(completions)
"""
)
STEPS = 14
SETTINGS: dict[str, Any] = {
    # 4 prompts, 2 in a generation batch, which serves 4 steps: an epoch is 8 steps, and 3 is no border of anything
    "train_limit": 4,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 3,
    "latent_policy": "gaussian",
    "latent_sigma": 0.1,
    "beta": 0.1,
    "sync_ref_model": True,
    "ref_model_sync_steps": 4,
    "ref_model_mixup_alpha": 0.5,
    "max_completion_length": 9,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "latent_format": "lvr",
    "latent_k": 2,
    "logging_steps": 1,
    "report_to": "none",
    "threads": 1,
    "use_cpu": True,
}
SHARDED: dict[str, Any] = {"per_device_train_batch_size": 2, "sync_ref_model": False}
Run = Callable[..., list[int]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    model, processor = load_model(build_model(folder / "plain"), dtype=torch.float32)
    start = processor.tokenizer.convert_tokens_to_ids(get_format("lvr").start)
    with torch.no_grad():
        model.get_output_embeddings().weight[start] *= 3  # untrained weights open spans then
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    write_puzzles(folder / "data", train=8, test=4)
    (folder / "reward.py").write_text(REWARD)
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    for stage in (2, 3):
        zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
        config = {**auto, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
        (folder / f"zero{stage}.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def grpo(work: Path) -> Iterator[Run]:
    """`grpo(out, moment, **settings)`: exit codes of `rl-lvr grpo`; what it said is in `out`.log."""
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    worker = subprocess.Popen(
        [sys.executable, str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        cwd=WORKER.parent,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None

    def run(out: Path, moment: dict[str, Any] | None = None, *, ranks: int = 1, **changes: Any) -> list[int]:
        given = SETTINGS | {
            "model_name_or_path": work / "model",
            "train_file": work / "data" / "train.parquet",
            "rewards": f"{work / 'reward.py'}:Remembers",
            "output_dir": out,
        }
        words = ["grpo"]
        for key, value in (given | changes).items():
            words += [f"--{key}", str(value)]
        leg = {"words": words, "log": f"{out}.log", "ranks": ranks, "port": free_port(), **(moment or {})}
        worker.stdin.write(json.dumps(leg) + "\n")
        worker.stdin.flush()
        codes: list[int] = json.loads(worker.stdout.readline())
        return codes

    yield run
    worker.kill()
    worker.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def said(out: Path, rank: int = 0) -> str:
    return Path(f"{out}.log.{rank}").read_text()


@pytest.fixture(scope="module")
def whole(grpo: Run, work: Path) -> Path:
    """A run that was left alone."""
    out = work / "whole"
    assert grpo(out) == [0], said(out)
    assert [row["step"] for row in logged(out)] == list(range(1, STEPS + 1))
    rates = [row["latent/rate"] for row in logged(out) if "latent/rate" in row]
    assert max(rates) > 0
    assert not same(out, work / "model")
    return out


def moments(number: int) -> list[dict[str, Any]]:
    """Five places, each at a random call."""
    draw = random.Random(int(number))
    calls = {"forward": (3, 60), "reward": (1, 2), "backward": (1, 3), "optimizer": (1, 3), "checkpoint": (1, 4)}
    found = [{"place": place, "nth": draw.randint(*bounds), "signal": int(number)} for place, bounds in calls.items()]
    if number == signal.SIGKILL:
        found[2] = {"place": "sealed", "nth": 1, "signal": int(number)}
    draw.shuffle(found)
    return found


def interrupted(grpo: Run, out: Path, number: int, **changes: Any) -> None:
    """Start, strike, resume, strike, ..., and let the last one end."""
    for moment in moments(number):
        codes = grpo(out, moment, resume_from_checkpoint="auto", **changes)
        expected = 128 + number if number == signal.SIGTERM else -number
        assert codes == [expected], (moment, said(out))
        for folder in out.glob("checkpoint-*"):
            assert defect(folder) is None
        if number == signal.SIGTERM:
            assert "Traceback" not in said(out)
    assert grpo(out, resume_from_checkpoint="auto", **changes) == [0], said(out)
    assert not (out / PARTIAL).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_struck_at_five_moments_ends_as_one_left_alone(
    grpo: Run, whole: Path, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "run"
    interrupted(grpo, out, number)
    assert same(out, whole)
    for name in ("loss", "reward", "grad_norm", "num_tokens"):
        mine, theirs = ([row.get(name) for row in logged(folder)] for folder in (out, whole))
        assert mine == theirs, name
    mine, theirs = (
        [(row.step, row.index, row.completion_ids, row.rewards) for row in read_rollouts(folder)]
        for folder in (out, whole)
    )
    assert mine == theirs


def resumed_from(whole: Path, out: Path, step: int) -> None:
    out.mkdir()
    shutil.copytree(whole / f"checkpoint-{step}", out / f"checkpoint-{step}")
    shutil.copy(whole / "run.json", out)


@pytest.mark.parametrize("lost", [None, "random", "order", "buffer", "reference", "rewards"])
def test_every_piece_of_the_state_is_needed(grpo: Run, whole: Path, tmp_path: Path, lost: str | None) -> None:
    """Control: the same resumption without one piece of what the checkpoint holds. Step 9 is in the second epoch."""
    out = tmp_path / "run"
    resumed_from(whole, out, 9)
    assert grpo(out, {"lost": lost}, resume_from_checkpoint="latest") == [0], said(out)
    assert same(out, whole) == (lost is None)


SHORT: dict[str, Any] = {"max_steps": 5, "save_steps": 3, "train_limit": 8}
"""A checkpoint inside the first generation batch, which serves four steps, and a step of the next one."""


def test_an_adapter_goes_on_bit_for_bit(grpo: Run, work: Path, tmp_path: Path) -> None:
    """With dropout, which draws from the random states; control: without them."""
    adapter = {"use_peft": True, "lora_target_modules": "all-linear", "lora_dropout": 0.2, "sync_ref_model": False}
    settings = SHORT | adapter | {"latent_policy": "context", "latent_sigma": 0}
    alone = tmp_path / "alone"
    assert grpo(alone, **settings) == [0], said(alone)
    assert "merged" in {path.name for path in alone.iterdir()}
    for lost in (None, "random"):
        out = tmp_path / str(lost)
        resumed_from(alone, out, 3)
        assert grpo(out, {"lost": lost}, resume_from_checkpoint="latest", **settings) == [0], said(out)
        assert same(out, alone) == same(out / "merged", alone / "merged") == (lost is None)


class Bomb:
    """A pickle that does something when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_an_altered_checkpoint_is_refused_unread_and_passed_over(grpo: Run, whole: Path, tmp_path: Path) -> None:
    out, mark = tmp_path / "run", tmp_path / "was read"
    resumed_from(whole, out, 9)
    shutil.copytree(whole / "checkpoint-12", out / "checkpoint-12")
    rotten = out / "checkpoint-12" / "optimizer.pt"
    size = rotten.stat().st_size
    torch.save(Bomb(mark), rotten)
    os.truncate(rotten, size)
    assert grpo(out, resume_from_checkpoint=out / "checkpoint-12") == [2]
    assert f"checkpoint-12 has an altered file optimizer.pt: resume from {out}/checkpoint-9." in said(out)
    assert grpo(out, resume_from_checkpoint="latest") == [0], said(out)
    assert "passed over checkpoint-12 has an altered file optimizer.pt" in said(out)
    assert same(out, whole)
    assert not mark.exists()
    torch.save(Bomb(mark), rotten)
    torch.load(rotten, weights_only=False)
    assert mark.exists()  # control


@pytest.fixture(scope="module")
def sharded(grpo: Run, work: Path) -> Path:
    out = work / "sharded"
    assert grpo(out, ranks=2, deepspeed=work / "zero2.json", **SHARDED) == [0, 0], said(out)
    return out


@pytest.mark.long
def test_sharded_runs_struck_at_five_moments_end_as_one_left_alone(
    grpo: Run, sharded: Path, work: Path, tmp_path: Path
) -> None:
    """Signals come to one rank of two; SIGTERM and kill -9 in turn."""
    out = tmp_path / "run"
    draw = random.Random(0)
    settings = SHARDED | {"deepspeed": work / "zero2.json", "resume_from_checkpoint": "auto"}
    places = [("forward", 60), ("optimizer", 2), ("reward", 1), ("checkpoint", 4), ("backward", 2)]
    for index, (place, most) in enumerate(places):
        number = signal.SIGTERM if index % 2 == 0 else signal.SIGKILL
        struck = draw.randrange(2)
        moment = {"place": place, "nth": draw.randint(1, most), "signal": int(number), "struck": struck}
        codes = grpo(out, moment, ranks=2, **settings)
        if number == signal.SIGTERM:
            assert codes == [143, 143], (moment, said(out), said(out, 1))
        else:
            assert codes[struck] == -signal.SIGKILL, (moment, codes)
    assert grpo(out, ranks=2, **settings) == [0, 0], said(out)
    mine, theirs, start = weights(out), weights(sharded), weights(work / "model")
    assert mine.keys() == theirs.keys()
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) <= 1e-6
    assert max(float((start[name] - theirs[name]).abs().max()) for name in mine) > 1e-3


def test_an_error_in_one_process_stops_all_with_a_checkpoint(grpo: Run, work: Path, tmp_path: Path) -> None:
    """The second generation batch is made after 4 steps."""
    out = tmp_path / "run"
    failing = SHARDED | {"rewards": f"{work / 'reward.py'}:one_fails", "save_strategy": "no"}
    assert grpo(out, ranks=2, **failing) == [1, 1], said(out)
    for rank in range(2):
        assert "process 1: reward 'one_fails' raised ValueError (here alone)" in said(out, rank)
    assert [folder.name for folder in out.glob("checkpoint-*")] == ["checkpoint-4"]
    assert defect(out / "checkpoint-4") is None


def test_under_zero3_a_run_goes_on_inside_a_generation_batch(grpo: Run, work: Path, tmp_path: Path) -> None:
    """Process 1 never opens a span: what necessity asks for again, it makes for nothing."""
    alone, out = tmp_path / "alone", tmp_path / "run"
    # An engine that never opens a span draws from another distribution than the model's.
    other = {"rewards": f"{work / 'reward.py'}:needed", "replay_tolerance": 1e9}
    settings = SHARDED | SHORT | other | {"deepspeed": work / "zero3.json"}
    assert grpo(alone, {"lost": "spans"}, ranks=2, **settings) == [0, 0], said(alone)
    resumed_from(alone, out, 3)
    assert len(list((out / "checkpoint-3").glob("generation-*.safetensors"))) == 2
    again = {"resume_from_checkpoint": "latest"}
    assert grpo(out, {"lost": "spans"}, ranks=2, **settings, **again) == [0, 0], said(out)
    mine, theirs, start = weights(out), weights(alone), weights(alone / "checkpoint-3")
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in theirs) <= 1e-6
    assert max(float((start[name] - theirs[name]).abs().max()) for name in theirs) > 1e-4
    found = read_rollouts(alone)
    assert all((row.columns["necessity_completions"] is None) == (not row.spans) for row in found)
    assert {row.rank for row in found if row.spans} == {0}


def test_an_engine_that_disagrees_in_one_process_stops_all(grpo: Run, work: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = SHARDED | {"deepspeed": work / "zero2.json", "max_steps": 1}
    assert grpo(out, {"lost": "latents"}, ranks=2, **settings) == [1, 1], said(out)
    for rank in range(2):
        assert "process 1: the engine does not agree with the model: latents differ by" in said(out, rank)
