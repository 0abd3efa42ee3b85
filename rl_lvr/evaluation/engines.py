"""An engine on a checkpoint, for commands that only ask: `hf`, `vllm` or `server`, with its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from rl_lvr.errors import UserError
from rl_lvr.latents.feedback import attach_feedback
from rl_lvr.latents.format import LatentFormat
from rl_lvr.models import load_weights
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.options import SERVER_OPTIONS, VLLM_OPTIONS, require_known_engine, require_known_options
from rl_lvr.rollout.types import RolloutEngine


def load_for(folder: Path, latent_format: LatentFormat) -> Any:
    """The model of a checkpoint with its feedback module, on a GPU if there is one."""
    model = load_weights(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    attach_feedback(model, latent_format, folder)
    return model


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an engine, refused before anything is loaded."""
    require_known_engine(name)
    given = dict(options)
    if name == "hf":
        if given:
            raise UserError(f"engine hf takes no engine options ({next(iter(given))}): --batch sets its rows.")
        return given
    require_known_options(name, given, VLLM_OPTIONS if name == "vllm" else (*SERVER_OPTIONS, "api_key"))
    if name == "server" and not given.get("url"):
        raise UserError("engine server needs the address that rl-lvr serve has said: --url http://host:8000.")
    return given


def open_engine(
    name: str,
    options: Mapping[str, Any],
    *,
    folder: Path,
    processor: Any,
    latent_format: LatentFormat,
    model: Any,
    batch_size: int,
    max_model_len: Callable[[], int],
) -> RolloutEngine:
    """Start or reach an engine.

    Args:
        name: hf, vllm or server.
        options: As `check_options` returns them.
        folder: The checkpoint, which vLLM loads.
        processor: Of the checkpoint.
        latent_format: Of the checkpoint.
        model: Of `load_for`; hf generates with it, the others do not use it.
        batch_size: Rows that are decoded together.
        max_model_len: Tokens of the longest prompt with its completion. Asked for by vllm alone, unless the options say
            it.
    """
    given = dict(options)
    if name == "hf":
        return HFRolloutEngine(model, processor, latent_format, batch_size=batch_size)
    if name == "server":
        from rl_lvr.rollout.server.engine import ServerRolloutEngine

        return ServerRolloutEngine(given.pop("url"), processor, latent_format, **given)
    from rl_lvr.rollout.vllm.engine import VLLMRolloutEngine

    given.setdefault("max_num_seqs", batch_size)
    given.setdefault("dtype", _dtype(folder))
    if given.get("max_model_len") is None:
        given["max_model_len"] = max_model_len()
    return VLLMRolloutEngine(folder, processor, latent_format, **given)


def _dtype(folder: Path) -> str:
    """The precision of a checkpoint, in which hf computes too. vLLM's own choice rounds float32 to 16 bits."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return "auto" if config.dtype is None else str(config.dtype).removeprefix("torch.")
