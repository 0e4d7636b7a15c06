"""Public datasets of TFDS and the Hugging Face hub: those of tasks, and any that data.data_dir
names.

A task's dataset comes from TFDS where its builder runs without TensorFlow (4.9.10), else from the
hub, through `datasets`. Splits follow LLM-Adapters' files, whose test rows are the published
validation rows wherever the published test rows have no labels.
"""

from __future__ import annotations

import functools
import importlib
import importlib.resources
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.data.builders.files import Raw, plain
from zflora_jax.data.builders.own import form_of, read_own
from zflora_jax.data.builders.published import FORMATS, Row
from zflora_jax.data.lazy import Lazy


@dataclass(frozen=True)
class Tfds:
    """A dataset of TFDS.

    Attributes:
      name: Its name, with its config if it has several: "glue/cola".
      host: The host of its files, probed before a download, because TFDS would try for minutes
        without a network; "" if it is unknown.
      module: The module that registers it, where TFDS itself does so only with TensorFlow.
    """

    name: str
    host: str = ""
    module: str = ""

    def splits(self) -> list[str]:
        """Returns the names of its splits; errors as for `open`."""
        return list(self._prepared().info.splits)

    def open(self, split: str) -> Sequence[Any]:
        """Opens a split, downloaded and prepared on first use; ConfigError if that fails."""
        return self._prepared().as_data_source(split)

    def _prepared(self) -> Any:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

        from zflora_jax.data.builders.prepared import cache_dir, prepared

        # TFDS reads its checksums through this backport of the standard library's module.
        sys.modules.setdefault("importlib_resources", importlib.resources)
        if self.module:
            importlib.import_module(f"tensorflow_datasets.text.{self.module}")
        make = functools.partial(tfds.builder, self.name, try_gcs=False)
        try:
            builder = make(data_dir=cache_dir(), file_format="array_record")
            if self.host and not builder.is_prepared():
                _require_network(self.host, f"{self.name!r} is not in {cache_dir()}")
            return prepared(make)
        except (
            ImportError,
            tfds.core.registered.DatasetNotFoundError,
            tfds.download.DownloadError,
            NonMatchingChecksumError,
        ) as error:
            raise ConfigError(
                f"the TFDS dataset {self.name!r} cannot be prepared: {error}"
            ) from error


def _require_network(host: str, missing: str) -> None:
    import requests

    try:
        requests.head(f"https://{host}", timeout=10)
    except requests.RequestException as error:
        raise ConfigError(
            f"the TFDS dataset {missing} and cannot be downloaded: no connection to {host}."
        ) from error


@dataclass(frozen=True)
class Hub:
    """A dataset of the Hugging Face hub: repository, config if it has several, revision (None:
    main).
    """

    name: str
    config: str | None = None
    revision: str | None = None

    def splits(self) -> list[str]:
        """Returns the names of its splits; ConfigError where they cannot be read."""
        return list(self._call("get_dataset_split_names"))

    def open(self, split: str) -> Sequence[Any]:
        """Opens a split; ConfigError where it cannot be read."""
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


class Public(NamedTuple):
    """The public dataset of a task: source, format of the rows, and names of the task's splits
    there.
    """

    source: Tfds | Hub
    format: str
    splits: Mapping[str, str]

    def open(self, split: str) -> Sequence[Row]:
        """Opens the rows of a split, a key of `splits`; ConfigError where it cannot be read."""
        raw = self.source.open(self.splits[split])
        rows = _converted(raw, self.source.name, FORMATS[self.format].rows)
        if self.format == "dialogue":
            return [reply for replies in rows for reply in replies]
        return Lazy(lambda i: rows[i][0], range(len(rows)))


def _converted(raw: Sequence[Any], name: str, read: Callable[[Raw, str], Any]) -> Sequence[Any]:
    return Lazy(lambda i: read(plain(raw[i]), f"{name}, row {i + 1}"), range(len(raw)))


