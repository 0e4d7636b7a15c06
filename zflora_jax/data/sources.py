"""Where the rows of a task come from: files below `data.data_dir`, or a public dataset.

Splits without a file of their own are held out of the train file.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from zflora_jax.core.fields import ConfigError, require

SPLITS = ("train", "validation", "test")
# rows, at most a tenth of the train file, that stand in for a validation or test file that is not
# there
HOLD_OUT = 200

_OTHER = re.compile(r"[\W_]+")
_MARKS = re.compile(r"[\s?.!,;:'\"]+")  # not operators: "7 - 3" and "7 + 3" are two questions
Record = Mapping[str, Any]  # texts, as bytes or str, and lists of texts

LLM_ADAPTERS = "https://github.com/AGI-Edgerunners/LLM-Adapters, folder dataset/"
TRAINING_SETS = "https://github.com/AGI-Edgerunners/LLM-Adapters, folder ft-training_set/"


class Split(NamedTuple):
    """The rows of a split.

    Attributes:
      rows: random access to all rows of the file or dataset.
      indices: the rows of the split, in its order.
      origin: what they were read from, for messages.
    """

    rows: Sequence[Record]
    indices: Sequence[int]
    origin: str


@dataclass(frozen=True)
class Format:
    """Files of one format.

    Attributes:
      builder: the key of the builder in `data.builders.formats.BUILDERS`.
      names: split -> the names that its file may have, without .json or .jsonl.
    """

    builder: str
    names: Mapping[str, tuple[str, ...]]


def named(builder: str, pattern: str = "{}") -> Format:
    """A format whose files are called `pattern` with the split in place of {}.

    Args:
      builder: the key of the builder.
      pattern: "{}" stands for train, validation (or valid, val, validate, dev) or test.
    """
    words = {
        "train": ("train",),
        "validation": ("validation", "valid", "val", "validate", "dev"),
        "test": ("test",),
    }
    return Format(
        builder, {split: tuple(map(pattern.format, names)) for split, names in words.items()}
    )


@dataclass(frozen=True)
class Source:
    """Where the rows of a task come from.

    Attributes:
      folder: the folder of its files.
      formats: tried in this order for each split.
      anywhere: whether the files may also lie in the data_dir itself, if no such folder has any and
        it is not another task's folder.
      origin: where people get the files.
      public: whether there is a public dataset of the task's name.
      test_only: whether no training rows are published with it.
    """

    folder: str
    formats: tuple[Format, ...] = (named("local_json"),)
    anywhere: bool = False
    origin: str = LLM_ADAPTERS
    public: bool = False
    test_only: bool = False

    @property
    def expected(self) -> str:
        """The names of the files, for messages."""
        splits = ("test",) if self.test_only else SPLITS
        names = [
            f"{f.names[split][0]}.json(l)"
            for split in splits
            for f in self.formats[:1]
            if split in f.names
        ]
        return (
            f"{self.folder}/{{{','.join(names)}}}"
            if len(names) > 1
            else f"{self.folder}/{names[0]}"
        )


def read_split(
    task: str, source: Source, split: str, data_dir: str | None, folders: Collection[str] = ()
) -> Split:
    """Open the rows of one split of a task.

    A validation or test split without a file is held out of the train file: HOLD_OUT rows, at most
    a tenth, which the train split then lacks. The choice is a fixed function of the question texts
    alone. It depends neither on data.seed, so that two runs are judged alike, nor on the order of
    the file, and equal questions (or rows of one dialogue) are always on the same side. The train
    split comes in that pseudo-random order, so that `train_limit` takes a sample; a test or
    validation file comes in its own order.

    Args:
      task: its name, for messages.
      source: where its rows come from.
      split: one of SPLITS.
      data_dir: the user's folder; None: the public dataset.
      folders: of all tasks, in lower case; files are not looked for in another task's folder.

    Raises:
      ConfigError: there is no such file (the message lists the paths that were tried), it is not a
        file of the task, or it has too few rows to hold some out.
    """
    if data_dir is None and source.public:
        return _public(task, source, split)
    files = find_files(task, source, data_dir, folders)
    if split != "train" and split in files:
        rows = _open_file(*files[split])
        return Split(rows, range(len(rows)), str(files[split][1]))
    if "train" not in files:
        found = ", ".join(str(path) for _, path in files.values())
        wanted = " or ".join(
            f"{source.formats[0].names[name][0]}.json(l)"
            for name in dict.fromkeys(("train", split))
        )
        fix = f"The {split} split needs {wanted} there."
        if source.test_only:
            fix = (
                f"{source.origin} has none for this task, only test rows: train on another one,"
                " such as commonsense_170k, math_10k or gsm8k."
            )
        raise ConfigError(f"task {task!r}: no train file beside {found}. {fix}")
    rows = _open_file(*files["train"])
    held_out = [name for name in SPLITS[1:] if name not in files]
    return _part(task, rows, held_out, split, str(files["train"][1]))


def find_files(
    task: str, source: Source, data_dir: str | None, folders: Collection[str] = ()
) -> dict[str, tuple[str, Path]]:
    """Find the files of a task, in the first folder that has any.

    Args:
      task: its name, for messages.
      source: where its rows come from.
      data_dir: the user's folder or file.
      folders: of all tasks, in lower case.

    Returns:
      Split -> (builder, path) of each split that has a file.

    Raises:
      ConfigError: there is no file, or two for one split.
    """
    where = (
        "a directory with train.json(l) and, if you have them, validation.json(l) and test.json(l),"
        " or one such file"
    )
    if source.folder:
        holds = (
            f"the folder that holds {source.folder}/, or dataset/{source.folder}/, or"
            f" {source.folder} itself"
        )
        where = (
            f"{holds}, or, unless it is another task's folder, {where}"
            if source.anywhere
            else holds
        )
    fix = f"Set data.data_dir to (--data-dir) {where}."
    fix += f" The files ({source.expected}) come from {source.origin}." if source.folder else ""
    fix += " Or leave it unset: then the public dataset is downloaded." if source.public else ""
    if not data_dir:
        raise ConfigError(f"task {task!r} reads files, but data.data_dir is not set. {fix}")
    root = Path(data_dir).expanduser()
    require(root.exists(), f"task {task!r}: data.data_dir={data_dir!r} does not exist. {fix}")
    if root.is_file():
        require(source.anywhere, f"task {task!r}: data.data_dir={data_dir!r} is a file. {fix}")
        return {"train": (source.formats[0].builder, root)}
    tried = _folders(source, root, folders)
    for folder in tried:
        if files := {
            split: file for split in SPLITS if (file := _file(task, source, folder, split))
        }:
            return files
    listed = ", ".join(map(str, tried))
    raise ConfigError(
        f"task {task!r}: no train, validation or test file in data.data_dir={data_dir!r}. Tried:"
        f" {listed}. {fix}"
    )


def _folders(source: Source, root: Path, folders: Collection[str]) -> list[Path]:
    """The folders to search, the most specific first: AddSub/test.json is not a file of gsm8k, nor
    is a stray test.json beside gsm8k/.
    """
    below = (
        [
            root / prefix / source.folder
            for prefix in ("", "dataset", "llm_adapters/dataset", "llm_adapters")
        ]
        if source.folder
        else []
    )
    name = root.resolve().name.lower()
    own = name == source.folder.lower()
    anothers = bool(source.folder) and not own and name in folders
    return [*below, root] if own or (source.anywhere and not anothers) else below


def _file(task: str, source: Source, folder: Path, split: str) -> tuple[str, Path] | None:
    for form in source.formats:
        candidates = [
            folder / f"{name}{suffix}"
            for name in form.names.get(split, ())
            for suffix in (".json", ".jsonl")
        ]
        found = [path for path in candidates if path.is_file()]
        require(
            len(found) < 2,
            f"task {task!r}: both {' and '.join(path.name for path in found)} are in {folder}. Keep"
            " one of them.",
        )
        if found:
            return form.builder, found[0]
    return None


def _open_file(builder: str, path: Path) -> Sequence[Record]:
    from zflora_jax.data.builders import open_prepared
    from zflora_jax.data.builders.files import SPLIT, file_config
    from zflora_jax.data.builders.formats import BUILDERS

    return open_prepared(functools.partial(BUILDERS[builder], config=file_config(path)), SPLIT)


def _public(task: str, source: Source, split: str) -> Split:
    from zflora_jax.data.builders.public import PUBLIC

    dataset = PUBLIC[task]
    try:
        rows = dataset.open(split if split in dataset.splits else "train")
    except ConfigError as error:
        fix = (
            "Or read files: set data.data_dir (--data-dir) to the folder that holds"
            f" {source.folder}/; they come from {source.origin}."
        )
        raise ConfigError(f"task {task!r}: data.data_dir is not set, and {error} {fix}") from error
    if split != "train" and split in dataset.splits:
        return Split(rows, range(len(rows)), f"{dataset.name}, {split}")
    return _part(
        task,
        rows,
        [name for name in SPLITS[1:] if name not in dataset.splits],
        split,
        f"{dataset.name}, train",
    )


def _part(
    task: str, rows: Sequence[Record], held_out: Sequence[str], split: str, origin: str
) -> Split:
    """One split of a train file from which the splits `held_out` are taken; held-out rows that
    equal a train row except for case and punctuation are left out.
    """
    keys = [_key(rows[i]) for i in range(len(rows))]
    parts = _hold_out(keys, held_out)
    if split != "train":
        plain = [_MARKS.sub(" ", key.decode("utf-8", "replace").lower()).strip() for key in keys]
        trained = {plain[i] for i in parts["train"]}
        parts[split] = [i for i in parts[split] if plain[i] not in trained]
    require(
        len(parts[split]) > 0,
        f"task {task!r}: {origin} has {len(rows)} rows, too few different ones to hold out a"
        f" {split} split (a tenth of them). Put {split}.json or {split}.jsonl beside it.",
    )
    return Split(rows, parts[split], origin)


def normalise(text: str) -> str:
    """Lower-case a text and turn every run of other characters than letters and digits into one
    space.

    It errs on the side of equality: questions that differ only in operators or signs ("7 - 3", "7 *
    3") become equal.
    """
    return _OTHER.sub(" ", text.lower()).strip()


def _key(row: Record) -> bytes:
    """The text that is kept on one side of a hold-out: the dialogue of a row, or the question."""
    parts = [row["unit"]] if "unit" in row else [row["instruction"], row.get("input") or b""]
    return b"\n".join(part if isinstance(part, bytes) else part.encode() for part in parts if part)


def _hold_out(questions: Sequence[bytes], names: Sequence[str]) -> dict[str, list[int]]:
    """The indices of "train" and of each split in `names`: rows sorted by a hash of the question,
    cut so that equal questions stay together.
    """
    keys = [hashlib.sha256(b"zflora hold-out\n" + question).digest() for question in questions]
    order = sorted(range(len(keys)), key=lambda i: (keys[i], i))
    size = min(HOLD_OUT, len(order) // 10)
    parts: dict[str, list[int]] = {}
    start = 0
    for name in names:
        stop = min(start + size, len(order))
        while size and 0 < stop < len(order) and keys[order[stop]] == keys[order[stop - 1]]:
            stop += 1
        parts[name] = order[start:stop]
        start = stop
    return parts | {"train": order[start:]}
