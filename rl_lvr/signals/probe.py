"""The Probe: attention masses, entropies and maps of one forward pass, taken from the attention that runs anyway.

It replaces, for one `with` block, the entry of the attention in use in transformers' mapping, and looks only at calls
of the text layers' own attention modules. Masks, PEFT, checkpointing and the logits stay what they are.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.models import family_of
from rl_lvr.ops.attention_mass import attention_mass_reduced, labelled_positions, log_sum_exp
from rl_lvr.signals.kernels import Kernel, check_lse, dense_lse, watched
from rl_lvr.signals.region_entropy import region_entropy
from rl_lvr.signals.region_map import region_map
from rl_lvr.signals.regions import LABELS, Regions

What = Literal["mass", "image_entropy", "image_map"]
_one_probe = threading.Lock()


@dataclass(frozen=True)
class Reading:
    """One thing to measure: the mean over some layers and heads."""

    what: What
    """`mass`: attention mass on every label of `regions`, [N, LABELS]. `image_entropy`: entropy in nats of the
    attention over the image tokens, renormalised to 1, [N]; 0 where no image token is visible. `image_map`: attention
    on every image token of the query's sequence, in their order and not renormalised, [N, M]. M is the largest number
    of image tokens in a sequence (`Regions.image_columns`), at least 1; columns behind a sequence's last one are 0."""
    layers: tuple[int, ...] | None = None
    """Text layers from 0, negative from the end; None: all."""
    heads: tuple[int, ...] | None = None
    """Query heads; None: all."""
    by_layer: bool = False
    """`image_map` alone: one map per layer, in the order of `layers`, instead of their mean: [N, L, M]."""
    by_head: bool = False
    """`image_map` alone: one map per head, in the order of `heads`: [N, H, M], or [N, L, H, M]."""

    def __post_init__(self) -> None:
        if self.what not in get_args(What):
            raise ValueError(f"no reading {self.what!r}: choose {', '.join(get_args(What))}.")
        if (self.by_layer or self.by_head) and self.what != "image_map":
            raise ValueError(f"a reading of {self.what} is a mean: name its layers and heads one at a time.")


