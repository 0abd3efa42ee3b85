"""The engine of a recipe: `engine: hf | vllm | server` with its `engine_options`. Docs: docs/engines.md."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from rl_lvr.errors import UserError
from rl_lvr.latents.format import LatentFormat
from rl_lvr.rollout.options import SERVER_OPTIONS, VLLM_OPTIONS, require_known_engine, require_known_options
from rl_lvr.rollout.sleeping import Sleeper
from rl_lvr.rollout.types import RolloutEngine
from rl_lvr.training.grpo.config import LatentGRPOConfig
from rl_lvr.training.runs.arguments import refuse_other_vocabulary

_log = logging.getLogger(__name__)
MOST_ROWS = 256
"""`max_num_seqs` is the generation batch of a process, but not more than this unless it is asked for."""


def check_engine(name: str, options: Mapping[str, Any] | None, config: LatentGRPOConfig) -> dict[str, Any]:
    """The options of an engine with what follows from the `config` of a run; UserError for what cannot be.

    Needs no model, so that a recipe can be refused before one is loaded.
    """
    given = dict(options or {})
    require_known_engine(name)
    if name == "server":
        return _server_options(given, config)
    if name == "hf":
        if given:
            raise UserError(f"engine hf takes no engine_options ({next(iter(given))}): rollout_batch sets its rows.")
        if config.engine_sleep:
            raise UserError("engine_sleep is on, but the engine hf is the model itself: leave it out.")
        refuse_length(config, "hf")
        return given
    require_known_options(name, given, VLLM_OPTIONS)
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
    from rl_lvr.rollout.vllm.guards import check_runtime, refuse_quantized

    refuse_quantized((given.get("engine_args") or {}).get("quantization"), "leave quantization out of engine_args")
    check_runtime()
    return given


def refuse_length(config: LatentGRPOConfig, engine: str) -> None:
    """Refuse TRL's `vllm_max_model_length` with an engine that has no such limit."""
    if config.vllm_max_model_length is not None:
        raise UserError(
            f"vllm_max_model_length is {config.vllm_max_model_length}, and only the engine vllm reads it, not {engine}"
            ": leave it out."
        )


def _server_options(given: dict[str, Any], config: LatentGRPOConfig) -> dict[str, Any]:
    require_known_options("server", given, SERVER_OPTIONS)
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
    config: LatentGRPOConfig,
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
    stored = AutoConfig.from_pretrained(folder, local_files_only=True)
    refuse_other_vocabulary(model, stored, "its folder, which vLLM loads,")
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


def _warn_of_room(room: int, most: int, config: LatentGRPOConfig, cure: str) -> None:
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


def _dtype(model: nn.Module, config: LatentGRPOConfig) -> str:
    """In which the trainer computes."""
    if config.bf16 or config.fp16:
        return "bfloat16" if config.bf16 else "float16"
    return str(next(model.parameters()).dtype).removeprefix("torch.")
