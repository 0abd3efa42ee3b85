"""Load a checkpoint and its processor from disk: safetensors only, no network, errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rl_lvr.errors import UserError
from rl_lvr.models.registry import family_of


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    **more: Any,
) -> tuple[Any, Any]:
    """(model, processor) of a folder, or of a hub name that is in the local cache.

    `more` goes to `from_pretrained`. `device` None leaves the model where transformers puts it, which is what
    DeepSpeed ZeRO-3 needs. The model is in evaluation mode.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    folder = checkpoint_folder(path)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    family_of(config)  # refuse an unknown family before gigabytes are read
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} holds no *.safetensors: the weights are missing, or in a format that can run code; "
            "save the model with save_pretrained."
        )
    if not (folder / "tokenizer_config.json").is_file() or not any(
        (folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")
    ):
        raise UserError(
            f"{folder} holds no processor (tokenizer_config.json and processor_config.json): "
            "save the base model's processor into it with save_pretrained."
        )
    processor = AutoProcessor.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True
    )
    model = AutoModelForImageTextToText.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        **more,
    )
    if device is not None:
        model = model.to(device)  # type: ignore[arg-type]
    return model.eval(), processor


def checkpoint_folder(path: str | Path) -> Path:
    """The folder of a checkpoint on disk. A hub name is looked up in the local cache only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    folder = Path(path)
    if not folder.exists() and len(folder.parts) == 2 and not folder.is_absolute():
        try:
            folder = Path(snapshot_download(str(path), local_files_only=True))
        except LocalEntryNotFoundError:
            raise UserError(
                f"there is no model folder {str(path)!r}, and no model of that name in the local cache: "
                f"check the path, or fetch it first with `hf download {path}`."
            ) from None
        except HFValidationError:
            raise UserError(f"there is no model folder {str(path)!r}: check the path.") from None
    if not folder.is_dir():
        raise UserError(f"there is no model folder {str(path)!r}: check the path.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no model folder: it holds no config.json.")
    return folder
