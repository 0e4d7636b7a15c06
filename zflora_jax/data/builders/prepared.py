"""Rows as TFDS datasets: written once as ArrayRecord files, read at random without TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import requests
import tensorflow_datasets as tfds

from zflora_jax.core.fields import require
from zflora_jax.data.lazy import Lazy

Row = dict[str, Any]
Splits = Mapping[str, Iterable[Row]]


@dataclasses.dataclass
class RowsConfig(tfds.core.BuilderConfig):
    """A config of `Rows`; its name identifies the rows that `read` returns."""

    read: Callable[[], Splits] = dict


class Rows(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Rows in their order, each as JSON in the feature `row`."""

    VERSION = tfds.core.Version("1.0.0")
    # No checksums: TFDS would look for their file through a package that it does not install.
    url_infos: ClassVar[dict[str, Any]] = {}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"row": tfds.features.Text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[Any]]:
        # A list: TFDS would hide the errors of a generator.
        splits = self.builder_config.read()
        return {split: self._generate_examples(list(rows)) for split, rows in splits.items()}

    def _generate_examples(self, rows: list[Row]) -> Iterator[tuple[int, dict[str, str]]]:
        yield from ((i, {"row": json.dumps(row)}) for i, row in enumerate(rows))


def open_rows(
    name: str, read: Callable[[], Splits], split: str, files: Sequence[Path] = ()
) -> Sequence[Row]:
    """Opens the rows of one split of `read`, prepared on first use.

    Prepared rows are named by the format or generator (`name`), and a hash of `files` and of the
    code that makes rows. They are found again if the files move, and never reused after either
    changes. ConfigError if the directory cannot be written, or `read` refuses its source.
    """
    digest = _code().copy()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    config = RowsConfig(name=f"{name}-{digest.hexdigest()[:20]}", read=read)
    builder = prepared(functools.partial(Rows, config=config))
    with _quiet():
        source = builder.as_data_source(split)
    return Lazy(lambda i: json.loads(source[i]["row"]), range(len(source)))


@functools.cache
def _code() -> hashlib._Hash:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest


def cache_dir() -> Path:
    """Returns the directory of prepared data: $ZFLORA_CACHE, or ~/.cache/zflora_jax/tfds."""
    return Path(os.environ.get("ZFLORA_CACHE") or "~/.cache/zflora_jax/tfds").expanduser()


def prepared(make: Callable[..., Any], url: str = "") -> Any:
    """Prepares a TFDS builder in `cache_dir()`.

    Args:
      make: Function that returns the builder, called with `data_dir` and `file_format`.
      url: URL of its files, if the builder has no list of them.

    Raises:
      ConfigError: There is no connection to its files, the directory cannot be written, or the
        builder refuses its source.
    """
    make = functools.partial(make, data_dir=cache_dir(), file_format="array_record")
    with _quiet():
        builder = make()
        if builder.is_prepared():
            return builder
        _require_network(builder.name, builder.url_infos or [url])
        try:
            builder.download_and_prepare()
        except OSError as error:
            # Another process may have been first: its rows are equal.
            builder = make()
            require(
                builder.is_prepared(),
                f"cannot prepare the dataset {builder.name!r} under {cache_dir()}: {error}. Check"
                " the network, or set ZFLORA_CACHE to a directory that can be written.",
            )
        return builder


def _require_network(name: str, urls: Iterable[str]) -> None:
    """Asks the hosts of URLs: without a network, TFDS would try for minutes."""
    hosts = sorted({"://".join(urlsplit(url)[:2]) for url in urls if url.startswith("http")})
    for host in hosts:
        with contextlib.suppress(requests.RequestException):
            requests.head(host, timeout=10)
            return
    require(
        not hosts,
        f"the TFDS dataset {name!r} is not in {cache_dir()} and cannot be downloaded: no connection"
        f" to {' or '.join(hosts)}.",
    )


_QUIET = threading.RLock()  # all threads share stdout, and a sweep may load several runs at once


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences TFDS, which prints to stdout, where commands print results."""
    with _QUIET:
        absl = logging.getLogger("absl")
        level = absl.level
        absl.setLevel(logging.ERROR)
        tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        finally:
            tfds.enable_progress_bar()
            absl.setLevel(level)
