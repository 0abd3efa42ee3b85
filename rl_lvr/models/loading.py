"""Load a checkpoint and its processor from disk: safetensors only, no network, errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rl_lvr.errors import UserError
from rl_lvr.finite import require_finite
from rl_lvr.models.base import Family
from rl_lvr.models.registry import family_class

INDEX = "model.safetensors.index.json"


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
    _, processor = load_processor(path, trust_remote_code=trust_remote_code)
    model = load_weights(path, dtype=dtype, trust_remote_code=trust_remote_code, **more)
    return model if device is None else model.to(device), processor


def load_processor(path: str | Path, *, trust_remote_code: bool = False) -> tuple[Family, Any]:
    """(family, processor) of a checkpoint, without its weights. A text-only model's processor is its tokenizer."""
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    folder = checkpoint_folder(path)
    family = family_class(_model_type(folder))
    _check_weights(folder)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    if family.text_only and not has_tokenizer:
        raise UserError(
            f"{folder} holds no tokenizer (tokenizer_config.json): save the base model's into it with save_pretrained."
        )
    if not family.text_only and not (
        has_tokenizer
        and any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))
    ):
        raise UserError(
            f"{folder} holds no processor (tokenizer_config.json and processor_config.json): "
            "save the base model's processor into it with save_pretrained."
        )
    reader: Any = AutoTokenizer if family.text_only else AutoProcessor
    processor = reader.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    return family(config), processor


def load_weights(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    model_class: Any = None,
    **more: Any,
) -> Any:
    """The model of a checkpoint, in evaluation mode. `more` goes to `from_pretrained`.

    `model_class` is that of the model's family unless it is given: then the model may be of any family.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    folder = checkpoint_folder(path)
    _check_weights(folder)
    if model_class is None:
        family = family_class(_model_type(folder))
        model_class = AutoModelForCausalLM if family.text_only else AutoModelForImageTextToText
    model, loaded = model_class.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        output_loading_info=True,
        **more,
    )
    if loaded["missing_keys"]:  # transformers fills them with random numbers and a warning
        missing = sorted(loaded["missing_keys"])
        raise UserError(
            f"the weights in {folder} lack {len(missing)} of the model's parameters, such as {missing[0]}: "
            "the checkpoint is incomplete or belongs to another model class."
        )
    require_finite(model, f"the model in {folder}, loaded in {str(model.dtype).removeprefix('torch.')},")
    return model.eval()


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
    return folder


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid JSON ({error}): fetch or save the model again.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object: fetch or save the model again.")
    return values


def _model_type(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds an adapter, not a model: use the merged one (rl-lvr sft writes it to {folder / 'merged'})."
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no model folder: it holds no config.json.")
    model_type = _json(folder / "config.json").get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{folder / 'config.json'} names no model_type: it is no transformers model.")
    return model_type


def _check_weights(folder: Path) -> None:
    """Every shard is there and whole, as far as its header tells; this reads no weights."""
    from safetensors import SafetensorError, safe_open

    if (folder / INDEX).is_file():
        names = sorted(set(_json(folder / INDEX).get("weight_map", {}).values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise UserError(
            f"{folder} holds no {', '.join(missing) or 'weights'}: they are missing, or in a format that "
            "can run code when it is read; fetch them again, or save the model with save_pretrained."
        )
    for name in names:
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{folder / name} is damaged or cut short ({error}): fetch or save it again.") from error
