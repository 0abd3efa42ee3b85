"""A small lab for tests: a tiny model with random weights, puzzles on disk, and the command line in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from rl_lvr import cli
from rl_lvr.data.encoding import Collator, Encoder
from rl_lvr.data.puzzles import PuzzleConfig, generate
from rl_lvr.data.record import Record
from rl_lvr.data.writing import write_parquet
from rl_lvr.lab.tiny import TinySpec, build_tiny
from rl_lvr.latents.format import get_format
from rl_lvr.models import family_of, load_model

PUZZLES = PuzzleConfig(rows=2, cols=3, hops=3, cell_px=28)


MEMORY = '''
class Memory:
    """How often each question was answered, in whichever process: state of a reward that all processes share."""

    def __init__(self):
        self.answered, self.found = {}, []

    def state_dict(self):
        return self.answered

    def load_state_dict(self, state):
        self.answered = dict(state)

    def pending(self):
        found, self.found = self.found, []
        return found

    def merge(self, parts):
        for one in (one for part in parts for one in part):
            self.answered[one] = self.answered.get(one, 0) + 1
'''
"""Source of the base class of a reward with state, for files of rewards."""


def puzzles(count: int) -> list[Record]:
    """The first training puzzles."""
    return generate(PUZZLES, count, "train")


def write_puzzles(folder: Path, train: int = 48, test: int = 12, **changes: Any) -> Path:
    """train.parquet and test.parquet in `folder`."""
    config = PuzzleConfig(**{**vars(PUZZLES), **changes})
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        write_parquet(generate(config, count, split), folder / f"{split}.parquet")
    return folder


def build_model(folder: Path, family: str = "qwen2_5_vl", **changes: Any) -> Path:
    """A model whose tokenizer knows the puzzles' words and the markers of two formats."""
    spec = {"words": PUZZLES.words, "latent_formats": ("lvr", "lantern"), "init_std": 0.1, **changes}
    return build_tiny(TinySpec(family, **spec), folder)


def sft_command(model: Path, data: Path, out: Path, **settings: Any) -> list[str]:
    """The words of `rl-lvr sft` with small settings; None takes a setting out."""
    return _command("sft", model, data, out, {"per_device_train_batch_size": 4, **settings})


def grpo_command(model: Path, data: Path, out: Path, **settings: Any) -> list[str]:
    """The words of `rl-lvr grpo` with small settings; None takes a setting out."""
    defaults = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 14,
        "use_cpu": True,
    }
    return _command("grpo", model, data, out, {**defaults, **settings})


def _command(verb: str, model: Path, data: Path, out: Path, settings: dict[str, Any]) -> list[str]:
    defaults: dict[str, Any] = {
        "model_name_or_path": model,
        "train_file": data / "train.parquet",
        "output_dir": out,
        "latent_format": "lvr",
        "latent_k": 3,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "threads": 1,
    }
    words = [verb]
    for key, value in {**defaults, **settings}.items():
        if value is not None:
            words += [f"--{key}", *([str(v) for v in value] if isinstance(value, list) else [str(value)])]
    return words


def sft(model: Path, data: Path, out: Path, **settings: Any) -> int:
    """`rl-lvr sft` in this process; returns its exit code."""
    return cli.main(sft_command(model, data, out, **settings))


def grpo(model: Path, data: Path, out: Path, **settings: Any) -> int:
    """`rl-lvr grpo` in this process; returns its exit code."""
    return cli.main(grpo_command(model, data, out, **settings))


def sharded(
    work: Path, *commands: list[str], ranks: int = 2, timeout: float = 200, **environment: str
) -> tuple[list[int], str]:
    """Run `rl-lvr` commands in turn under DeepSpeed; their exit codes, the same on all ranks, and what they said."""
    work.mkdir()
    (work / "commands.json").write_text(json.dumps(commands))
    worker = Path(__file__).with_name("deepspeed_worker.py")
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    said = torchrun(ranks, str(worker), str(work / "commands.json"), timeout=timeout, **environment)
    codes = [json.loads((work / f"commands.rank{rank}").read_text()) for rank in range(ranks)]
    assert all(found == codes[0] for found in codes)
    return codes[0], said


def torchrun(processes: int, *words: str, timeout: float = 200, **environment: str) -> str:
    """Run a script or `-m module` with its arguments in several processes, which must succeed; returns stderr."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launcher, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr


def logged(out: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics that hold a loss."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Bench:
    """A model, an encoder and a collated batch of puzzles, without a trainer."""

    def __init__(self, model_folder: Path, count: int = 4, *, k: int = 3, crops: bool = False, **format_changes: Any):
        self.model, self.processor = load_model(model_folder, dtype=torch.float32)
        self.family = family_of(self.model)
        self.tokenizer = self.processor.tokenizer
        self.markers = get_format("lvr", k=k, **format_changes).bind(
            self.tokenizer, self.family.placeholder_ids(self.tokenizer)
        )
        self.records = generate(PUZZLES, count, "train")
        self.encoder = Encoder(self.processor, self.family, self.markers, crops=crops)
        self.encoded = self.encoder.encode(self.records)

    def batch(self) -> dict[str, Any]:
        collate = Collator([self.encoded], self.family, self.tokenizer.pad_token_id)
        return collate([{"index": i} for i in range(len(self.encoded))])
