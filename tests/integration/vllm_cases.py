"""What the tests of the vLLM engine share: the CPU runtime's settings, tiny models that think, engines on them.

Import this before vLLM. An engine takes 5 to 25 seconds to start on two cores, so tests share them by module.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine_cases import FORMATS, SIX_ROWS, Rig
from helpers import FAMILIES
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rl_lvr.latents.format import LatentFormat, get_format
from rl_lvr.models import load_model
from rl_lvr.rollout.types import Request

CPU = torch.version.cuda is None
TEXT = ("qwen2", "qwen3")
ALL = (*FAMILIES, *TEXT)
LENGTH = 256
"""max_model_len of every engine here."""


def use_cpu_runtime() -> None:
    """What vLLM needs besides cpu_runtime_env to run its GPU code without a GPU; users with one set none of these."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="WARNING",
    )


if CPU:
    use_cpu_runtime()


class VLLMRig(Rig):
    """A tiny model on disk, loaded by transformers here and by vLLM in an engine."""

    def __init__(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        self.folder = folder
        self.text = folder.name in TEXT
        super().__init__(*load_model(folder, dtype=dtype))

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def requests(self, rows: Any = None, **more: Any) -> list[Request]:
        """As the reference engine's. LLaVA-OneVision gets one image per row (docs/engines.md)."""
        if self.text:
            texts = [question for _, question in SIX_ROWS] if rows is None else [question for _, question in rows]
            chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts]
            ids = [self.tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
            return [Request(row, **more) for row in ids]
        rows = SIX_ROWS if rows is None else rows
        if self.folder.name == "llava_onevision":
            rows = [(images[:1], question) for images, question in rows]
        return super().requests(rows, **more)

    def vllm(self, format_: LatentFormat, **more: Any) -> Any:
        from rl_lvr.rollout.vllm.engine import VLLMRolloutEngine

        engine_args = {
            "enforce_eager": True,
            "num_gpu_blocks_override": 256,
            **({} if self.text else {"limit_mm_per_prompt": {"image": 2, "video": 0}}),
            **more.pop("engine_args", {}),
        }
        arguments = {"max_model_len": LENGTH, "max_num_seqs": 8, "dtype": "float32", **more}
        return VLLMRolloutEngine(self.folder, self.processor, format_, engine_args=engine_args, **arguments)


def thinking_folder(source: Path, folder: Path, *, feedback: LatentFormat | None = None) -> Path:
    """A copy of a tiny model whose head likes START, so that untrained weights open a span every few tokens.

    `feedback`: also give it the format's feedback module, with random weights.
    """
    from transformers import AutoTokenizer

    shutil.copytree(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    heads = ("lm_head.weight", "embed_tokens.weight")  # a tied model has the second alone
    head = next(value for end in heads for name, value in tensors.items() if name.endswith(end))
    for format_ in map(get_format, FORMATS):
        if format_.start is not None and format_.end is not None:
            head[tokenizer.convert_tokens_to_ids(format_.start)] *= 6.0
            head[tokenizer.convert_tokens_to_ids(format_.end)] *= 6.0  # so that `free` spans end at all lengths
    head[tokenizer.eos_token_id] *= 0.2
    if feedback is not None:
        feedback.save(folder)
        tensors |= _feedback_weights(feedback, head.shape[1])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _feedback_weights(format_: LatentFormat, width: int) -> dict[str, torch.Tensor]:
    from rl_lvr.latents.feedback import NAME, LatentFeedback

    module = LatentFeedback(width, format_.projector, format_.norm)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return {f"{NAME}.{name}": value.detach().clone() for name, value in module.state_dict().items()}


def thinking(
    tiny_folder: Any, tmp: Path, name: str, feedback: LatentFormat | None = None, *, tie: bool = False
) -> Path:
    """The folder of a thinking tiny model of a family, or of a text-only one, made in `tmp`."""
    spec = {"seed": 6} if name in TEXT else {}  # with these weights all of them open spans
    source = tiny_folder(name, latent_formats=FORMATS, tie=tie, **spec)
    return thinking_folder(source, tmp / name, feedback=feedback)


def opened(requests: Sequence[Request], start: int) -> list[Request]:
    """Every other prompt ends in START, so that the first latents follow at once."""
    return [replace(r, prompt_ids=[*r.prompt_ids, start]) if i % 2 else r for i, r in enumerate(requests)]


class HostReads(TorchFunctionMode):
    """Notes whatever makes the host wait for a number."""

    _reads = frozenset({"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self._reads:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class NewTensors(TorchDispatchMode):
    """Notes tensors of at least `size` numbers that were not there before."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        output = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf) and leaf.numel() >= self.size]
        self.seen += [str(func) for leaf in made if leaf.untyped_storage().data_ptr() not in known]
        return output
