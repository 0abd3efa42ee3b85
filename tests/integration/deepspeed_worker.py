"""One rank of a test under DeepSpeed: `rl-lvr` commands in turn, in a process whose DeepSpeed runs on the CPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from rl_lvr import cli
from rl_lvr.accelerated import group_ended, launch_words


def main(commands: Path) -> None:
    # Plain gloo: DeepSpeed would compile a shared-memory reduction first, two minutes and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Before the model is loaded: the shards need a backend that the CPU has.
    deepspeed.init_distributed(dist_backend="gloo")
    codes = []
    for verb, *words in json.loads(commands.read_text()):
        AcceleratorState._reset_state()  # it would keep the DeepSpeed config of the command before
        codes.append(cli.main(launched(verb, words)))
    commands.with_suffix(f".rank{torch.distributed.get_rank()}").write_text(json.dumps(codes))
    torch.distributed.barrier()


def launched(verb: str, words: list[str]) -> list[str]:
    """What `accelerate launch` would start, in the environment that it would give: here the processes are there."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    launch = launch_words(verb, words)
    if launch is None:
        return [verb, *words]
    arguments, config, _ = _validate_launch_command(launch_command_parser().parse_args(launch))
    arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
    _, environment = prepare_deepspeed_cmd_env(arguments)
    os.environ.update({name: value for name, value in environment.items() if name.startswith("ACCELERATE_")})
    return arguments.training_script_args


if __name__ == "__main__":
    with group_ended():
        main(Path(sys.argv[1]))