_ALL = {"train": "train", "validation": "validation", "test": "test"}
_TEST_IS_VALIDATION = {"train": "train", "test": "validation"}
_ARC_HOST, _OPENBOOKQA_HOST = (
    f"{name}s3-us-west-2.amazonaws.com" for name in ("ai2-public-datasets.", "")
)
_GOOGLE, _GITHUB = "storage.googleapis.com", "raw.githubusercontent.com"
_WINOGRANDE = {"train": "train_xl", "test": "validation"}
# Converted by the hub: `datasets` no longer runs their loading scripts.
_XSUM, _DAILYDIALOG, _MULTIWOZ = (
    Hub(name, revision="refs/convert/parquet")
    for name in ("EdinburghNLP/xsum", "li2017dailydialog/daily_dialog", "pfb30/multi_woz_v22")
)

PUBLIC: dict[str, Public] = {
    "boolq": Public(Tfds("bool_q", _GOOGLE), "boolq", _TEST_IS_VALIDATION),
    "piqa": Public(Tfds("piqa", _GOOGLE), "piqa", _TEST_IS_VALIDATION),
    "arc_easy": Public(Tfds("ai2_arc/ARC-Easy", _ARC_HOST), "arc", _ALL),
    "arc_challenge": Public(Tfds("ai2_arc/ARC-Challenge", _ARC_HOST), "arc", _ALL),
    "openbookqa": Public(Tfds("openbookqa", _OPENBOOKQA_HOST), "openbookqa", _ALL),
    "hellaswag": Public(Tfds("hellaswag", _GITHUB, "hellaswag"), "hellaswag", _TEST_IS_VALIDATION),
    "winogrande": Public(Tfds("winogrande", _GOOGLE, "winogrande"), "winogrande", _WINOGRANDE),
    "gsm8k": Public(
        Tfds("gsm8k", _GITHUB, "gsm8k.gsm8k"), "gsm8k", {"train": "train", "test": "test"}
    ),
    # allenai/social_i_qa without its script.
    "social_i_qa": Public(Hub("lighteval/siqa"), "social_i_qa", _TEST_IS_VALIDATION),
    "cnn_dailymail": Public(Hub("abisee/cnn_dailymail", "3.0.0"), "summary", _ALL),
    "xsum": Public(_XSUM, "summary", _ALL),
    "samsum": Public(Hub("knkarthick/samsum"), "summary", _ALL),
    "dialogsum": Public(Hub("knkarthick/dialogsum"), "summary", _ALL),
    "dailydialog": Public(_DAILYDIALOG, "dialogue", _ALL),
    "multiwoz": Public(_MULTIWOZ, "dialogue", _ALL),
}

NAMED = ("hub:", "tfds:")  # the beginnings of a data.data_dir that names a dataset
HOW = (
    "hub:OWNER/NAME or tfds:NAME, with :CONFIG where it has several, and after it @ and a pattern"
    " where its splits have other names than train, validation and test, such as @{}_sft"
)
_NAME = re.compile(r"(hub|tfds):([^:@]+)(?::([^@]+))?(?:@(.*\{\}.*))?")


class Named(NamedTuple):
    """A dataset of the user's own rows: source, name pattern of its splits with {} for train,
    validation or test, and name for messages.
    """

    source: Tfds | Hub
    pattern: str
    name: str

    def open(self, split: str, form: str = "") -> Sequence[Row]:
        """Opens the rows of a split, of a form of `own.FORMS` or that of the first row; ConfigError
        if it cannot be read.
        """
        raw = self.source.open(split)
        require(len(raw) > 0, f"{self.name}: the split {split!r} is empty.")
        form = form or form_of(plain(raw[0]), f"{self.name}, {split}, row 1")

        def read(row: Raw, where: str) -> Row:
            return next(read_own([(where, row)], form))

        return _converted(raw, f"{self.name}, {split}", read)


def named_dataset(data_dir: str) -> Named:
    """Returns the dataset that a data.data_dir names; ConfigError where it names none."""
    found = _NAME.fullmatch(data_dir)
    if not found:
        raise ConfigError(f"data.data_dir={data_dir!r} names no dataset. Expected {HOW}.")
    library, name, config, pattern = found.groups()
    source = Hub(name, config) if library == "hub" else Tfds("/".join(filter(None, (name, config))))
    return Named(source, pattern or "{}", data_dir.partition("@")[0])
