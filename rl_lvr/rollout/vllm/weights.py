"""A trainer's weights into a running vLLM, and the proof that they arrived.

Names are those of a saved checkpoint, which vLLM's own loaders understand. Under ZeRO-3 one bucket of weights at a
time is gathered; adapters are merged one layer at a time. The receipt holds a checksum over what was loaded, the
embedding rows that the engine now looks up, and what its output head now computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.models import family_of
from rl_lvr.wrapping import gathered, sharded, unwrapped

PROBES = 16
"""Embedding rows that are read back, and inputs that the output head is given."""
HEAD = "lm_head.weight"
BUCKET = 1 << 28
"""Bytes that are gathered or merged at a time; a single larger weight is a bucket of its own."""
_PIECE = 1 << 24


@dataclass
class Receipt:
    """What went in at one end or came out at the other."""

    tensors: int = 0
    checksum: float = 0.0
    """Sum over tensors of their mean absolute value, in float64."""
    rows: float = 0.0
    """The same of the first embedding rows, looked up through the model."""
    head: float = 0.0
    """The `fingerprint` of the output head's logits for `head_inputs`."""

    def count(self, value: Tensor) -> None:
        self.tensors += 1
        if value.is_floating_point() and value.numel():
            pieces = value.detach().reshape(-1).split(_PIECE)
            total = torch.stack([piece.abs().sum(dtype=torch.float64) for piece in pieces]).sum()
            self.checksum += float(total) / value.numel()

    def as_row(self) -> list[Any]:
        return [self.tensors, self.checksum, self.rows, self.head]

    def agrees(self, other: Receipt) -> bool:
        return not self.differences(other)

    def differences(self, other: Receipt) -> list[str]:
        """The names of the fields in which `other` differs by more than the rounding of a sum in float64."""

        def near(left: float, right: float) -> bool:
            return abs(left - right) <= 1e-6 * max(abs(left), abs(right), 1e-30)

        pairs = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        return [name for name, (left, right) in pairs.items() if not near(left, right)]


def mismatch(sent: Receipt, rows: Iterable[Sequence[Any]]) -> str | None:
    """What the first worker did not take over, as a clause without its full stop. `rows`: each worker's `as_row`."""
    for rank, row in enumerate(rows):
        got = Receipt(*row)
        names = sent.differences(got)
        if names == ["head"]:
            return (
                f"worker {rank} did not take over the weights: its output head computes other logits than the "
                f"trainer's (fingerprint {got.head:.9g}, expected {sent.head:.9g})"
            )
        if names:
            return f"worker {rank} did not take over the weights: sent {sent}, it has {got}"
    return None


def head_columns(width: int) -> Tensor:
    """[min(PROBES, width)], spread over the hidden size."""
    count = min(PROBES, width)
    return torch.arange(count) * width // count


def head_inputs(width: int) -> Tensor:
    """Unit vectors, [probes, width].

    A head answers each with a column of its weight. That product has no rounding in any precision or kernel, so the
    answers of an engine and a trainer can be held to equality.
    """
    return torch.nn.functional.one_hot(head_columns(width), width)


def fingerprint(logits: Tensor) -> float:
    """One number of logits [probes, V] that changes as much as they do, whatever the signs of the changes."""
    probes, words = (torch.arange(1, size + 1, dtype=torch.float64, device=logits.device) for size in logits.shape)
    return float((logits.double() * torch.outer(probes, words).cos()).mean())


def load(runner: Any, weights: Iterable[tuple[str, Tensor]]) -> Receipt:
    """In a worker: load `weights` into its model. Called with all of them, or the receipt will tell."""
    receipt = Receipt()

    def counted() -> Iterator[tuple[str, Tensor]]:
        for name, value in weights:
            receipt.count(value)
            yield name, value

    model = runner.model
    if runner.device.type == "cpu":  # weights are packed there: vLLM's reload does it, and `cpu.repack` what it leaves
        _reload(runner, counted())
    else:
        model.load_weights(counted())
    device = next(model.parameters()).device
    probes = model.embed_input_ids(torch.arange(PROBES, device=device))
    receipt.rows = float(probes.double().abs().mean())
    with _exact(device):
        receipt.head = fingerprint(model.head_logits(head_inputs(probes.shape[-1]).to(probes)))
    return receipt


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Products in full precision, whatever a trainer in this process has switched on."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = before


