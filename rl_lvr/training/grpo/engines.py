"""The engine of a recipe: `engine: hf | vllm | server` with its `engine_options`. Docs: docs/engines.md."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from rl_lvr.errors import UserError, near_miss
from rl_lvr.latents.format import LatentFormat
from rl_lvr.rollout.types import Request, Rollout, RolloutEngine, Sampling
from rl_lvr.wrapping import unwrapped

_log = logging.getLogger(__name__)
ENGINES = ("hf", "vllm", "server")
VLLM_OPTIONS = ("max_model_len", "max_num_seqs", "max_latents", "dtype", "gpu_memory_utilization", "engine_args")
SERVER_OPTIONS = ("url", "weights_folder", "concurrency", "timeout")
MOST_ROWS = 256
"""`max_num_seqs` is the generation batch of a process, but not more than this unless it is asked for."""


def check_engine(name: str, options: Mapping[str, Any] | None, config: Any) -> dict[str, Any]:
    """The options of an engine with what follows from the `config` of a run; UserError for what cannot be.

    Needs no model, so that a recipe can be refused before one is loaded.
    """
    given = dict(options or {})
    if name not in ENGINES:
        raise UserError(f"no engine {name!r}{_hint(name, ENGINES)}")
    if name == "server":
        return _server_options(given, config)
    if name == "hf":
        if given:
            raise UserError(f"engine hf takes no engine_options ({next(iter(given))}): rollout_batch sets its rows.")
        if config.engine_sleep:
            raise UserError("engine_sleep is on, but the engine hf is the model itself: leave it out.")
        refuse_length(config, "hf")
        return given
    _require_known(name, given, VLLM_OPTIONS)
    rows = config.per_device_train_batch_size * config.steps_per_generation
    given = {"max_num_seqs": min(rows, MOST_ROWS), "max_model_len": config.vllm_max_model_length} | given
    longest, answer = given["max_model_len"], config.max_completion_length
    if longest is None:
        raise UserError(
            "engine_options lacks max_model_len: the tokens of the longest prompt, those of its images included, plus "
            f"max_completion_length ({answer})."
        )
    if longest <= answer:
        raise UserError(
            f"max_model_len is {longest}: with max_completion_length {answer} no prompt has room; raise it."
        )
    if (given.get("engine_args") or {}).get("quantization"):
        raise UserError(
            f"engine_args has quantization {given['engine_args']['quantization']!r}, and a trainer's weights cannot go "
            "into a quantized model: leave it out."
        )
    from rl_lvr.rollout.vllm.guards import check_runtime

    check_runtime()
    return given


def refuse_length(config: Any, engine: str) -> None:
    """Refuse TRL's `vllm_max_model_length` with an engine that has no such limit."""
    if config.vllm_max_model_length is not None:
        raise UserError(
            f"vllm_max_model_length is {config.vllm_max_model_length}, and only the engine vllm reads it, not {engine}"
            ": leave it out."
        )


def _server_options(given: dict[str, Any], config: Any) -> dict[str, Any]:
    _require_known("server", given, SERVER_OPTIONS)
    if config.engine_sleep:
        raise UserError("engine_sleep is on, but a server does not sleep: leave it out.")
    refuse_length(config, "server")
    if not given.get("weights_folder"):
        raise UserError(
            "engine server keeps the weights that it was started with, so the trainer would learn from rollouts of an "
            "old model: set weights_folder to a folder that both see, and start rl-lvr serve with --weights-folder."
        )
    if not given.get("url"):
        raise UserError("engine_options lacks url: the address that rl-lvr serve has said, such as http://host:8000.")
    return given


