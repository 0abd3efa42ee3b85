"""Where rows come from: JSONL, Parquet, a data set saved by `datasets`. No network, ever.

Rows are plain dicts; nothing is judged here but that the file can be read.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from rl_lvr.data.schema import FIELDS, Problem, unknown_fields
from rl_lvr.errors import UserError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

IN_MEMORY_BYTES = 512 * 2**20
"""A Parquet file up to this size (unpacked) is held in memory; a larger one goes through `datasets`' cache on
disk, because reading one row out of a large row group would decode the whole group each time."""


class RowError(UserError):
    """A row that cannot be used: the finding, and where it stands."""

    def __init__(self, problem: Problem, label: str = "") -> None:
        where = f"{label}: " if label else ""
        super().__init__(f"{where}{problem.field}: {problem.what}; {problem.cure}.")
        self.problem = problem


class RowSource(Protocol):
    """Rows by position. `label` says where a row stands, for messages ("train.jsonl line 12")."""

    name: str

    def __len__(self) -> int: ...
    def row(self, index: int) -> Mapping[str, Any]: ...
    def label(self, index: int) -> str: ...
    def file_problems(self) -> list[Problem]:
        """Findings that concern the file as a whole, such as an unknown column."""
        ...


def locate(path: str | Path) -> tuple[Path, str | None]:
    """The file or folder that a data file's name stands for, and the split behind its colon."""
    text = str(path)
    whole = Path(text)
    if whole.exists():
        return whole, None
    name, colon, split = text.rpartition(":")
    if not colon or not Path(name).exists():
        raise UserError(f"data file {text} does not exist: check the path.")
    return Path(name), split


def open_source(path: str | Path) -> tuple[RowSource, Path]:
    """The rows of `path` and the folder that its image paths are relative to."""
    place, split = locate(path)
    if place.is_dir():
        return _open_saved(place, split), place
    if split is not None:
        raise UserError(f"{place} is a single file and has no split {split!r}: leave ':{split}' out.")
    suffix = place.suffix.lower()
    if suffix == ".jsonl":
        return JsonlRows(place), place.parent
    if suffix == ".parquet":
        return _open_parquet(place), place.parent
    raise UserError(
        f"{place} is neither .jsonl nor .parquet: convert it to one of these, or save it with datasets' save_to_disk."
    )


class JsonlRows:
    """One JSON object per line; only the places of the lines are kept in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self._starts = array("q")
        self._lines = array("q")
        start = 0
        with path.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    self._starts.append(start)
                    self._lines.append(number)
                start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def label(self, index: int) -> str:
        return f"{self.name} line {self._lines[index]}"

    def file_problems(self) -> list[Problem]:
        return []

    def row(self, index: int) -> Mapping[str, Any]:
        with self.path.open("rb") as handle:
            handle.seek(self._starts[index])
            line = handle.readline()
        try:
            row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_no_repeats, parse_constant=_no_constants)
        except UnicodeDecodeError as error:
            raise RowError(Problem("line", f"is not UTF-8 ({error.reason})", "save the file as UTF-8")) from error
        except json.JSONDecodeError as error:
            raise RowError(
                Problem(
                    "line",
                    f"is not valid JSON ({error.msg}, column {error.colno})",
                    "write one JSON object per line",
                )
            ) from error
        except RecursionError as error:
            raise RowError(Problem("line", "is nested too deeply", "write a flat record")) from error
        if not isinstance(row, dict):
            raise RowError(Problem("line", "is JSON but no object", "write one JSON object per line"))
        return row


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError(Problem(twice, "is given twice in one object", "keep one of the two"))
    return row


def _no_constants(text: str) -> NoReturn:
    raise RowError(Problem("line", f"holds {text}, which is not JSON", "write a number, or leave the field out"))


class ArrowRows:
    """Rows of an Arrow table."""

    def __init__(self, table: pa.Table, name: str) -> None:
        self.name = name
        self.columns = table.column_names
        self._table = table.select([c for c in table.column_names if c in FIELDS])

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def label(self, index: int) -> str:
        return f"{self.name} row {index}"

    def file_problems(self) -> list[Problem]:
        return list(unknown_fields(self.columns, FIELDS))

    def row(self, index: int) -> Mapping[str, Any]:
        return from_columns(self._table.slice(index, 1).to_pylist()[0])


class DatasetRows:
    """Rows of a `datasets.Dataset`; images stay encoded."""

    def __init__(self, dataset: datasets.Dataset, name: str) -> None:
        self.name = name
        self.columns = list(dataset.column_names)
        known = [c for c in self.columns if c in FIELDS]
        self._dataset = dataset.select_columns(known).with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def label(self, index: int) -> str:
        return f"{self.name} row {index}"

    def file_problems(self) -> list[Problem]:
        return list(unknown_fields(self.columns, FIELDS))

    def row(self, index: int) -> Mapping[str, Any]:
        return from_columns(self._dataset[index : index + 1].to_pylist()[0])


def from_columns(row: dict[str, Any]) -> dict[str, Any]:
    """A columnar row as the schema has it: a null is an absent field, and meta may be JSON text."""
    result = _without_nulls(row)
    meta = result.get("meta")
    if isinstance(meta, str):
        try:
            result["meta"] = json.loads(meta)
        except json.JSONDecodeError as error:
            raise RowError(
                Problem("meta", f"is no JSON text ({error.msg})", "store a struct, or a JSON object as text")
            ) from error
    return result


def _without_nulls(value: Any) -> Any:
    """Drop null fields: a column's struct has the fields of all rows. Nulls in lists stay."""
    if isinstance(value, dict):
        return {name: _without_nulls(v) for name, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def _open_parquet(path: Path) -> RowSource:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        meta = pq.read_metadata(path)
        size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
        if size <= IN_MEMORY_BYTES:
            return ArrowRows(pq.read_table(path, partitioning=None), path.name)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is no readable Parquet file ({error}): write it again.") from error

    import datasets

    return DatasetRows(datasets.Dataset.from_parquet(str(path)), path.name)


def _open_saved(folder: Path, split: str | None) -> RowSource:
    if not (folder / "dataset_dict.json").is_file() and not (folder / "dataset_info.json").is_file():
        raise UserError(f"{folder} holds no data set of datasets' save_to_disk: name a .jsonl or .parquet file in it.")
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        names = ", ".join(saved)
        if split is None:
            raise UserError(f"{folder} holds several splits ({names}): name one, as in {folder}:{next(iter(saved))}.")
        if split not in saved:
            raise UserError(f"{folder} has no split {split!r}: choose from {names}.")
        return DatasetRows(saved[split], f"{folder.name}:{split}")
    if split is not None:
        raise UserError(f"{folder} holds one data set without splits: leave ':{split}' out.")
    return DatasetRows(saved, folder.name)
