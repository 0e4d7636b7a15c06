"""Public datasets of TFDS and the Hugging Face hub: those of tasks, and any that data.data_dir
names.

A task's dataset comes from TFDS if its builder runs without TensorFlow, else from the hub. If the
published test rows have no labels, the published validation rows are the test rows, as in
LLM-Adapters' files.
"""

from __future__ import annotations

import functools
import importlib
import importlib.resources
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.data.builders.files import plain
from zflora_jax.data.builders.own import form_of, read_rows
from zflora_jax.data.builders.published import Row
from zflora_jax.data.lazy import Lazy
from zflora_jax.data.task import SPLIT_WORDS


@dataclass(frozen=True)
class Tfds:
    """A dataset of TFDS.

    Attributes:
      name: Its name, with its config if it has several: "glue/cola".
      module: Module that registers it, if TFDS does so only with TensorFlow.
      url: URL of its files, if TFDS has no list of them.
    """

    name: str
    module: str = ""
    url: str = ""

    def splits(self) -> list[str]:
        """Returns the names of its splits; raises the errors of `open`."""
        return list(self._prepared().info.splits)

    def open(self, split: str) -> Sequence[Any]:
        """Opens a split, downloaded and prepared on first use; ConfigError if that fails."""
        return self._prepared().as_data_source(split)

    def _prepared(self) -> Any:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

        from zflora_jax.data.builders.prepared import prepared

        # TFDS reads its checksums through this backport of the standard library's module.
        sys.modules.setdefault("importlib_resources", importlib.resources)
        if self.module:
            importlib.import_module(f"tensorflow_datasets.text.{self.module}")
        try:
            return prepared(functools.partial(tfds.builder, self.name, try_gcs=False), self.url)
        except (
            ImportError,
            tfds.core.registered.DatasetNotFoundError,
            tfds.download.DownloadError,
            NonMatchingChecksumError,
        ) as error:
            raise ConfigError(
                f"the TFDS dataset {self.name!r} cannot be prepared: {error}"
            ) from error


@dataclass(frozen=True)
class Hub:
    """A dataset of the hub: repository, config if it has several, revision (None: main)."""

    name: str
    config: str | None = None
    revision: str | None = None

    def splits(self) -> list[str]:
        """Returns the names of its splits; ConfigError if they cannot be read."""
        return list(self._call("get_dataset_split_names"))

    def open(self, split: str) -> Sequence[Any]:
        """Opens a split; ConfigError if it cannot be read."""
        return self._call("load_dataset", split=split, revision=self.revision)

    def _call(self, function: str, **options: Any) -> Any:
        try:
            import datasets

            return getattr(datasets, function)(self.name, self.config, **options)
        # Its errors (no network, no such dataset, no access, ...) have no common class.
        except Exception as error:
            fix = " Install `datasets`: pip install datasets." * isinstance(error, ImportError)
            raise ConfigError(
                f"the dataset {self.name!r} cannot be read from the Hugging Face hub:"
                f" {type(error).__name__}: {error}.{fix}"
            ) from error


class Dataset(NamedTuple):
    """A dataset that provides the rows of a task."""

    source: Tfds | Hub
    format: str  # format of its rows, see `own.read_rows`
    splits: Mapping[str, str]  # the task's splits -> their names there

    def open(self, split: str) -> Sequence[Row]:
        """Opens the rows of a split, a key of `splits`; ConfigError if it cannot be read."""
        name = f"{self.source.name}, {self.splits[split]}"
        raw = self.source.open(self.splits[split])
        require(len(raw) > 0, f"{name}: the split is empty.")
        format = self.format or form_of(plain(raw[0]), f"{name}, row 1")

        def read(i: int) -> list[Row]:
            return list(read_rows([(f"{name}, row {i + 1}", plain(raw[i]))], format))

        if format == "dialogue":  # the only format with several rows of a task in one
            return [row for i in range(len(raw)) for row in read(i)]
        return Lazy(lambda i: read(i)[0], range(len(raw)))


