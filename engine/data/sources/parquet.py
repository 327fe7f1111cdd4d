"""Rows of parquet files, read in ranges: opening them takes what describes them, whatever the number of rows."""

import threading
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.sources.tables import rows_at_once
from engine.errors import UserError
from engine.files import open_regular

_KEPT = 4  # pieces of a column, of at most 64 rows each: threads that decode ask for rows before and behind one another
_BUFFER = 2**20  # bytes of a column that are read from its file at a time


class ParquetRows:
    """The rows of files, one file after another.

    features: the columns, as the library knows them.
    starts: the number of the first row of every file, and of all: int64 [files + 1].
    fingerprint: what the library calls the same rows.

    Raises:
        UserError: the files have different columns.
    """

    def __init__(self, files: list[Path], fingerprint: str) -> None:
        import datasets
        import pyarrow.parquet

        self.files, self.fingerprint = files, fingerprint
        self.groups: list[np.ndarray] = []  # of every file, where its row groups begin
        schemas = []
        for path in files:
            with open_regular(path) as file:
                described = pyarrow.parquet.ParquetFile(file)
                sizes = [described.metadata.row_group(number).num_rows for number in range(described.num_row_groups)]
                schemas.append(described.schema_arrow)
            self.groups.append(np.cumsum([0, *sizes]))
            if other := set(schemas[0].names) ^ set(schemas[-1].names):
                raise UserError(f"{path}: has not the columns of {files[0]} ({', '.join(sorted(other))[:200]})")
        self.starts = np.cumsum([0, *(groups[-1] for groups in self.groups)])
        self.features: datasets.Features = datasets.Features.from_arrow_schema(schemas[0])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def column_names(self) -> list[str]:
        return list(self.features)

    def stats(self) -> list[tuple[str, int, int]]:
        """Of every file its name, its size and the time of its change."""
        found = [path.stat() for path in self.files]
        return [(path.name, stat.st_size, stat.st_mtime_ns) for path, stat in zip(self.files, found, strict=True)]


class Column:
    """The values of one column by row. From row to row, in order, it goes on reading; back to others, from their row group on.

    Used by several threads.
    """

    def __init__(self, rows: ParquetRows, name: str) -> None:
        self.rows, self.name = rows, name
        self._lock = threading.Lock()
        self._pieces: deque[tuple[int, Any]] = deque(maxlen=_KEPT)  # the first row of each, and its values
        self._file, self._opened, self._at_once = -1, None, 1
        self._group, self._batches, self._next = (-1, -1), iter(()), 0  # the row group that is read, and its next row
        self._broken: dict[tuple[int, int], tuple[int, Exception]] = {}  # row group -> from which row on, and why

    def __reduce__(self) -> tuple[type["Column"], tuple[ParquetRows, str]]:
        return Column, (self.rows, self.name)

    def __getitem__(self, row: int) -> Any:
        with self._lock:
            return self._piece_of(row)

    def _piece_of(self, row: int) -> Any:
        for first, values in self._pieces:
            if first <= row < first + len(values):
                return values[row - first].as_py()
        file = int(np.searchsorted(self.rows.starts, row, side="right")) - 1
        groups = self.rows.groups[file] + self.rows.starts[file]
        group = int(np.searchsorted(groups, row, side="right")) - 1
        first_broken, why = self._broken.get((file, group), (row + 1, None))
        if why is not None and row >= first_broken:
            raise why
        try:
            if self._group != (file, group) or row < self._next:
                self._begin(file, group, int(groups[group]))
            while True:
                values = next(self._batches).column(0)
                first, self._next = self._next, self._next + len(values)
                if row < self._next:
                    self._pieces.append((first, values))
                    return values[row - first].as_py()
        except (OSError, ValueError, StopIteration) as error:  # once is enough for all rows behind this one
            why = ValueError("fewer rows than its row group says") if isinstance(error, StopIteration) else error
            self._broken[file, group], self._group = (self._next, why), (-1, -1)
            raise why from None

    def _begin(self, file: int, group: int, first: int) -> None:
        import pyarrow.parquet

        if self._file != file:
            path = self.rows.files[file]
            with open_regular(path) as content:
                self._at_once = rows_at_once(content)
            self._opened = pyarrow.parquet.ParquetFile(open_regular(path), buffer_size=_BUFFER)
            self._file = file
        self._next = first
        self._batches = self._opened.iter_batches(self._at_once, row_groups=[group], columns=[self.name])  # type: ignore[attr-defined]
        self._group = (file, group)
