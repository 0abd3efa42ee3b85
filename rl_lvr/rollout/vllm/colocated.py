"""A vLLM inside a trainer's process: it starts without a process of its own, and ends without the trainer's groups.

With several trainer processes each has an engine of its own, on its own GPU. vLLM then makes its groups, of one rank
each, inside the trainer's default group: all ranks must start their engines at the same time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rl_lvr.errors import UserError


@contextmanager
def beside_a_trainer(arguments: dict[str, Any]) -> Iterator[None]:
    """vLLM's settings while `LLM(**arguments)` starts; `arguments` is completed."""
    from vllm import envs

    if arguments.get("tensor_parallel_size", 1) != 1:
        raise UserError(
            f"tensor_parallel_size is {arguments['tensor_parallel_size']}: a vLLM in a trainer's process runs on that "
            "process's own GPU. Leave it out, or use the engine server for a model that needs more."
        )
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        # The executor that takes its GPU from the launcher's local rank; the default one would always take the first.
        arguments["distributed_executor_backend"] = "external_launcher"
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    had = name in vars(envs)
    before = getattr(envs, name)
    setattr(envs, name, False)
    try:
        yield
    finally:
        if had:
            setattr(envs, name, before)
        else:
            delattr(envs, name)


def leave(client: Any) -> None:
    """End vLLM's core in this process. Its own shutdown would destroy the default group, which is the trainer's."""
    from vllm.distributed import parallel_state

    client._finalizer.detach()
    core = client.engine_core
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
