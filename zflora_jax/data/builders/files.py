"""What the builders of all file formats share: one local file of rows is one TFDS dataset."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.textfile import decode, lines_of

# One file is one dataset with one split; which file is train or test is the task's business
SPLIT = "rows"


def json_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read a JSON list or JSONL file.

    Args:
      path: of the file, in UTF-8.

    Yields:
      (position, object) of each row. The position is "FILE, row N", counted from 1 (in JSONL by
      line, blank lines included).

    Raises:
      ConfigError: the file is not UTF-8 or not JSON, a row is not an object, or there is none.
    """
    count = 0
    for number, row in _parse(Path(path)):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: expected an object, got {type(row).__name__}.")
        count += 1
        yield where, row
    if not count:
        raise ConfigError(
            f"{path}: no rows. Expected a JSON list of objects, or one JSON object per line."
        )


def table_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read a JSON, JSONL, CSV or Parquet file, by its suffix.

    Args:
      path: of the file; text is in UTF-8.

    Yields:
      (position, row) of each row, as `json_rows`; in CSV all values are strings.

    Raises:
      ConfigError: as for `json_rows`; pyarrow, which reads Parquet, is not installed.
    """
    read = {".csv": _csv_rows, ".parquet": _parquet_rows}.get(Path(path).suffix.lower())
    if read is None:
        yield from json_rows(path)
        return
    count = 0
    for row in read(Path(path)):
        count += 1
        yield f"{path}, row {count}", row
    require(count > 0, f"{path}: no rows.")


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # documents are longer than its 128 KiB
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
            yield {name: cell for name, cell in row.items() if cell}
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num}: invalid CSV: {error}.") from error


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: Parquet is read with pyarrow: pip install pyarrow") from error
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from map(without_nulls, batch.to_pylist())
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: invalid Parquet: {error}") from error


def without_nulls(value: Any) -> Any:
    """A value of an Arrow table without the nulls that stand for what its objects do not have."""
    if isinstance(value, dict):
        return {name: without_nulls(x) for name, x in value.items() if x is not None}
    return [without_nulls(x) for x in value] if isinstance(value, list) else value


def _parse(path: Path) -> Iterator[tuple[int, Any]]:
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
    except json.JSONDecodeError as error:
        at = f"column {error.colno}"
        at = f"line {error.lineno}, {at}" if "\n" in text else at
        raise ConfigError(f"{where}: invalid JSON at {at}: {error.msg}.") from error
    except (ValueError, RecursionError) as error:  # an integer too long, lists nested too deep
        raise ConfigError(
            f"{where}: JSON that Python cannot read ({error}). Write such a value as a text."
        ) from error


def field(row: Mapping[str, Any], name: str, where: str, expected: str, kind: type = str) -> Any:
    """A field of a row.

    Args:
      row: the row.
      name: of the field.
      where: the position of the row, for messages.
      expected: the fields that such a file has, for messages.
      kind: the type of the field.

    Raises:
      ConfigError: the field is missing or of another type.
    """
    if name not in row:
        raise ConfigError(
            f"{where}: no field {name!r}, the row has {', '.join(map(repr, row)) or 'none'}."
            f" Expected {expected}."
        )
    if not isinstance(row[name], kind):
        wanted = "string" if kind is str else kind.__name__
        raise ConfigError(
            f"{where}: field {name!r} must be a {wanted}, got {type(row[name]).__name__}"
            f" {row[name]!r:.80}."
        )
    return row[name]


@functools.cache
def _code() -> hashlib._Hash:
    """The hash of the builders' source."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest


@dataclasses.dataclass
class FileConfig(tfds.core.BuilderConfig):
    """A TFDS config that carries the source file, and the form of its rows if it is named; make it
    with `file_config`.
    """

    path: str = ""
    form: str = ""


def file_config(path: str | os.PathLike[str], form: str = "") -> FileConfig:
    """The config of one file, named by the hash of its bytes and of the code that reads them.

    Prepared data is so found again if the file moves, and never reused if it or the code changes.

    Args:
      path: of the file.
      form: of its rows (`builders.rows.FORMS`); "" for the builder's own, or a recognised one.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: _code().copy()).hexdigest()
    name = "-".join(filter(None, ("sha256", digest[:20], form)))
    return FileConfig(name=name, path=os.fspath(path), form=form)


class FileBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """One split, "rows", in the order of the file: `Builder(config=file_config(path))`.

    A builder adds FIELDS and `read`.
    """

    VERSION = tfds.core.Version("1.0.0")
    # texts; those in LISTS are lists of texts.
    FIELDS: ClassVar[tuple[str, ...]] = (
        "instruction",
        "input",
        "output",
        "answer",
    )
    LISTS: ClassVar[frozenset[str]] = frozenset({"references"})
    # No downloads, no checksums. Left to itself, TFDS looks for a checksum file through a package
    # that it does not install.
    url_infos: ClassVar[dict[str, Any]] = {}

    @staticmethod
    def read(path: str) -> Iterable[Mapping[str, Any]]:
        """The rows of the file, each with FIELDS.

        Raises:
          ConfigError: a row is malformed; the message names the file and the row.
        """
        raise NotImplementedError

    def rows(self) -> Iterable[Mapping[str, Any]]:
        """`read` of the file."""
        return self.read(self.builder_config.path)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {
            name: tfds.features.Sequence(text) if name in self.LISTS else text
            for name in self.FIELDS
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: object
    ) -> dict[str, Iterator[tuple[int, Mapping[str, Any]]]]:
        return {SPLIT: self._generate_examples(list(self.rows()))}

    def _generate_examples(
        self, rows: list[Mapping[str, Any]]
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        yield from enumerate(rows)
