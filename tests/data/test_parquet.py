"""Rows of parquet files: read in ranges, whatever their number, and planned without reading any."""

import threading

import pyarrow as pa
import pyarrow.parquet
import pytest

from engine.data.sources.parquet import Column, ParquetRows
from engine.errors import UserError


def write(path, texts, **options):
    pyarrow.parquet.write_table(pa.table({"text": texts, "other": [0] * len(texts)}), path, **options)
    return path


@pytest.fixture
def column(tmp_path):
    files = [
        write(tmp_path / "a.parquet", [f"a{n}" for n in range(500)], row_group_size=200),
        write(tmp_path / "b.parquet", []),
        write(tmp_path / "c.parquet", [f"c{n}" for n in range(70)], row_group_size=1000),
    ]
    rows = ParquetRows(files, "f")
    assert (len(rows), rows.starts.tolist(), rows.column_names) == (570, [0, 500, 500, 570], ["text", "other"])
    return Column(rows, "text")


def expected(row: int) -> str:
    return f"a{row}" if row < 500 else f"c{row - 500}"


def test_a_row_is_found_from_wherever_the_one_before_was(column):
    for row in [*range(0, 570, 7), 569, 0, 199, 200, 63, 64, 499, 500, 130]:
        assert column[row] == expected(row)


def test_threads_share_what_was_read(column):
    found: dict[int, str] = {}

    def read(first: int) -> None:
        found.update({row: column[row] for row in range(first, 570, 8)})

    threads = [threading.Thread(target=read, args=[first]) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {row: expected(row) for row in range(570)}


def test_rows_in_order_are_read_once(column, monkeypatch):
    begun = []
    begin = Column._begin
    monkeypatch.setattr(Column, "_begin", lambda self, *place: (begun.append(place), begin(self, *place)))
    assert [column[row] for row in range(570)] == [expected(row) for row in range(570)]
    assert begun == [(0, 0, 0), (0, 1, 200), (0, 2, 400), (2, 0, 500)]


def test_a_row_group_that_cannot_be_read_fails_once_for_all_its_rows(column, tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    chunk = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(content)
    begun = []
    begin = Column._begin
    monkeypatch.setattr(Column, "_begin", lambda self, *place: (begun.append(place), begin(self, *place)))
    for row in (199, 200, 201, 399):
        if row == 199:
            assert column[row] == "a199"
            continue
        with pytest.raises((OSError, ValueError)):
            column[row]
    assert column[400] == "a400"
    assert begun == [(0, 0, 0), (0, 1, 200), (0, 2, 400)]


def test_files_with_other_columns_are_refused(tmp_path):
    write(tmp_path / "a.parquet", ["a"])
    pyarrow.parquet.write_table(pa.table({"caption": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet: has not the columns of .*a.parquet \(caption, other, text\)"):
        ParquetRows([tmp_path / "a.parquet", tmp_path / "b.parquet"], "f")
