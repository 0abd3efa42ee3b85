"""Records to disk: JSONL with image files, Parquet with embedded images. Same records, same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lvr.data.images import ImageRef
from rl_lvr.data.record import LatentSpec, Record

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

ROW_GROUP = 1000


def arrow_schema() -> pa.Schema:
    """The columnar form of the schema. meta is JSON text: its keys differ from record to record."""
    import pyarrow as pa

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    latent = pa.struct(
        [
            ("image", pa.int32()),
            ("boxes", pa.list_(pa.list_(pa.float64()))),
            ("cells", pa.list_(pa.int32())),
            ("grid", pa.list_(pa.int32())),
            ("images", pa.list_(image)),
        ]
    )
    return pa.schema(
        [
            ("id", pa.string()),
            ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))]))),
            ("images", pa.list_(image)),
            ("answer", pa.string()),
            ("latents", pa.list_(latent)),
            ("category", pa.string()),
            ("meta", pa.string()),
        ]
    )


def columnar_row(record: Record, embed: bool) -> dict[str, Any]:
    """A record as a row of `arrow_schema`."""
    return {
        "id": record.id,
        "messages": list(record.messages),
        "images": [_struct(image, embed) for image in record.images],
        "answer": record.answer,
        "latents": None if record.latents is None else [_latent(spec, embed) for spec in record.latents],
        "category": record.category,
        "meta": json.dumps(record.meta, ensure_ascii=False) if record.meta else None,
    }


def _struct(image: ImageRef, embed: bool) -> dict[str, Any]:
    if image.data is not None or embed:
        return {"bytes": image.read_bytes(), "path": os.path.basename(image.name) or None}
    return {"bytes": None, "path": str(image.path.absolute())}


def _latent(spec: LatentSpec, embed: bool) -> dict[str, Any]:
    return {
        "image": spec.image if spec.images is None else None,
        "boxes": None if spec.boxes is None else [list(box) for box in spec.boxes],
        "cells": None if spec.cells is None else list(spec.cells),
        "grid": None if spec.grid is None else list(spec.grid),
        "images": None if spec.images is None else [_struct(image, embed) for image in spec.images],
    }


def write_parquet(records: Iterable[Record], path: str | Path) -> int:
    """Write records with their image bytes embedded; returns how many. Memory: one row group at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, count = arrow_schema(), 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for rows in _chunks(columnar_row(record, embed=True) for record in records):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=ROW_GROUP)
            count += len(rows)
    return count


def write_jsonl(records: Iterable[Record], path: str | Path) -> int:
    """Write records one per line, their images as files beside them in `<name>_images/`; returns how many."""
    path = Path(path)
    folder = f"{path.stem}_images"
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as handle:
        for record in records:
            row = record.to_row()
            if record.images:
                row["images"] = [
                    _save(image, path.parent, f"{folder}/{count:07d}_{i}") for i, image in enumerate(record.images)
                ]
            for number, spec in enumerate(record.latents or ()):
                if spec.images is not None:
                    row["latents"][number]["images"] = [
                        _save(image, path.parent, f"{folder}/{count:07d}_latent{number}_{i}")
                        for i, image in enumerate(spec.images)
                    ]
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _save(image: ImageRef, root: Path, stem: str) -> str:
    """Write the encoded image as it is; returns its path relative to `root`."""
    data = image.read_bytes()
    name = stem + (Path(image.name).suffix.lower() or (".png" if data.startswith(b"\x89PNG") else ".img"))
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return name


def to_dataset(records: Iterable[Record], embed: bool) -> datasets.Dataset:
    """The columnar form as a `datasets.Dataset` in memory; images stay encoded until a row is read."""
    import datasets
    import pyarrow as pa

    schema = arrow_schema()
    tables = [pa.Table.from_pylist(rows, schema=schema) for rows in _chunks(columnar_row(r, embed) for r in records)]
    features = datasets.Features.from_arrow_schema(schema)
    features["images"] = datasets.List(datasets.Image())  # the same storage, decoded on access
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


def _chunks(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, ROW_GROUP)):
        yield chunk
