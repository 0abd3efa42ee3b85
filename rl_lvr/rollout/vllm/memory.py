"""How much memory vLLM may take on a CPU, where its own default is 92 % of the machine, whatever else runs there.

On a GPU nothing here is used: vLLM measures what is free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors import safe_open

from rl_lvr.errors import UserError

GIB = 1 << 30
OVERHEAD = 1.25
"""What loading takes over the weights themselves: a layer's packed copy, activations, latent tables."""
SHARE = 0.5
"""Of the memory that is free once the weights are there; the rest is left to a trainer and to other programs."""


@dataclass(frozen=True)
class Demand:
    """Bytes of one worker."""

    weights: int
    least: int
    """Key-value cache of one request of full length."""
    most: int
    """Key-value cache of as many of them as run at a time."""
    longest: int
    """Tokens of a request of full length."""


def cache_size(config: Any) -> int | None:
    """Bytes of key-value cache per worker for vLLM's `config`; None where vLLM or its user decides.

    Raises:
        UserError: Not even one request of full length fits.
    """
    if config.device_config.device_type != "cpu" or config.cache_config.kv_cache_memory_bytes is not None:
        return None
    return fit(demand(config), free_per_worker(config.parallel_config.world_size))


def fit(demand: Demand, free: int) -> int:
    """Bytes of cache in `free` bytes of memory."""
    left = free - int(OVERHEAD * demand.weights)
    if demand.least > left:
        raise UserError(
            f"vLLM needs about {_size(int(OVERHEAD * demand.weights))} for this model's weights and "
            f"{_size(demand.least)} of cache for one request of {demand.longest} tokens, and {_size(free)} are free. "
            "Lower max_model_len, choose a smaller dtype, or end other programs."
        )
    return min(demand.most, max(demand.least, int(SHARE * left)))


def demand(config: Any) -> Demand:
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    vector = model.get_num_kv_heads(parallel) * model.get_head_size() * model.dtype.itemsize
    block = 2 * model.get_num_layers(parallel) * vector * cache.block_size
    blocks = math.ceil(model.max_model_len / cache.block_size)
    most = cache.num_gpu_blocks_override or blocks * config.scheduler_config.max_num_seqs
    least = block * (blocks + 1)  # vLLM keeps one block
    weights = _numbers(Path(model.model)) * model.dtype.itemsize // parallel.world_size
    return Demand(weights, least, max(least, block * (most + 1)), model.max_model_len)


def _numbers(folder: Path) -> int:
    """Numbers in a checkpoint's weights, by their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def free_per_worker(workers: int) -> int:
    """Bytes that are free for each of so many workers, also by vLLM's own count, which it checks again later."""
    from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

    nodes = get_visible_memory_node()
    shared = math.ceil(workers / len(nodes))
    counted = min(int(get_memory_node_info(node).available_memory) for node in nodes)
    return min(counted // shared, free_memory() // workers)


def free_memory() -> int:
    """Bytes that this process may still take, within the limits of its control groups."""
    limits = [limit - used for limit, used in _control_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    return max(0, min([psutil.virtual_memory().available, *limits]))


def _control_groups(listing: Path, root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of every group that this process is in and that has a limit; caches do not count."""
    lines = listing.read_text().splitlines() if listing.is_file() else []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        for place in (group, *group.parents):  # a group's limit binds all groups inside it
            if place.is_relative_to(base) and (found := _limit(place, *names)) is not None:
                yield found


def _limit(group: Path, limit: str, used: str, cache: str) -> tuple[int, int] | None:
    if not (group / limit).is_file() or not (group / used).is_file():
        return None
    text = (group / limit).read_text().strip()
    if not text.isdigit():  # "max"
        return None
    stat = (group / "memory.stat").read_text().splitlines() if (group / "memory.stat").is_file() else []
    cached = next((int(line.split()[1]) for line in stat if line.startswith(f"{cache} ")), 0)
    return int(text), int((group / used).read_text()) - cached


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.0f} MiB"
