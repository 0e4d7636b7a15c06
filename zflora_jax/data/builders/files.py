"""Rows of JSON, JSONL, CSV and Parquet files, each with its position for messages."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.textfile import decode, lines_of

Raw = Mapping[str, Any]


def table_rows(path: Path) -> Iterator[tuple[str, Raw]]:
    """Yields ("FILE, row N", row) for each row of a file, counted from 1 (in JSONL by line). The
    suffix chooses the reader: .csv (empty cells are left out), .parquet, or else a JSON list or
    JSONL. ConfigError if the file is malformed or has no row.
    """
    read = {".csv": _csv_rows, ".parquet": _parquet_rows}.get(path.suffix.lower(), _json_rows)
    where = ""
    for number, row in read(path):
        where = f"{path}, row {number}"
        require(isinstance(row, dict), f"{where}: expected an object, got {type(row).__name__}.")
        yield where, row
    require(bool(where), f"{path}: no rows. Expected a JSON list of objects, or one a line.")


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    text = decode(path.read_bytes(), path)
    if text.lstrip().startswith("["):
        yield from enumerate(_json(text, str(path)), start=1)
        return
    for number, line in enumerate(lines_of(text), start=1):
        if line.strip():
            yield number, _json(line, f"{path}, row {number}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also integers too long, lists nested too deep
        raise ConfigError(f"{where}: JSON that cannot be read: {error}.") from error


def _csv_rows(path: Path) -> Iterator[tuple[int, Raw]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is too small for documents
    lines = io.StringIO(decode(path.read_bytes(), path), newline="")
    reader = csv.DictReader(lines, strict=True)
    try:
        names = reader.fieldnames or ()
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"{path}: two columns are called {', '.join(map(repr, twice))}.")
        for number, row in enumerate(reader, start=1):
            require(
                None not in row and None not in row.values(),
                f"{path}, row {number}: not as many cells as the header has columns"
                f" ({', '.join(names)}). Quote cells that hold commas.",
            )
            yield number, {name: cell for name, cell in row.items() if cell}
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num}: invalid CSV: {error}.") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Raw]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: Parquet is read with pyarrow: pip install pyarrow") from error
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from enumerate(map(plain, rows), start=1)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: invalid Parquet: {error}") from error


def plain(value: Any) -> Any:
    """Returns a table's value in JSON's types: str for bytes, lists for arrays, and without the
    nulls that Arrow puts into absent fields.
    """
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {name: plain(x) for name, x in value.items() if x is not None}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [plain(x) for x in value] if isinstance(value, list | tuple) else value
