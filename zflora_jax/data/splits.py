"""The splits of a task: opened from its files or dataset, or held out of the train rows."""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.data.joined import Joined
from zflora_jax.data.sources import NAMED, SPLITS, Source, find_files, named

# rows, at most a tenth of the train file, that stand in for a validation or test file that is not
# there
HOLD_OUT = 200


_OTHER = re.compile(r"[\W_]+")
_MARKS = re.compile(r"[\s?.!,;:'\"]+")  # not operators: "7 - 3" and "7 + 3" are two questions
Record = Mapping[str, Any]  # texts, as bytes or str, and lists of texts


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


def read_split(
    task: str,
    source: Source,
    split: str,
    data_dir: str | None,
    folders: Collection[str] = (),
    form: str = "",
    *,
    dataset: str = "",
) -> Split:
    """Open the rows of one split of a task.

    A validation or test split without a file is held out of the train file: HOLD_OUT rows, at most
    a tenth, which the train split then lacks. The choice is a fixed function of the question texts
    alone. It depends neither on data.seed, so that two runs are judged alike, nor on the order of
    the file, and equal questions (or rows of one dialogue) are always on the same side; a question
    of more rows than HOLD_OUT or a tenth stays in train where others are enough. The train split
    comes in that pseudo-random order, so that `train_limit` takes a sample; a test or
    validation file comes in its own order.

    Args:
      task: its name, for messages.
      source, split: where its rows come from, and one of SPLITS.
      data_dir: the user's folder or, of rows of one's own, the name of a dataset; None: the public
        dataset.
      folders: of all tasks, in lower case; files are not looked for in another task's folder.
      form: of rows of one's own (`builders.rows.FORMS`); "": recognised.
      dataset: the name of the public dataset; "": that of the task.

    Raises:
      ConfigError: there is no such file (the message lists the paths that were tried), it is not a
        file of the task, or it has too few rows to hold some out.
    """
    if source.own and (data_dir or "").startswith(NAMED):
        return _named(task, data_dir or "", split, form)
    if data_dir is None and source.public:
        return _public(task, dataset or task, source, split)
    files = find_files(task, source, data_dir, folders)
    if split != "train" and split in files:
        rows = _open_files(*files[split], form)
        return Split(rows, range(len(rows)), _names(files[split][1]))
    if "train" not in files:
        found = ", ".join(_names(paths) for _, paths in files.values())
        fix = f"The {split} split needs {_wanted(source, split)} there."
        if source.test_only:
            fix = (
                f"{source.origin} has none for this task, only test rows: train on another one,"
                " such as commonsense_170k, math_10k or gsm8k."
            )
        raise ConfigError(f"task {task!r}: no train file beside {found}. {fix}")
    rows = _open_files(*files["train"], form)
    held_out = [name for name in SPLITS[1:] if name not in files]
    return _part(task, rows, held_out, split, _names(files["train"][1]))


def _wanted(source: Source, split: str) -> str:
    """The names of the files that a split can be read from, for messages."""
    names = source.formats[0].names
    return " or ".join(
        f"{names[name][0]}.json(l)" for name in dict.fromkeys(("train", split)) if name in names
    )


def _open_files(builder: str, paths: Sequence[Path], form: str = "") -> Sequence[Record]:
    """The rows of files, one file after the other."""
    from zflora_jax.data.builders import open_prepared
    from zflora_jax.data.builders.files import SPLIT, file_config
    from zflora_jax.data.builders.formats import BUILDERS
    from zflora_jax.data.builders.rows import Rows

    make = Rows if builder == "rows" else BUILDERS[builder]
    parts = [
        open_prepared(functools.partial(make, config=file_config(path, form)), SPLIT)
        for path in paths
    ]
    return parts[0] if len(parts) == 1 else Joined(parts)


def _names(paths: Sequence[Path]) -> str:
    """Files, for messages: one by its path, more by their folder."""
    return str(paths[0]) if len(paths) == 1 else f"{len(paths)} files of {paths[0].parent}"


def _named(task: str, data_dir: str, split: str, form: str) -> Split:
    """A split of a dataset that data.data_dir names."""
    from zflora_jax.data.builders.named import named_dataset

    dataset = named_dataset(data_dir)
    names = named("rows", dataset.pattern).names
    there = dataset.splits()
    found = {key: name for key in SPLITS for name in names[key] if name in there}
    require(
        "train" in found or split in found,
        f"{dataset} has the splits {', '.join(there)}: none is {names['train'][0]!r}. Name them by"
        f" a pattern after @, such as {dataset}@{{}}_sft.",
    )
    rows = dataset.open(found[split] if split in found else found["train"], form)
    if split != "train" and split in found:
        return Split(rows, range(len(rows)), f"{dataset}, {found[split]}")
    held_out = [name for name in SPLITS[1:] if name not in found]
    return _part(task, rows, held_out, split, f"{dataset}, {found['train']}")


def _public(task: str, name: str, source: Source, split: str) -> Split:
    from zflora_jax.data.builders.public import PUBLIC

    dataset = PUBLIC[name]
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
    files = [split] if split != "train" else held_out
    require(
        len(parts[split]) > 0,
        f"task {task!r}: {origin} has {len(rows)} rows, too few different ones to hold out"
        f" {' and '.join(files)} (a tenth of them each; rows with the same question, and dialogues"
        f" that begin alike, stay together). Put {' and '.join(f'{f}.json(l)' for f in files)}"
        " beside it.",
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
    cut so that equal questions stay together. A question of more rows than a split should have
    stays in train, unless there are hardly any others.
    """
    keys = [hashlib.sha256(b"zflora hold-out\n" + question).digest() for question in questions]
    order = sorted(range(len(keys)), key=lambda i: (keys[i], i))
    size, rows = min(HOLD_OUT, len(order) // 10), Counter(keys)
    queue = [i for i in order if rows[keys[i]] <= size]
    if len(queue) < len(names):
        queue = order
    size = min(size, len(queue) // max(len(names), 1))
    parts: dict[str, list[int]] = {}
    start = 0
    for name in names:
        stop = min(start + size, len(queue))
        while size and 0 < stop < len(queue) and keys[queue[stop]] == keys[queue[stop - 1]]:
            stop += 1
        parts[name] = queue[start:stop]
        start = stop
    held_out = set(queue[:start])
    return parts | {"train": [i for i in order if i not in held_out]}
