"""Tables as people write them: CSV, JSON and JSON lines (and parquet), with a reason for every row that cannot be read."""

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from engine.data.sources.interface import Refused
from engine.errors import UserError, first_line
from engine.files import LARGEST_TEXT

TABLES = (".jsonl", ".ndjson", ".csv", ".tsv", ".json", ".parquet")
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_MOST_ROWS = 2**26
_BATCH, _AT_ONCE = 64, 2**28  # rows of a parquet file that are unpacked at once, and bytes
_LEAST_BOUND, _MOST_TIMES = 2**26, 32  # bytes that its rows may take in any case, and for each byte of the file
_CELL = 64  # bytes of an object
_SEPARATORS = ",;\t|"


@dataclass
class Row:
    """A row by column, and the line where it ends; or what is wrong with it, said of that line."""

    line: int
    values: dict[str, Any] = field(default_factory=dict)
    problem: Refused | None = None


def read_table(name: str, data: bytes, encoding: str, key_columns: list[str]) -> tuple[list[Row], list[str]]:
    """The rows of a table file, and remarks on how it was read.

    Args:
        name: where it lies, for errors.
        encoding: that of text which begins with no byte order mark.
        key_columns: columns of which one must be there, by which the separator of a CSV file is recognised.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(name, data), []
    if encoding == "utf-8" and (wide := _wide(data)):
        raise UserError(f"{name}: not utf-8 text; give --metadata_encoding {wide}")
    text = decode_text(data, encoding)
    remarks: list[str] = []
    rows = list(_read_csv(text, suffix, key_columns, remarks) if suffix in (".csv", ".tsv") else _read_json(text))
    return rows, remarks


def decode_text(data: bytes, encoding: str) -> str:
    """Text in this encoding, or that of its byte order mark. Bytes that are not of it become lone surrogates."""
    encoding = next((marked for mark, marked in _MARKS.items() if data.startswith(mark)), encoding)
    return data.decode(
        encoding, "replace" if encoding.lower().startswith(("utf-16", "utf-32", "utf_16", "utf_32")) else "surrogateescape"
    )


def _wide(data: bytes) -> str | None:
    """UTF-16 without a byte order mark: every second byte of Latin letters is zero."""
    begin = b"" if data.startswith(tuple(_MARKS)) else data[:200]
    return next((name for name, zeros in (("utf-16-le", begin[1::2]), ("utf-16-be", begin[::2])) if zeros.count(0) > 20), None)


def undecoded(value: Any, encoding: str) -> Refused | None:
    """What is wrong with a value whose bytes are not text in this encoding."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and (found := re.search("[\udc80-\udcff]", text)):
            byte = ord(found[0]) - 0xDC00
            place = len(text[: found.start()].encode(errors="surrogateescape")) + 1
            around = text[max(found.start() - 12, 0) : found.end() + 12].encode("ascii", "replace").decode()
            return Refused(
                f"is not {encoding} text",
                f"byte 0x{byte:02x}, number {place} of {around!r}; name the file's encoding, as in --metadata_encoding cp1252",
            )
    return None


def _read_parquet(name: str, data: bytes) -> list[Row]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        if file.metadata.num_rows > _MOST_ROWS or sum(group.total_byte_size for group in groups) > LARGEST_TEXT:
            raise ValueError(f"{file.metadata.num_rows} rows are more than a table of captions has")
        values: list[dict[str, Any]] = []
        left = max(_LEAST_BOUND, _MOST_TIMES * len(data))
        for batch in file.iter_batches(rows_at_once(io.BytesIO(data))):
            left -= batch.nbytes + _CELL * batch.num_rows * (batch.num_columns + 1)
            if left < 0:
                raise ValueError("its rows take many times the size of the file")
            values += batch.to_pylist()
    except Exception as error:  # as of archives
        raise UserError(f"{name}: not a readable parquet file: {first_line(error)}") from None
    return [Row(number, row) for number, row in enumerate(values, start=1)]


