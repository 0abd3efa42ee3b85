"""load_records: records over JSONL, Parquet and `datasets`.

Reading is lazy: a row is parsed, and an image opened, when it is asked for. Where the rows come from is
sources.py, the check of a whole file is check.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from rl_lvr.data.record import Record
from rl_lvr.data.sources import DatasetRows, RowError, RowSource, open_source
from rl_lvr.data.writing import to_dataset
from rl_lvr.errors import UserError

if TYPE_CHECKING:
    import datasets


class Records(Sequence[Record]):
    """Records by index. A slice is again lazy; pickles and forks well, so data loader workers may use it."""

    def __init__(self, source: RowSource, root: Path | None, index: range | list[int] | None = None) -> None:
        self.source = source
        self.root = root
        self._index: range | list[int] = range(len(source)) if index is None else index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return Records(self.source, self.root, self._index[index])
        row = self._index[index]
        try:
            return Record.from_row(self.source.row(row), self.root)
        except RowError as error:
            raise RowError(error.problem, self.source.label(row)) from error

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def select(self, indices: Sequence[int]) -> Records:
        """The records at these positions, in this order."""
        return Records(self.source, self.root, [self._index[i] for i in indices])

    def to_datasets(self, embed: bool = False) -> datasets.Dataset:
        """A `datasets.Dataset` in the columnar form of the schema; its images decode when a row is read.

        Image files stay files (by absolute path) unless `embed` asks for their bytes: embed what is to be
        saved to disk and moved.
        """
        return to_dataset(self, embed=embed)


def load_records(path: str | Path, limit: int | None = None) -> Records:
    """The records of a .jsonl or .parquet file, or of a folder that `datasets` saved (`folder:split`).

    A record that breaks the schema raises when it is read; `check.require_valid` judges a whole file first.
    """
    source, root = open_source(path)
    if limit is not None and limit < 1:
        raise UserError(f"the limit of records is {limit}; give a number above 0, or none.")
    return Records(source, root, None if limit is None else range(min(limit, len(source))))


def from_datasets(dataset: datasets.Dataset, root: str | Path | None = None) -> Records:
    """Records over a `datasets.Dataset` at hand. Without `root`, image paths are taken as they are."""
    return Records(DatasetRows(dataset, "data set"), None if root is None else Path(root))