class Probe:
    """Arms the one forward pass that runs inside its context.

    `rows` [B, T] bool are the queries; every result has their order. Results are there after the block; they carry no
    gradient. Under gradient checkpointing the forward is measured and its repetition in the backward pass is not.
    """

    def __init__(
        self,
        model: nn.Module,
        regions: Regions,
        rows: Tensor,
        readings: Sequence[Reading],
        *,
        recompute: bool = False,
        backend: str = "auto",
    ) -> None:
        """`recompute=True` computes the softmax's denominator anew instead of taking it from the kernel."""
        if any(module._compiled_call_impl or "_orig_mod" in module._modules for module in model.modules()):
            raise UserError(
                "the model is compiled, and a probe cannot look into compiled layers: measure it uncompiled."
            )
        layers = family_of(model).text_layers(model)
        self._modules = {id(layer.self_attn): index for index, layer in enumerate(layers)}
        attention: Any = layers[0].self_attn
        self._implementation: str = attention.config._attn_implementation
        self._regions = regions
        self._rows = rows.flatten().nonzero()[:, 0]
        self._positions = labelled_positions(regions.labels)
        self._columns, self._width = regions.labels, 0
        if any(reading.what == "image_map" for reading in readings):
            self._columns, counts = regions.image_columns()
            self._width = max([1, *counts.tolist()])
        self._shape = rows.shape
        last = int(self._rows[-1]) if len(self._rows) else 0
        self._checked_row = divmod(last, rows.shape[1])
        self._padded = bool((regions.sequences < 0).any()) or regions.count != len(rows)
        self._recompute, self._backend = recompute, backend
        self._layers = {reading: _indices(reading.layers, len(layers), "layer") for reading in readings}
        for reading in readings:
            _indices(reading.heads, attention.config.num_attention_heads, "head")
        self._seen: set[int] = set()
        self._results: dict[Reading, Tensor] = {}
        self._by_layer: dict[Reading, dict[int, Tensor]] = {r: {} for r in readings if r.by_layer}
        self.kernels: set[str] = set()
        """Where log-sum-exps came from: kernels' names, or "recomputed"."""

    def __getitem__(self, reading: Reading) -> Tensor:
        """fp32, of the shape that `Reading` says, rows in the order of `rows`."""
        if reading.by_layer:
            return torch.stack([self._by_layer[reading][layer] for layer in self._layers[reading]], 1)
        return self._results[reading] / len(self._layers[reading])

    # ---- arming

    def __enter__(self) -> Probe:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

        if self._implementation not in FUNCTIONS:
            raise UserError(
                f"the model runs {self._implementation!r} attention, which the probe cannot watch: load it with "
                "attn_implementation='sdpa' (or flash_attention_2); masses are those of eager attention."
            )
        if not _one_probe.acquire(blocking=False):
            raise RuntimeError("a probe is armed already: one forward pass has one probe; give it all readings.")
        self._functions = FUNCTIONS
        self._attention: Any = FUNCTIONS[self._implementation]
        self._local = self._implementation in FUNCTIONS._local_mapping
        FUNCTIONS[self._implementation] = self._attend
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._local:
            self._functions[self._implementation] = self._attention
        else:
            del self._functions[self._implementation]
        _one_probe.release()
        wanted = {layer for layers in self._layers.values() for layer in layers}
        if kind is None and wanted - self._seen:
            raise RuntimeError(
                f"the probe saw no attention in layers {sorted(wanted - self._seen)}: run one forward pass of the "
                "model that it was given inside its block."
            )

    # ---- one attention call

    def _attend(self, module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = self._modules.get(id(module))
        readings = [reading for reading, layers in self._layers.items() if layer in layers]
        repeated = torch._C._current_graph_task_id() != -1  # gradient checkpointing, inside the backward pass
        if layer is None or not readings or repeated:
            return self._attention(module, query, key, *args, **kwargs)
        if layer in self._seen:
            raise RuntimeError("one probe serves one forward pass: a layer ran a second time.")
        if (query.shape[0], query.shape[2]) != self._shape or key.shape[2] != self._shape[1]:
            raise ValueError(
                f"the probe was made for tokens {tuple(self._shape)}, but attention runs over {query.shape[2]} queries "
                f"and {key.shape[2]} keys of {query.shape[0]} rows: pass use_cache=False and the batch it was made for."
            )
        result, kernel = watched(lambda: self._attention(module, query, key, *args, **kwargs))
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            self._record(layer, readings, query.detach(), key.detach(), kernel, kwargs)
        return result

    def _record(
        self,
        layer: int,
        readings: Sequence[Reading],
        query: Tensor,
        key: Tensor,
        kernel: Kernel | None,
        kwargs: dict[str, Any],
    ) -> None:
        rows = self._rows.to(query.device)
        sequences = self._regions.sequences.to(query.device) if self._padded else None
        labels = self._regions.labels.to(query.device)
        masked = {"scale": kwargs["scaling"], "window": kwargs.get("sliding_window"), "softcap": kwargs.get("softcap")}
        if kernel is not None:
            query, key = query.to(kernel.dtype), key.to(kernel.dtype)
        lse = None
        if kernel is not None and not self._recompute and len(rows):
            valid = None if sequences is None else sequences >= 0
            lse = dense_lse(kernel, (query.shape[0], query.shape[1], query.shape[2]), valid)
            check_lse(kernel, lse, query, key, self._checked_row, sequences, sinks=kwargs.get("s_aux"), **masked)
        self.kernels.add("recomputed" if lse is None or kernel is None else kernel.name)
        weights = query.new_ones(len(rows), dtype=torch.float32)
        taken: dict[tuple[str, tuple[int, ...], bool], Tensor] = {}  # readings of other layers often overlap here
        for reading in readings:
            heads = _indices(reading.heads, query.shape[1], "head")
            values = taken.get((reading.what, heads, reading.by_head))
            if values is None and reading.what == "mass":
                values = attention_mass_reduced(
                    query,
                    key,
                    labels,
                    LABELS,
                    lse=lse,
                    rows=rows,
                    positions=self._positions.to(query.device),
                    weights=weights,
                    segments=sequences,
                    sinks=kwargs.get("s_aux") if lse is None else None,
                    heads=heads,
                    backend=self._backend,
                    **masked,
                ).per_query
            elif values is None and reading.what == "image_entropy":
                image = self._regions.image.to(query.device)
                values = region_entropy(query, key, image, rows, segments=sequences, heads=heads, **masked).mean(1)
            elif values is None:
                view = {"segments": sequences, "heads": heads, **masked}
                values = region_map(
                    query,
                    key,
                    self._columns.to(query.device),
                    self._width,
                    rows,
                    log_sum_exp(query, key, rows=rows, sinks=kwargs.get("s_aux"), backend=self._backend, **view)
                    if lse is None
                    else lse[rows // query.shape[2], :, rows % query.shape[2]][:, list(heads)],
                    by_head=reading.by_head,
                    **view,
                )
            taken[reading.what, heads, reading.by_head] = values
            self._add(reading, layer, values)
        self._seen.add(layer)

    def _add(self, reading: Reading, layer: int, values: Tensor) -> None:
        if reading.by_layer:
            known = self._by_layer[reading]
            known[layer] = values.to(next(iter(known.values()), values).device)
            return
        sofar = self._results.get(reading)
        self._results[reading] = values if sofar is None else sofar + values.to(sofar.device)


def _indices(asked: tuple[int, ...] | None, count: int, what: str) -> tuple[int, ...]:
    if asked is None:
        return tuple(range(count))
    wrong = [index for index in asked if not -count <= index < count]
    if wrong or not asked:
        raise UserError(f"the model has no {what} {wrong or 'list that is empty'}: it has {count}, 0 to {count - 1}.")
    indices = tuple(index % count for index in asked)
    if len(set(indices)) != len(indices):
        raise UserError(f"a {what} is named twice in {list(asked)}.")
    return indices
