"""Tiny vision-language models with random weights, tokenizer and processor, saved as a Hugging Face folder.

Four families, real transformers classes, no downloads: `AutoProcessor` and `AutoModelForImageTextToText`
load the folder as they would load a 7B checkpoint. The tokenizer is in `lab/tokenizer.py`; what a family
*does* differently is in `rl_lvr.models`, here is only how a small one is configured.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lvr.errors import UserError
from rl_lvr.lab.tokenizer import ROLES, VISION_SPECIALS, build_tokenizer
from rl_lvr.latents.format import get_format

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

FAMILIES = tuple(VISION_SPECIALS)
TEMPORAL = 2  # frames in one Qwen patch; an image is repeated to fill it
IMAGE_TOKENS = 256  # default upper bound of tokens per Qwen image
MEAN_STD = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@dataclass(frozen=True)
class TinySpec:
    """The shape of a tiny model. Everything is deterministic in the spec."""

    family: str
    """One of `FAMILIES`."""
    layers: int = 2
    hidden: int = 64
    heads: int = 2
    """Keep hidden / heads at 32 or more: vLLM's CPU attention has no smaller head."""
    kv_heads: int = 1
    intermediate: int = 128
    vision_depth: int = 2
    vision_hidden: int = 32
    vision_heads: int = 2
    patch: int = 14
    merge: int = 2
    """Patches per token along each side: Qwen's merger, InternVL's pixel shuffle. LLaVA-OneVision: none."""
    image_size: int | None = None
    """Side of a tile in pixels (InternVL, LLaVA-OneVision): 4 patches if not given. Qwen has no tiles."""
    min_pixels: int | None = None
    """Smallest image that Qwen's processor does not enlarge: one token if not given."""
    max_pixels: int | None = None
    """Largest image that Qwen's processor does not shrink: `IMAGE_TOKENS` tokens if not given."""
    words: tuple[str, ...] = ()
    """Each is one token, with and without a space before it. Other text is encoded in smaller pieces."""
    latent_formats: tuple[str, ...] = ("lvr",)
    """Presets of `rl_lvr.latents.format` whose marker tokens the tokenizer holds."""
    init_std: float = 0.2
    """Large, so that hidden states of untrained models differ clearly between inputs; 0.02 to train."""
    tie: bool = False
    max_positions: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UserError(f"no tiny model of family {self.family!r}: choose {', '.join(FAMILIES)}.")
        for width, heads in (("hidden", "heads"), ("vision_hidden", "vision_heads"), ("heads", "kv_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise UserError(
                    f"tiny model: {width} ({getattr(self, width)}) must be a multiple of "
                    f"{heads} ({getattr(self, heads)})."
                )
        if self.head_dim % 8:
            raise UserError(f"tiny model: hidden / heads is {self.head_dim}; it must be a multiple of 8.")
        if self.tile % (self.patch * self.merge):
            raise UserError(
                f"tiny model: image_size ({self.tile}) must be a multiple of patch x merge ({self.token_pixels})."
            )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def tile(self) -> int:
        return self.image_size or 4 * self.patch

    @property
    def token_pixels(self) -> int:
        """Side in pixels of the square that one merged image token covers."""
        return self.patch * self.merge

    @property
    def pixel_limits(self) -> dict[str, int]:
        area = self.token_pixels**2
        return {
            "shortest_edge": self.min_pixels or area,
            "longest_edge": self.max_pixels or IMAGE_TOKENS * area,
        }

    @property
    def markers(self) -> tuple[str, ...]:
        """Marker tokens of all latent formats, each once (two presets may share some)."""
        formats = [get_format(name) for name in self.latent_formats]
        return tuple(dict.fromkeys(token for item in formats for token in item.tokens))


def build_tiny(spec: TinySpec, folder: str | Path) -> Path:
    """Build the model of `spec` and save it, its tokenizer and its processor as the new folder `folder`."""
    import torch

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: choose a new folder for the tiny model, or delete it first.")
    tokenizer = build_tokenizer(spec.family, (*ROLES, *spec.words), spec.markers)
    builders = {
        "qwen2_5_vl": _qwen2_5_vl,
        "qwen3_vl": _qwen3_vl,
        "internvl": _internvl,
        "llava_onevision": _llava_onevision,
    }
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        model, processor = builders[spec.family](spec, tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id

    # Save beside the target and rename: a run that is stopped leaves no half model behind.
    folder.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(half)
        if spec.family == "llava_onevision":
            _name_as_released(half / "model.safetensors")
        processor.save_pretrained(half)
        half.chmod(0o755)  # mkdtemp makes it private
        os.replace(half, folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return folder


def _name_as_released(weights: Path) -> None:
    """Give SigLIP's parameters the prefix that they have in the released checkpoints, which vLLM looks for.

    transformers writes it only for a model that it has read under these names.
    """
    from safetensors.torch import load_file, save_file

    tower, released = "vision_tower.", "vision_tower.vision_model."
    tensors = {name.replace(tower, released): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


# ---- configurations


def _text(spec: TinySpec, tokenizer: PreTrainedTokenizerBase, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "max_position_embeddings": spec.max_positions,
        "initializer_range": spec.init_std,
        "tie_word_embeddings": spec.tie,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **more}


def _qwen(
    spec: TinySpec,
    tokenizer: PreTrainedTokenizerBase,
    classes: tuple[Any, Any, Any, Any],
    *,
    text: dict[str, Any],
    vision: dict[str, Any],
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """`classes`: config, model, processor, video processor; `text` and `vision`: what only one of the two has."""
    from transformers import Qwen2VLImageProcessor

    config_class, model_class, processor_class, video_class = classes
    tokens = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    config = config_class(
        text_config=_text(spec, tokenizer, **text),
        vision_config={
            "depth": spec.vision_depth,
            "hidden_size": spec.vision_hidden,
            "intermediate_size": 2 * spec.vision_hidden,
            "num_heads": spec.vision_heads,
            "out_hidden_size": spec.hidden,
            "patch_size": spec.patch,
            "spatial_merge_size": spec.merge,
            "temporal_patch_size": TEMPORAL,
            "in_channels": 3,
            "initializer_range": spec.init_std,
            **vision,
        },
        tie_word_embeddings=spec.tie,
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in tokens},
    )
    images = {
        "patch_size": spec.patch,
        "merge_size": spec.merge,
        "temporal_patch_size": TEMPORAL,
        "size": spec.pixel_limits,
        **MEAN_STD,
    }
    processor = processor_class(
        image_processor=Qwen2VLImageProcessor(**images),
        video_processor=video_class(**images),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    return model_class(config), processor


def _qwen2_5_vl(spec: TinySpec, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, ProcessorMixin]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    half = spec.head_dim // 2  # rotary pairs, shared out as 1 : 1.5 : 1.5 over time, height and width
    section = [half // 4, (half - half // 4) // 2, half - half // 4 - (half - half // 4) // 2]
    return _qwen(
        spec,
        tokenizer,
        (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
        text={"rope_parameters": _rope(mrope_section=section)},
        vision={"window_size": 2 * spec.token_pixels, "fullatt_block_indexes": [spec.vision_depth - 1]},
    )


def _qwen3_vl(spec: TinySpec, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, ProcessorMixin]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor

    half = spec.head_dim // 2
    side = half * 20 // 64  # the shares of the released models: 24, 20, 20 of 64
    section = [half - 2 * side, side, side]
    return _qwen(
        spec,
        tokenizer,
        (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor),
        text={
            "head_dim": spec.head_dim,
            "rope_parameters": _rope(mrope_section=section, mrope_interleaved=True),
        },
        vision={
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": list(range(min(spec.vision_depth, spec.layers))),
        },
    )


def _internvl(spec: TinySpec, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, ProcessorMixin]:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    tile = {"height": spec.tile, "width": spec.tile}
    tokens = (spec.tile // spec.patch // spec.merge) ** 2
    config = InternVLConfig(
        text_config=_text(spec, tokenizer, model_type="qwen2", rope_parameters=_rope()),
        vision_config={
            "hidden_size": spec.vision_hidden,
            "intermediate_size": 2 * spec.vision_hidden,
            "num_hidden_layers": spec.vision_depth,
            "num_attention_heads": spec.vision_heads,
            "image_size": [spec.tile, spec.tile],
            "patch_size": [spec.patch, spec.patch],
            "initializer_range": spec.init_std,
            "attention_bias": True,
            # The released models drop paths by a learned scale of 0.1; two shallow blocks should show.
            "layer_scale_init_value": 1.0,
        },
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=tokens,
        downsample_ratio=1 / spec.merge,
        tie_word_embeddings=spec.tie,
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=tile, crop_to_patches=True, max_patches=4, **MEAN_STD),
        video_processor=InternVLVideoProcessor(size=tile, **MEAN_STD),
        tokenizer=tokenizer,
        image_seq_length=tokens,
        chat_template=tokenizer.chat_template,
    )
    return InternVLForConditionalGeneration(config), processor


def _llava_onevision(spec: TinySpec, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, ProcessorMixin]:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    side = spec.tile
    tile = {"height": side, "width": side}
    pinpoints = [[rows * side, cols * side] for rows in (1, 2) for cols in (1, 2)]
    config = LlavaOnevisionConfig(
        text_config=_text(spec, tokenizer, model_type="qwen2", rope_parameters=_rope()),
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": spec.vision_hidden,
            "intermediate_size": 2 * spec.vision_hidden,
            "num_hidden_layers": spec.vision_depth,
            "num_attention_heads": spec.vision_heads,
            "image_size": side,
            "patch_size": spec.patch,
            "vision_use_head": False,
        },
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=spec.tie,
    )
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=tile, image_grid_pinpoints=pinpoints, **MEAN_STD),
        video_processor=LlavaOnevisionVideoProcessor(size=tile, **MEAN_STD),
        tokenizer=tokenizer,
        num_image_tokens=(side // spec.patch) ** 2,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        vision_aspect_ratio=config.vision_aspect_ratio,
        chat_template=tokenizer.chat_template,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor
