"""Prefix-cache keys: KV blocks that were computed from latents are shared only where the latents are the same.

vLLM keys a block by its token ids, and every latent has the same id. Keys are chained, so all blocks behind a private
one are private too, while the prompt before it stays shared by a whole group of completions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from rl_lvr.rollout.vllm import guards, wire

_latent_ids: set[int] = set()
"""Ids of tokens that may hold a latent, of all engines that this process schedules for. One too many costs sharing."""

Keys = Callable[[Any, int, int], list[tuple[str, Any]]]


def install() -> None:
    """Add the latent keys to vLLM's block keys; a second call changes nothing."""
    from vllm.v1.core import kv_cache_utils

    planning: Any = guards.home_of(guards.PLANNING, "get_kv_cache_groups")
    keys, groups = kv_cache_utils._gen_prompt_embeds_extra_hash_keys, planning.get_kv_cache_groups
    if hasattr(keys, "__wrapped__"):
        return

    def with_latents(request: Any, start: int, end: int) -> list[tuple[str, Any]]:
        return [*keys(request, start, end), *latent_keys(request, start, end)]

    def with_settings(vllm_config: Any, *args: Any, **more: Any) -> Any:
        """Called once where the cache is set up, which is the only place that knows requests and configuration."""
        watch(vllm_config)
        return groups(vllm_config, *args, **more)

    with_latents.__wrapped__ = keys  # type: ignore[attr-defined]
    kv_cache_utils._gen_prompt_embeds_extra_hash_keys = with_latents
    planning.get_kv_cache_groups = with_settings


def watch(vllm_config: Any) -> None:
    """Learn which ids of this engine's model hold latents."""
    from rl_lvr.rollout.vllm.settings import settings_of

    settings = settings_of(vllm_config)
    if settings is not None:
        markers = settings.markers
        _latent_ids.add(markers.slot)
        if markers.start is not None and markers.format.first == "before_start":
            _latent_ids.add(markers.start)


def latent_keys(request: Any, start: int, end: int) -> list[tuple[str, str]]:
    """Keys of the block of tokens start .. end - 1, for whatever request: one that says nothing of latents may have
    them in its prompt or generate them."""
    tokens = request.all_token_ids[start:end]
    if _latent_ids.isdisjoint(tokens):
        return []
    prompt = max(request.num_prompt_tokens - start, 0)
    keys = []
    if not _latent_ids.isdisjoint(tokens[prompt:]):
        keys.append(("latent", request.request_id))
    params = request.sampling_params
    extra = (params.extra_args or {}) if params is not None else {}
    if wire.PROMPT_VECTORS in extra and not _latent_ids.isdisjoint(tokens[:prompt]):
        vectors, positions = extra[wire.PROMPT_VECTORS], extra.get(wire.PROMPT_POSITIONS)
        if isinstance(vectors, str) and isinstance(positions, list):
            keys.append(("latents", _digest(vectors, str(positions))))
        else:  # the workers will refuse this request; an error here would end the engine
            keys.append(("latents", request.request_id))
    return keys


@lru_cache(maxsize=16)
def _digest(vectors: str, positions: str) -> str:
    return hashlib.sha256(f"{positions} {vectors}".encode()).hexdigest()
