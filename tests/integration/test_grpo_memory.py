"""The scoring pass holds one chunk at a time, however large a group is."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from grpo_cases import make_trainer, opening
from helpers import noise_image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """The most bytes that tensors made under it held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, counts=False)
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            self._meet(tensor, counts=True)
        return made

    def _meet(self, tensor: Any, *, counts: bool) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            size = storage.nbytes() if counts else 0
            self.known[storage._cdata] = size
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self.known.pop(key)


def peak(load_tiny: Any, folder: Path, generations: int, **changes: Any) -> int:
    """Of the scoring pass, with attention measured in it."""
    row = {"prompt": [{"role": "user", "content": "what is next"}], "answer": "red", "image": noise_image(0, 280, 280)}
    data = Dataset.from_list([row])
    trainer = make_trainer(
        *opening(load_tiny),
        folder,
        data=data,
        reward_names=("looks",),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=generations // 4,
        num_generations=generations,
        parity_check=False,
        max_completion_length=8,
        **changes,
    )
    found = Peak()
    honest = trainer._get_per_token_logps_and_entropies

    def watched(*args: Any, **more: Any) -> Any:
        with found:
            return honest(*args, **more)

    trainer._get_per_token_logps_and_entropies = watched
    trainer._generate_and_score_completions([dict(data[0]) for _ in range(generations)])
    return found.most


@pytest.mark.parametrize("size", [None, 2])
def test_memory_does_not_grow_with_the_group(load_tiny: Any, tmp_path: Path, size: int | None) -> None:
    small, large = (peak(load_tiny, tmp_path, generations, scoring_batch=size) for generations in (4, 32))
    assert large < 1.5 * small
    if size is not None:
        whole = peak(load_tiny, tmp_path, 32, scoring_batch=32)  # the control: all rows in one chunk
        assert whole > 4 * large
        assert small < 0.75 * peak(load_tiny, tmp_path, 4)