def make_engine(
    name: str,
    options: Mapping[str, Any] | None,
    *,
    folder: str | Path,
    model: nn.Module,
    processor: Any,
    latent_format: LatentFormat,
    config: Any,
) -> RolloutEngine | None:
    """The engine for `LatentGRPOTrainer` with this `config`; None is the trainer's own, which is hf.

    `folder` is the checkpoint of `model`: vLLM starts on it, and takes over the model's weights at the first step.
    """
    complete = check_engine(name, options, config)
    if name == "hf":
        return None
    if name == "server":
        from rl_lvr.rollout.server.engine import ServerRolloutEngine

        most = latent_format.most_latents(config.max_completion_length)
        server = ServerRolloutEngine(complete.pop("url"), processor, latent_format, **complete)
        _warn_of_room(server.max_latents, most, config, "start the server with a larger --max-latents")
        return server
    _same_vocabulary(model, folder)
    from rl_lvr.rollout.vllm.engine import VLLMRolloutEngine
    from rl_lvr.rollout.vllm.settings import MAX_LATENTS

    most = latent_format.most_latents(config.max_completion_length)
    complete.setdefault("max_latents", max(MAX_LATENTS, most))
    _warn_of_room(complete["max_latents"], most, config, "raise max_latents in engine_options")
    on_gpu = torch.cuda.is_available() and not config.use_cpu
    sleeps = on_gpu if config.engine_sleep is None else config.engine_sleep
    complete = {"dtype": _dtype(model, config), **complete}
    if on_gpu:
        complete.setdefault("gpu_memory_utilization", 0.3)
        complete["engine_args"] = {"enable_sleep_mode": sleeps, **(complete.get("engine_args") or {})}
    engine = VLLMRolloutEngine(folder, processor, latent_format, seed=config.seed, colocated=True, **complete)
    return Sleeper(engine) if sleeps else engine


class Sleeper:
    """An engine that holds memory only while it works, and leaves the rest of the time to the trainer.

    It sleeps deeply (level 2): nothing is parked on the host, and the weights come from the trainer at every awakening.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.markers = engine.markers
        self.capabilities = engine.capabilities
        self._model: nn.Module | None = None
        self._awake = True
        self._sleep()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        if not self._awake:
            if self._model is None:
                raise RuntimeError("an engine that has slept has no weights: call sync_weights first.")
            self.sync_weights(self._model)
        try:
            rollouts: list[Rollout] = self.engine.generate(requests, sampling)
        finally:
            self._sleep()
        return rollouts

    def sync_weights(self, model: nn.Module) -> None:
        """Wake up with these weights; they are looked up again at every later awakening."""
        if not self._awake:
            try:
                self.engine.wake()
            except Exception:
                from rl_lvr.rollout.vllm.weights import take_part

                take_part(model)  # other ranks, which woke up, wait for this one
                raise
            self._awake = True
        self.engine.sync_weights(model)
        self._model = model

    def close(self) -> None:
        self.engine.close()

    def _sleep(self) -> None:
        self.engine.sleep(2)
        self._awake = False


def _warn_of_room(room: int, most: int, config: Any, cure: str) -> None:
    """A completion with more latents than the engine has room for ends the run, in whichever step it comes."""
    if room < most and config.process_index == 0:
        _log.warning(
            "max_latents is %d, and a completion of max_completion_length %d may hold %d latents; one that holds more "
            "than there is room for ends the run: %s, or lower max_completion_length.",
            room,
            config.max_completion_length,
            most,
            cure,
        )


def _same_vocabulary(model: nn.Module, folder: str | Path) -> None:
    stored = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config().vocab_size
    base: Any = unwrapped(model)
    mine = base.config.get_text_config().vocab_size
    if mine != stored:
        raise UserError(
            f"the model has {mine} token embeddings and its folder, which vLLM loads, {stored}: save the model with "
            "its marker tokens, and start from there."
        )


def _dtype(model: nn.Module, config: Any) -> str:
    """In which the trainer computes."""
    if config.bf16 or config.fp16:
        return "bfloat16" if config.bf16 else "float16"
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _require_known(engine: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"engine_options of {engine} has no {key!r}{_hint(key, known)}")


def _hint(name: str, known: tuple[str, ...]) -> str:
    return near_miss(name, known, f"; choose from {', '.join(known)}.")
