"""Public datasets by name, for tasks without local files: TFDS where it prepares them without
TensorFlow (4.9.10), else the Hugging Face hub.

TFDS has builders of cnn_dailymail, xsum and samsum, but all three read their source files with
`tf.io.gfile`, so that preparing them needs TensorFlow, which this project does without (a test sees
to it that this is still so). xsum and samsum also need files that one fetches by hand; those of
samsum (train.json, val.json, test.json) are read from data.data_dir as they are. The hub is read
through `datasets`.

Rows are converted when read to the fields of the file builders, in LLM-Adapters' wording; `splits`
follow its files, whose test rows are the published validation rows wherever the published test rows
have no labels.
"""

from __future__ import annotations

import functools
import importlib
import importlib.resources
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from zflora_jax.core.fields import ConfigError
from zflora_jax.data.builders import cache_dir, open_prepared, prepared, wording
from zflora_jax.data.builders.wording import Fields

Raw = Mapping[str, Any]
TEST_IS_VALIDATION = {"train": "train", "test": "validation"}
ALL = {"train": "train", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class Tfds:
    """A dataset of TFDS.

    Attributes:
      name: of the dataset.
      host: probed first, to see whether there is a network; "": unknown.
      convert: a row of the dataset -> a row of the task.
      splits: split -> its name in the dataset.
      module: registers the dataset, where TFDS itself does so only with tensorflow.
    """

    name: str
    host: str
    convert: Callable[[Raw], Fields]
    splits: Mapping[str, str]
    module: str = ""

    def names(self) -> list[str]:
        """The names of its splits; prepared and refused as for `open`."""
        return list(self._prepared(prepared).info.splits)

    def open(self, split: str) -> Sequence[Fields]:
        """Open a split, downloaded and prepared under `cache_dir()` on first use.

        Raises:
          ConfigError: it cannot be downloaded or prepared.
        """
        rows = self._prepared(functools.partial(open_prepared, split=self.splits[split]))
        return Converted(rows, self.convert)

    def _prepared(self, how: Callable[..., Any]) -> Any:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

        # TFDS reads its checksums through this backport, which it does not install; the standard
        # library's has the same interface.
        sys.modules.setdefault("importlib_resources", importlib.resources)
        if self.module:
            importlib.import_module(self.module)
        make = functools.partial(tfds.builder, self.name, try_gcs=False)
        try:
            builder = make(data_dir=cache_dir(), file_format="array_record")
            if self.host and not builder.is_prepared():
                _require_network(self.host, self.name)
            return how(make)
        except (
            ImportError,
            tfds.core.registered.DatasetNotFoundError,
            tfds.download.DownloadError,
            NonMatchingChecksumError,
        ) as error:
            raise ConfigError(
                f"the TFDS dataset {self.name!r} cannot be prepared: {error}"
            ) from error


def _require_network(host: str, name: str) -> None:
    """ConfigError at once without a network; TFDS itself would try for minutes."""
    import requests

    try:
        requests.head(f"https://{host}", timeout=10)
    except requests.RequestException as error:
        raise ConfigError(
            f"the TFDS dataset {name!r} is not in {cache_dir()} and cannot be downloaded: no"
            f" connection to {host}."
        ) from error


@dataclass(frozen=True)
class Hub:
    """A dataset of the Hugging Face hub.

    Attributes:
      name: of the repository.
      convert: a row of the dataset -> a row of the task, or several (of a dialogue).
      splits: split -> its name in the dataset.
      config: of the dataset.
      revision: of the repository.
    """

    name: str
    convert: Callable[[Raw], Fields | list[Fields]]
    splits: Mapping[str, str]
    config: str | None = None
    revision: str | None = None

    def names(self) -> list[str]:
        """The names of its splits; ConfigError where they cannot be had."""
        return list(self._read("get_dataset_split_names", self.config))

    def open(self, split: str) -> Sequence[Fields]:
        """Open a split; ConfigError where that is not possible."""
        options = {"split": self.splits[split], "revision": self.revision}
        rows = self._read("load_dataset", self.config, **options)
        if self.convert is not _dialogue:
            return Converted(rows, self.convert)
        return [reply for row in rows for reply in _dialogue(row)]

    def _read(self, function: str, *given: Any, **options: Any) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ConfigError(
                f"the dataset {self.name!r} is read from the Hugging Face hub with `datasets`: pip"
                " install datasets"
            ) from error
        try:
            return getattr(datasets, function)(self.name, *given, **options)
        # Its errors (no network, no such dataset, no access, ...) have no common class.
        except Exception as error:
            raise ConfigError(
                f"the dataset {self.name!r} cannot be read from the Hugging Face hub:"
                f" {type(error).__name__}: {error}"
            ) from error


class Converted(Sequence[Fields]):
    """Rows that are converted when they are indexed."""

    def __init__(self, rows: Sequence[Any], convert: Callable[[Any], Any]) -> None:
        self._rows, self._convert = rows, convert

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Fields: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Fields]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._convert(self._rows[index])


