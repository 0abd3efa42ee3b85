"""Names of engines and of their options, as recipes and commands write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rl_lvr.errors import UserError, near_miss

ENGINES = ("hf", "vllm", "server")
VLLM_OPTIONS = ("max_model_len", "max_num_seqs", "max_latents", "dtype", "gpu_memory_utilization", "engine_args")
SERVER_OPTIONS = ("url", "weights_folder", "concurrency", "timeout")


def require_known_engine(name: str) -> None:
    """Refuse an engine that there is not."""
    if name not in ENGINES:
        raise UserError(f"no engine {name!r}{_hint(name, ENGINES)}")


def require_known_options(engine: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Refuse options that `engine` does not have."""
    for key in given:
        if key not in known:
            raise UserError(f"engine_options of {engine} has no {key!r}{_hint(key, known)}")


def _hint(name: str, known: Sequence[str]) -> str:
    return near_miss(name, known, f"; choose from {', '.join(known)}.")
