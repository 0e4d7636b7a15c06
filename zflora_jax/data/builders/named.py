"""Datasets that data.data_dir names: of the Hugging Face hub, or of TFDS."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.data.builders.files import without_nulls
from zflora_jax.data.builders.public import Converted, Hub, Tfds
from zflora_jax.data.builders.rows import form_of, read_form
from zflora_jax.data.sources import HOW

_NAME = re.compile(r"(?P<kind>hub|tfds):(?P<name>[^:@]+)(:(?P<config>[^@]+))?(@(?P<pattern>.+))?")


@dataclass(frozen=True)
class NamedDataset:
    """A dataset that is not in files here.

    Attributes:
      kind: "hub" or "tfds".
      name: of the dataset.
      config: of the dataset.
      pattern: names of its splits, with {} for train, validation or test.
    """

    kind: str
    name: str
    config: str | None = None
    pattern: str = "{}"

    def splits(self) -> list[str]:
        """The names of its splits; ConfigError where they cannot be had."""
        return self._source({}).names()

    def open(self, split: str, form: str = "") -> Sequence[Mapping[str, str]]:
        """The rows of a split, as `rows.Rows.FIELDS`.

        Args:
          split: one of `splits`.
          form: of its rows; "" for what the first one has.

        Raises:
          ConfigError: it cannot be read, or its first row is of no form that is known.
        """
        raw: Any = self._source({split: split}).open(split)
        require(len(raw) > 0, f"{self}: the split {split!r} is empty.")
        found = form or form_of(raw[0], f"{self}, {split}, row 1")

        def read(index: int) -> Mapping[str, str]:
            where = f"{self}, {split}, row {index + 1}"
            return next(read_form([(where, without_nulls(raw[index]))], found))

        return Converted(range(len(raw)), read)

    def _source(self, splits: Mapping[str, str]) -> Tfds | Hub:
        if self.kind == "tfds":
            name = "/".join(filter(None, (self.name, self.config)))
            return Tfds(name, "", _plain, splits)
        return Hub(self.name, _plain, splits, self.config)

    def __str__(self) -> str:
        return ":".join(filter(None, (self.kind, self.name, self.config)))


def named_dataset(data_dir: str) -> NamedDataset:
    """What a data.data_dir that begins with hub: or tfds: names; ConfigError where it names
    nothing.
    """
    found = _NAME.fullmatch(data_dir)
    if not found or (found["pattern"] and "{}" not in found["pattern"]):
        raise ConfigError(f"data.data_dir={data_dir!r} names no dataset. Expected {HOW}.")
    return NamedDataset(found["kind"], found["name"], found["config"], found["pattern"] or "{}")


def _plain(value: Any) -> Any:
    """A row with str for bytes and lists for arrays."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {name: _plain(x) for name, x in value.items()}
    if hasattr(value, "tolist") and not isinstance(value, str):
        value = value.tolist()
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value