# --- conversions ----------------------------------------------------------------------------------


def text(value: Any) -> str:
    """A field as str: TFDS gives bytes, `datasets` gives str."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _texts(row: Raw, *names: str) -> list[str]:
    return [text(row[name]) for name in names]


def _boolq(row: Raw) -> Fields:
    return wording.boolq(text(row["question"]), bool(row["answer"]))


def _piqa(row: Raw) -> Fields:
    return wording.piqa(text(row["goal"]), _texts(row, "sol1", "sol2"), int(row["label"]))


def _arc(row: Raw) -> Fields:
    """A row of ARC: the options in the file's order; the key is one of their labels."""
    labels = [int(label) for label in row["choices"]["label"]]
    return wording.answer_choice(
        text(row["question"]),
        [text(t) for t in row["choices"]["text"]],
        labels.index(int(row["answerKey"])),
    )


def _openbookqa(row: Raw) -> Fields:
    question = row["question"]
    return wording.answer_choice(
        text(question["stem"]),
        _texts(question, "choice_A", "choice_B", "choice_C", "choice_D"),
        int(row["answerKey"]),
    )


def _hellaswag(row: Raw) -> Fields:
    return wording.hellaswag(
        text(row["activity_label"]),
        text(row["context"]),
        [text(t) for t in row["endings"]],
        int(row["label"]),
    )


def _winogrande(row: Raw) -> Fields:
    return wording.winogrande(
        text(row["sentence"]), _texts(row, "option1", "option2"), int(row["label"])
    )


def _gsm8k(row: Raw) -> Fields:
    from zflora_jax.data.builders.formats import gsm8k_row

    return gsm8k_row(text(row["question"]), text(row["answer"]), "gsm8k")


def _social_i_qa(row: Raw) -> Fields:
    question = f"{text(row['context'])} {text(row['question'])}"
    return wording.answer_choice(
        question, _texts(row, "answerA", "answerB", "answerC"), int(row["label"]) - 1
    )


def _summary(what: str, source: str, target: str) -> Callable[[Raw], Fields]:
    return lambda row: wording.summary(what, text(row[source]).strip(), [text(row[target]).strip()])


def _dialogue(row: Raw) -> list[Fields]:
    turns = row["turns"]["utterance"] if "turns" in row else row["dialog"]
    return wording.replies(turns, unit=" ".join(turns[:2]))


_ARC_HOST = "ai2-public-datasets.s3-us-west-2.amazonaws.com"
# The hub's own conversion of datasets whose loading scripts `datasets` no longer runs
_SCRIPTLESS = "refs/convert/parquet"

PUBLIC: dict[str, Tfds | Hub] = {
    "boolq": Tfds("bool_q", "storage.googleapis.com", _boolq, TEST_IS_VALIDATION),
    "piqa": Tfds("piqa", "storage.googleapis.com", _piqa, TEST_IS_VALIDATION),
    "arc_easy": Tfds("ai2_arc/ARC-Easy", _ARC_HOST, _arc, ALL),
    "arc_challenge": Tfds("ai2_arc/ARC-Challenge", _ARC_HOST, _arc, ALL),
    "openbookqa": Tfds("openbookqa", "s3-us-west-2.amazonaws.com", _openbookqa, ALL),
    "hellaswag": Tfds(
        "hellaswag",
        "raw.githubusercontent.com",
        _hellaswag,
        TEST_IS_VALIDATION,
        "tensorflow_datasets.text.hellaswag",
    ),
    "winogrande": Tfds(
        "winogrande",
        "storage.googleapis.com",
        _winogrande,
        {"train": "train_xl", "test": "validation"},
        "tensorflow_datasets.text.winogrande",
    ),
    "gsm8k": Tfds(
        "gsm8k",
        "raw.githubusercontent.com",
        _gsm8k,
        {"train": "train", "test": "test"},
        "tensorflow_datasets.text.gsm8k.gsm8k",
    ),
    # allenai/social_i_qa without its script.
    "social_i_qa": Hub("lighteval/siqa", _social_i_qa, TEST_IS_VALIDATION),
    "cnn_dailymail": Hub(
        "abisee/cnn_dailymail", _summary("article", "article", "highlights"), ALL, config="3.0.0"
    ),
    "xsum": Hub(
        "EdinburghNLP/xsum", _summary("article", "document", "summary"), ALL, revision=_SCRIPTLESS
    ),
    "samsum": Hub("knkarthick/samsum", _summary("dialogue", "dialogue", "summary"), ALL),
    "dialogsum": Hub("knkarthick/dialogsum", _summary("dialogue", "dialogue", "summary"), ALL),
    "dailydialog": Hub("li2017dailydialog/daily_dialog", _dialogue, ALL, revision=_SCRIPTLESS),
    "multiwoz": Hub("pfb30/multi_woz_v22", _dialogue, ALL, revision=_SCRIPTLESS),
}