def write_files(named: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """For workers in other processes (`worker.LatentWorker.latent_load_files`). One weight at a time is on the host."""
    for number, (name, value) in enumerate(named):
        save_file({name: value.cpu().contiguous()}, folder / f"{number:06}.safetensors")


def _reload(runner: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """vLLM's layerwise reload. One that fails would leave stand-ins for weights behind: put the weights back."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    try:
        runner.reload_weights(weights_iterator=weights)
    except BaseException:
        finalize_layerwise_reload(runner.model, runner.model_config)
        raise


def checkpoint_weights(
    model: nn.Module, dtype: torch.dtype, receipt: Receipt, *, bucket: int = BUCKET
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a trainer's model under a checkpoint's names, one after the other; `receipt` counts them.

    `dtype` is the engine's precision. Wrappers (DDP, DeepSpeed, PEFT, torch.compile) may be around the model. Adapters
    are merged in for the copy, and the model stays as it was, bit for bit. Under ZeRO-3 all ranks must read to the end.

    Raises:
        UserError: Adapters give the head of a tied model another weight than its embedding, which vLLM cannot hold.
    """
    base: Any = unwrapped(model)
    family = family_of(base)
    tied = base.config.get_text_config().tie_word_embeddings
    embedding, looked_up = base.get_input_embeddings().weight, 0.0
    for units in _buckets(base, bucket):
        with gathered(*(value for unit in units for value in unit.parameters)):
            for unit in units:
                for name, value in unit.weights():
                    if value.numel() == 0:
                        raise UserError(f"{name} is not whole on this rank, and only ZeRO-3 can be gathered here.")
                    if name == HEAD:
                        receipt.head = _head(value, dtype)
                        if tied and receipt.head != looked_up and math.isfinite(receipt.head):
                            raise UserError(
                                "the model ties its output head to its embedding, and its adapters change only one of "
                                "the two, which vLLM cannot hold: take lm_head and embed_tokens out of the adapter, "
                                "or use the engine hf."
                            )
                        if tied:
                            continue
                    receipt.count(value)
                    if unit.holds(embedding):
                        receipt.rows = float(value[:PROBES].to(dtype).double().abs().mean())
                        looked_up = _head(value, dtype)
                    yield family.released_name(name), value


def _head(weight: Tensor, dtype: torch.dtype) -> float:
    """The fingerprint of a head with this weight [V, H], in an engine's precision."""
    return fingerprint(weight[:, head_columns(weight.shape[1]).to(weight.device)].to(dtype).T)


def take_part(model: nn.Module) -> None:
    """Under ZeRO-3: gather all weights with the ranks that read them, and use none."""
    if sharded(model):
        for _ in checkpoint_weights(model, torch.float32, Receipt()):
            pass


@dataclass(frozen=True)
class _Unit:
    """A weight, or an adapted layer whose weights make sense only together."""

    names: dict[str, Tensor]
    """Name in the state dict to parameter or buffer."""
    layer: Any = None
    prefix: str = ""

    @property
    def parameters(self) -> list[nn.Parameter]:
        own = [value for value in self.names.values() if isinstance(value, nn.Parameter)]
        return own if self.layer is None else list(self.layer.parameters())

    @property
    def size(self) -> int:
        """Bytes of the whole weights, also where this rank has only a part of them."""
        return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in self.parameters)

    def holds(self, weight: Tensor) -> bool:
        return any(value is weight for value in self.names.values())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        if self.layer is None:
            for name, value in self.names.items():
                yield name.replace("modules_to_save.default.", ""), value.detach()
            return
        merged = _merged(self.layer)
        for name in self.names:
            if name.startswith(f"{self.prefix}.base_layer."):
                inner = name.removeprefix(f"{self.prefix}.base_layer.")
                yield f"{self.prefix}.{inner}", merged[inner]


def _merged(layer: Any) -> dict[str, Tensor]:
    """Copies of an adapted layer's own weights with its active adapters in; the layer stays as it was.

    PEFT's own merge does it, whatever kind of adapter that is; what it subtracts again is only nearly what it added.
    """
    plain = layer.get_base_layer()
    before = {name: value.detach().clone() for name, value in plain.named_parameters()}
    with torch.no_grad():
        layer.merge()
        try:
            merged = {name: value.detach().clone() for name, value in plain.named_parameters()}
        finally:
            layer.unmerge()
            for name, value in plain.named_parameters():
                value.copy_(before[name])
    return merged | {name: value.detach() for name, value in plain.named_buffers()}


def _units(base: Any) -> Iterator[_Unit]:
    """Every weight of the state dict once, in its order."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tensors = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers(remove_duplicate=False))
    layers = {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    seen: set[str] = set()
    for name in base.state_dict():
        prefix = next((found for found in layers if name.startswith(f"{found}.")), None)
        if prefix is not None and prefix not in seen:
            seen.add(prefix)
            yield _Unit({n: v for n, v in tensors.items() if n.startswith(f"{prefix}.")}, layers[prefix], prefix)
        elif prefix is None and "original_module." not in name:
            yield _Unit({name: tensors[name]})


def _buckets(base: Any, bucket: int) -> Iterator[list[_Unit]]:
    units: list[_Unit] = []
    size = 0
    for unit in _units(base):
        if units and size + unit.size > bucket:
            yield units
            units, size = [], 0
        units.append(unit)
        size += unit.size
    if units:
        yield units
