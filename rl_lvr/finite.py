"""Whether weights are finite: of a tensor, a model in memory, the files of a model.

NaN and infinity show in the smallest and largest entry: one pass that allocates nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from rl_lvr.agreement import from_all
from rl_lvr.errors import UserError

CURE = "the run that wrote it has failed; use an earlier checkpoint, or fetch the model again"
_CHUNK = 2**26
"""Elements of a file that are read at a time."""


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all entries of all tensors are finite; integers are, and so are tensors without storage."""
    ends: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        tensor = tensor.detach()
        wide = tensor.float() if tensor.element_size() < 2 else tensor  # float8 has no order
        low, high = torch.aminmax(wide)
        ends.setdefault(tensor.device, []).extend((low.double(), high.double()))
    return all(bool(torch.stack(found).isfinite().all()) for found in ends.values())


def first_not_finite(model: nn.Module, *, trained: bool = False) -> str | None:
    """The name of the first weight with an entry that is not finite; None without one.

    Of weights that are spread over processes (ZeRO-3, FSDP) this process's part is looked at, so processes have to
    agree on the answer. `trained`: only the parameters that an optimizer changes.
    """
    weights = dict(_weights(model, trained=trained))
    if finite(weights.values()):
        return None
    return next(name for name, tensor in weights.items() if not finite([tensor]))


def require_finite(model: nn.Module, what: str) -> None:
    """Refuse a model with weights that are not finite, in every process where they are spread over several.

    Raises:
        UserError: It names the weight. `what` stands for the model.
    """
    name = first_not_finite(model)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        name = next((found for found in from_all(name) if found is not None), None)
    if name is not None:
        raise UserError(f"{name} of {what} is not finite (it holds NaN or infinity): {CURE}.")


def require_finite_files(folder: Path) -> None:
    """The same for a model's files, without loading it: for engines that read them in another process."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = next((name for name in shards if Path(name).name != name), None)
        if outside is not None:
            raise UserError(f"{index} names {outside!r}, which is not a file beside it: fetch the model again.")
        files = [folder / name for name in shards]
    else:
        files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(str(file), framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118, it is no mapping
                part = stored.get_slice(name)
                shape = part.get_shape()
                if len(shape) < 2:
                    chunks: Iterable[Tensor] = [stored.get_tensor(name)]
                else:
                    rows = max(1, _CHUNK * shape[0] // max(1, torch.Size(shape).numel()))
                    chunks = (part[row : row + rows] for row in range(0, shape[0], rows))
                if not all(finite([chunk]) for chunk in chunks):
                    raise UserError(f"{name} in {file} is not finite (it holds NaN or infinity): {CURE}.")


def _weights(model: nn.Module, *, trained: bool) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that a checkpoint holds."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trained:
            tensor = getattr(parameter, "ds_tensor", parameter)  # of ZeRO-3
            yield name, tensor.to_local() if hasattr(tensor, "to_local") else tensor  # of FSDP
    if trained:
        return
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer
