"""What client and server say to each other, as JSON: what is served, one call, its answer.

Arrays are base64 of little-endian numbers, so that every float32 arrives as it was, infinities too.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from rl_lvr.errors import UserError
from rl_lvr.latents.format import FormatIds, LatentFormat
from rl_lvr.models import ImageFrame
from rl_lvr.rollout.checks import Limits
from rl_lvr.rollout.vllm.calls import Answer, marks_of, uncut_of, uncut_to_bytes, vectors_of
from rl_lvr.rollout.vllm.settings import LatentSettings
from rl_lvr.rollout.vllm.weights import Receipt

VERSION = 3
STATUS = "/v1/latents"
ROLLOUT = "/v1/latents/rollout"
WEIGHTS = "/v1/latents/weights"

PROMPT = "prompt_token_ids"
PICTURES = "pictures"
SAMPLING = "sampling_params"


# ---- what is served


def settings_to_json(settings: LatentSettings) -> dict[str, Any]:
    data = asdict(settings)
    data["limits"]["special_ids"] = sorted(settings.limits.special_ids)
    return data


def settings_from_json(data: Mapping[str, Any]) -> LatentSettings:
    limits, markers, frame = data["limits"], data["markers"], data["frame"]
    exact = {
        "limits": Limits(**{**limits, "special_ids": frozenset(limits["special_ids"])}),
        "markers": FormatIds(
            **{
                **markers,
                "format": LatentFormat(**markers["format"]),
                "placeholders": tuple(markers["placeholders"]),
            }
        ),
        "eos": tuple(data["eos"]),
        "frame": None if frame is None else ImageFrame(frame[0], frame[1], tuple(frame[2])),
    }
    return LatentSettings(**{**data, **exact})


# ---- weights


def weights_to_json(name: str, sent: Receipt) -> dict[str, Any]:
    """`name` of a folder in the one that trainer and server share."""
    return {"name": name, **asdict(sent)}


# ---- one call


def call_to_json(prompt: Sequence[int], pictures: Sequence[Image.Image], sampling: Mapping[str, Any]) -> dict[str, Any]:
    return {PROMPT: list(prompt), PICTURES: [_picture_to_text(p) for p in pictures], SAMPLING: dict(sampling)}


def pictures_from_json(texts: Sequence[str]) -> list[Image.Image]:
    """Images in any format that is no archive of others, decoded here so that a damaged one is refused at once."""
    pictures: list[Image.Image] = []
    for number, text in enumerate(texts):
        try:
            picture = Image.open(io.BytesIO(_bytes(text, f"pictures[{number}]")), formats=("PNG", "JPEG", "WEBP"))
            picture.load()
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"pictures[{number}] is no PNG, JPEG or WebP image ({error}).") from error
        pictures.append(picture)
    return pictures


def _picture_to_text(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


# ---- its answer


def answer_to_json(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_token_ids": list(answer.prompt_ids),
        "token_ids": list(answer.token_ids),
        "logprobs": _text(answer.logprobs.numpy().astype("<f4").tobytes()),
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "dtype": str(answer.vectors.dtype).removeprefix("torch."),
        "vectors": _text(
            answer.vectors.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
        ),
        "marks": _text(answer.marks.numpy().tobytes()),
        "uncut": None if answer.uncut is None else _text(uncut_to_bytes(answer.uncut)),
    }


def answer_from_json(data: Mapping[str, Any], width: int) -> Answer:
    """`width`: of the model's hidden states."""
    logprobs = np.frombuffer(_bytes(data["logprobs"], "logprobs"), "<f4").astype(np.float32)
    uncut = data["uncut"]
    return Answer(
        prompt_ids=data["prompt_token_ids"],
        token_ids=data["token_ids"],
        logprobs=torch.from_numpy(logprobs),
        finish_reason=data["finish_reason"],
        stop_reason=data["stop_reason"],
        vectors=vectors_of(_bytes(data["vectors"], "vectors"), getattr(torch, data["dtype"]), width),
        marks=marks_of(_bytes(data["marks"], "marks")),
        uncut=None if uncut is None else uncut_of(_bytes(uncut, "uncut"), len(data["token_ids"])),
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{what} is no base64 ({error}).") from error