_ALL = {split: split for split in SPLIT_WORDS}
_CONVERTED = "refs/convert/parquet"  # by the hub: `datasets` no longer runs loading scripts
_DIALOGUES = ("li2017dailydialog/daily_dialog", "pfb30/multi_woz_v22")
_LABELLED = {"train": "train", "test": "validation"}
_GSM8K = Tfds("gsm8k", "gsm8k.gsm8k", "https://raw.githubusercontent.com")
PUBLIC = {
    "boolq": Dataset(Tfds("bool_q"), "boolq", _LABELLED),
    "piqa": Dataset(Tfds("piqa"), "piqa", _LABELLED),
    "social_i_qa": Dataset(Hub("lighteval/siqa"), "social_i_qa", _LABELLED),
    "hellaswag": Dataset(Tfds("hellaswag", "hellaswag"), "hellaswag", _LABELLED),
    "winogrande": Dataset(
        Tfds("winogrande", "winogrande"), "winogrande", _LABELLED | {"train": "train_xl"}
    ),
    "arc_easy": Dataset(Tfds("ai2_arc/ARC-Easy"), "arc", _ALL),
    "arc_challenge": Dataset(Tfds("ai2_arc/ARC-Challenge"), "arc", _ALL),
    "openbookqa": Dataset(Tfds("openbookqa"), "openbookqa", _ALL),
    "gsm8k": Dataset(_GSM8K, "gsm8k", {"train": "train", "test": "test"}),
    "cnn_dailymail": Dataset(Hub("abisee/cnn_dailymail", "3.0.0"), "summary", _ALL),
    "xsum": Dataset(Hub("EdinburghNLP/xsum", revision=_CONVERTED), "summary", _ALL),
    "samsum": Dataset(Hub("knkarthick/samsum"), "summary", _ALL),
    "dialogsum": Dataset(Hub("knkarthick/dialogsum"), "summary", _ALL),
    "dailydialog": Dataset(Hub(_DIALOGUES[0], revision=_CONVERTED), "dialogue", _ALL),
    "multiwoz": Dataset(Hub(_DIALOGUES[1], revision=_CONVERTED), "dialogue", _ALL),
}

NAMED = ("hub:", "tfds:")  # the beginnings of a data.data_dir that names a dataset
HOW = (
    "hub:OWNER/NAME or tfds:NAME, with :CONFIG if it has several, and after it @ and a pattern"
    " if its splits have other names than train, validation and test, such as @{}_sft"
)
_NAME = re.compile(r"(hub|tfds):([^:@]+)(?::([^@]+))?(?:@(.*\{\}.*))?")


def named_dataset(data_dir: str, format: str = "") -> Dataset:
    """Returns the dataset that a data.data_dir names.

    Args:
      data_dir: Name in the form of `HOW`.
      format: Form of its rows, a key of `own.FORMS`; "" for that of the first row.

    Raises:
      ConfigError: It names no dataset, or one without a split of the expected name.
    """
    found = _NAME.fullmatch(data_dir)
    if not found:
        raise ConfigError(f"data.data_dir={data_dir!r} names no dataset. Expected {HOW}.")
    library, name, config, pattern = found.groups("")
    source = Hub(name, config or None) if library == "hub" else Tfds(f"{name}/{config}".strip("/"))
    there, pattern = source.splits(), pattern or "{}"
    splits = {
        split: there_name
        for split, words in SPLIT_WORDS.items()
        for there_name in map(pattern.format, words)
        if there_name in there
    }
    require(
        bool(splits),
        f"{name} has the splits {', '.join(there)}: none is {pattern.format('train')!r}. Name them"
        f" by a pattern after @, such as {data_dir.partition('@')[0]}@{{}}_sft.",
    )
    return Dataset(source, format, splits)
