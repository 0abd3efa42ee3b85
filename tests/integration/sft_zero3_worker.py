"""One rank of test_sft_zero3.py: `rl-lvr` commands in turn, in a process whose DeepSpeed runs on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
from accelerate.state import AcceleratorState

from rl_lvr import cli


def main(commands: Path) -> None:
    # Plain gloo: DeepSpeed would compile a shared-memory reduction first, two minutes and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Before the model is loaded: the shards need a backend that the CPU has.
    deepspeed.init_distributed(dist_backend="gloo")
    codes = []
    for words in json.loads(commands.read_text()):
        AcceleratorState._reset_state()  # it would keep the DeepSpeed config of the command before
        codes.append(cli.main(words))
    commands.with_suffix(f".rank{torch.distributed.get_rank()}").write_text(json.dumps(codes))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
