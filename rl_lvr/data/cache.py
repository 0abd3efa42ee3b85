"""Encoded records kept on disk: images are rendered and processed once, not in every step.

A cache is a folder of safetensors shards under a digest of everything that shaped it: the data file and its images,
the processor, the format and the versions of this module and of transformers. It is built beside its place and renamed,
so an interrupted build leaves nothing that a later run would take for whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rl_lvr import progress
from rl_lvr.data.encoding import Encoded, Encoder, Target
from rl_lvr.data.records import Records
from rl_lvr.data.sources import locate

VERSION = 2
SHARD = 4096
CHUNK = 256  # records whose images are processed in one call


class EncodedOnDisk(Sequence[Encoded]):
    """The records of a cache, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.length = json.loads((folder / "cache.json").read_text(encoding="utf-8"))["records"]
        self._files: dict[int, Any] = {}
        self._tables: dict[int, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_tables": {}}  # open files do not travel to loader workers

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.length))]
        if not 0 <= index < self.length:
            raise IndexError(index)
        shard, row = divmod(index, SHARD)
        if shard not in self._files:
            self._files[shard] = safe_open(str(self.folder / f"{shard:05d}.safetensors"), framework="pt")
            names = self._files[shard].keys()
            self._tables[shard] = {
                name: self._files[shard].get_tensor(name) for name in names if not name.endswith(".data")
            }
        return _unpack(self._files[shard], self._tables[shard], row)


def encoded_records(records: Records, encoder: Encoder, key: dict[str, Any], folder: Path) -> EncodedOnDisk:
    """The cache of `records` under `folder`, built with a progress bar if it is not there yet."""
    digest = hashlib.sha256(json.dumps({**key, "version": VERSION}, sort_keys=True).encode()).hexdigest()[:16]
    place = folder / digest
    if not (place / "cache.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{digest}-", dir=folder))
        try:
            _build(records, encoder, building)
            (building / "cache.json").write_text(json.dumps({**key, "records": len(records)}, indent=1) + "\n")
            os.chmod(building, 0o755)  # mkdtemp's folders are private; data folders are often shared
            try:
                os.replace(building, place)
            except OSError:
                if not (place / "cache.json").is_file():  # else another process was faster with the same content
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return EncodedOnDisk(place)


def cache_key(path: str, image_files: str, count: int, encoder: Encoder) -> dict[str, Any]:
    """Everything that shapes the first `count` encoded records of the data file `path`.

    `image_files` is the digest of a `check.Report`.
    """
    processor = encoder.processor
    template = (
        encoder.tokenizer.backend_tokenizer.to_str(),
        processor.chat_template,
        "" if encoder.family.text_only else processor.to_json_string(),
    )
    return {
        "data": file_digest(locate(path)[0]),
        "name": path,
        "images": image_files,
        "records": count,
        "processor": hashlib.sha256(repr(template).encode()).hexdigest(),
        "family": encoder.family.name,
        "format": repr(encoder.markers),
        "crops": encoder.crops,
        "transformers": metadata.version("transformers"),
    }


def file_digest(path: Path) -> str:
    """sha256 of a file, or of all files below a folder with their names."""
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        total.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def _build(records: Records, encoder: Encoder, folder: Path) -> None:
    with progress.task("processing records", total=len(records), unit="records") as bar:
        for number, start in enumerate(range(0, len(records), SHARD)):
            shard: list[Encoded] = []
            stop = min(start + SHARD, len(records))
            for i in range(start, stop, CHUNK):
                chunk = list(records[i : min(i + CHUNK, stop)])
                shard += encoder.encode(chunk)
                bar.advance(len(chunk))
            save_file(_pack(shard), str(folder / f"{number:05d}.safetensors"))


def _ragged(name: str, rows: list[Tensor]) -> dict[str, Tensor]:
    """Rows of different lengths as one tensor and where each starts."""
    starts = torch.tensor([0, *[len(row) for row in rows]]).cumsum(0)
    return {f"{name}.data": torch.cat(rows).contiguous(), f"{name}.starts": starts}


def _pack(shard: list[Encoded]) -> dict[str, Tensor]:
    tensors = _ragged("input_ids", [e.input_ids for e in shard]) | _ragged("labels", [e.labels for e in shard])
    tensors["prompt_length"] = torch.tensor([e.prompt_length for e in shard])
    for kind, dicts in (
        ("images", [e.images for e in shard]),
        ("aux", [e.target_images or {} for e in shard]),
    ):
        for key in sorted({key for d in dicts for key in d}):
            empty = next(d[key] for d in dicts if key in d)[:0]
            tensors |= _ragged(f"{kind}/{key}", [d.get(key, empty) for d in dicts])
    width = max((len(target.tokens) for e in shard for target in e.targets), default=0)
    return tensors | _ragged("targets", [_table(e.targets, width) for e in shard])


def _table(targets: tuple[Target, ...], width: int) -> Tensor:
    """[n, 2 + width]: position, image, tokens, -1 behind the last."""
    table = torch.full((len(targets), 2 + width), -1)
    for row, target in zip(table, targets, strict=True):
        row[: 2 + len(target.tokens)] = torch.tensor([target.position, target.image, *target.tokens])
    return table


def _unpack(file: Any, tables: dict[str, Tensor], row: int) -> Encoded:
    def read(name: str) -> Tensor:
        start, stop = tables[f"{name}.starts"][row : row + 2].tolist()
        return file.get_slice(f"{name}.data")[start:stop]

    def images(kind: str) -> dict[str, Tensor]:
        names = [n[len(kind) : -len(".starts")] for n in tables if n.startswith(kind) and n.endswith(".starts")]
        found = {name: read(kind + name) for name in names}
        return {name: value for name, value in found.items() if len(value)}

    return Encoded(
        input_ids=read("input_ids"),
        labels=read("labels"),
        images=images("images/"),
        prompt_length=int(tables["prompt_length"][row]),
        targets=tuple(
            Target(position, image, tuple(token for token in tokens if token >= 0))
            for position, image, *tokens in read("targets").tolist()
        ),
        target_images=images("aux/") or None,
    )