def rows_at_once(file: BinaryIO) -> int:
    """How many rows of a parquet file to read at once: each may hold a value whole that is stored once for many."""
    import pyarrow.parquet

    described, largest = pyarrow.parquet.ParquetFile(file).metadata, 1
    for group, column in itertools.product(range(described.num_row_groups), range(described.num_columns)):
        chunk = described.row_group(group).column(column)
        file.seek(min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset))
        # A page begins with its type, 2 for a dictionary, and its size unpacked, each as a varint after the byte 0x15.
        page = re.match(rb"\x15(.)\x15([\x80-\xff]*[\0-\x7f])", file.read(16), re.DOTALL)
        if page and (page[1] == b"\4" or "DELTA_BYTE_ARRAY" in chunk.encodings):
            size = sum((byte & 127) << 7 * place for place, byte in enumerate(page[2])) >> 1
            largest = max(largest, size)
    return max(1, min(_BATCH, _AT_ONCE // largest))


def _read_json(text: str) -> Iterator[Row]:
    """Objects one after another, on a line each or on several; lists of them; or one object of objects by file name."""
    decoder, blank = json.JSONDecoder(), re.compile(r"[\s,]*")
    position, line, counted = 0, 1, 0
    in_vain = 0  # characters read for values that are none, of which each line may begin another
    while (position := blank.match(text, position).end()) < len(text):  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            found, said = (
                (error.pos, error.msg) if isinstance(error, json.JSONDecodeError) else (position + 1000, first_line(error))
            )
            yield Row(line, problem=Refused("is not valid JSON", said))
            in_vain += found - position
            if in_vain > 10 * len(text) + 3_000_000:
                raise ValueError("not JSON") from None
            position = text.find("\n", position) + 1 or len(text)
            continue
        for item in value if isinstance(value, list) and any(isinstance(item, dict) for item in value) else [value]:
            if not isinstance(item, dict):
                yield Row(line, problem=Refused("is not a JSON object"))
            elif len(item) > 0 and all(isinstance(inner, dict) for inner in item.values()) and "bytes" not in item:
                yield from (Row(line, {"file_name": name} | inner) for name, inner in item.items())
            else:
                yield Row(line, item)


def _read_csv(text: str, suffix: str, key_columns: list[str], remarks: list[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    lines = list(io.StringIO(text, newline=""))
    start = 1 if lines and re.match(r"sep=.\s*$", lines[0]) else 0  # how spreadsheets note their separator
    separator, header = _header(lines[start] if start < len(lines) else "", "\t" if suffix == ".tsv" else ",", key_columns)
    if separator != "," and suffix != ".tsv":
        remarks.append(f"its columns are separated by {separator!r}")
    padded = any(name != name.lstrip() for name in header)
    header = [name.strip().strip('"') for name in header]
    longer: list[int] = []
    for line, cells in _csv_records(lines, start + 1, separator, padded):
        if isinstance(cells, Refused):
            yield Row(line, problem=cells)
        elif cells:
            values = dict.fromkeys(header) | dict(zip(header, cells, strict=False))
            if any(cell.strip() for cell in cells[len(header) :]):
                longer.append(line)
            yield Row(line, values)
    if longer:
        remarks.append(
            f"{len(longer)} rows have more cells than the header, and lose what is in them (first: line {longer[0]}); "
            f"put texts that hold {separator!r} in double quotes"
        )


def _header(line: str, separator: str, key_columns: list[str]) -> tuple[str, list[str]]:
    """The separator under which a key column appears, and the header's cells; the usual separator where none does."""
    headers = {tried: next(csv.reader([line], delimiter=tried), []) for tried in dict.fromkeys(separator + _SEPARATORS)}
    for tried, cells in headers.items():
        if {cell.strip() for cell in cells} & set(key_columns):
            return tried, cells
    return separator, headers[separator]


def _csv_records(lines: list[str], start: int, separator: str, padded: bool) -> Iterator[tuple[int, list[str] | Refused]]:
    """Records with the number of the line where each ends.

    A quote that is opened and not closed swallows the lines after it: the line is refused, and the next one read anew. Stray
    quotes within one line are taken as they are.
    """
    options: dict[str, Any] = {"delimiter": separator, "skipinitialspace": padded}
    while start < len(lines):
        reader = csv.reader(map(lines.__getitem__, range(start, len(lines))), strict=True, **options)
        read = 0
        try:
            for cells in reader:
                read = reader.line_num
                yield start + read, cells
            return
        except csv.Error:
            start += read + 1
        # An open quote takes the line break into its cell.
        try:
            cells, *others = csv.reader([lines[start - 1].rstrip("\r\n") + "\n", "\n"], **options)
        except csv.Error as error:
            yield start, Refused("is not valid CSV", first_line(error))
        else:
            yield start, cells if others else Refused("has an open quote")
