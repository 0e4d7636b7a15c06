"""The splits of a task: opened from its files or dataset, or held out of the train rows."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.core.storage import is_url
from zflora_jax.data.builders.files import table_rows
from zflora_jax.data.builders.generated import generate
from zflora_jax.data.builders.own import read_rows
from zflora_jax.data.builders.public import HOW, NAMED, PUBLIC, Dataset, named_dataset
from zflora_jax.data.task import SPLIT_WORDS, SPLITS, Task

TABLES = (".json", ".jsonl", ".csv", ".parquet")  # suffixes of files of rows
HOLD_OUT = 200  # rows of train, at most a tenth, for a missing validation or test file

_PART = r"[-_.](\d+)(?:[-_.]of[-_.](\d+)(?:[-_.][0-9a-f]{8,})?)?"  # train-00000-of-00002
_WORDS = "|".join(word for words in SPLIT_WORDS.values() for word in words)
_MARKS = re.compile(r"[\s?.!,;:'\"]+")  # not operators: "7 - 3" and "7 + 3" are two questions
Row = Mapping[str, Any]
_Places = dict[str, tuple[str, Callable[[], Sequence[Row]]]]  # split -> its name, opens its rows


class Split(NamedTuple):
    """A split of a file or dataset."""

    rows: Sequence[Row]  # all of the file
    indices: Sequence[int]  # those of the split, in its order
    origin: str  # the name of the file or dataset


def open_split(task: Task, split: str, data: DataConfig) -> Split:
    """Opens the rows of one split of a task.

    A validation or test split without a file is held out of the train file: HOLD_OUT rows, at most
    a tenth, by a fixed function of the question texts. Equal questions (or rows of one dialogue)
    are on the same side; a question with more rows than a split should have stays in train if the
    others are enough. The train split is in the order of these hashes, so that `train_limit` takes
    a sample; a test or validation file keeps its order.

    Raises:
      ConfigError: There is no such file (the message lists the paths that were tried), it is not a
        file of the task, or it has too few rows to hold some out.
    """
    places = _places(task, data)
    whole = split in places and (split != "train" or task.source == "generated")
    if not whole:
        _require_train(task, split, places)
    origin, read = places[split if whole else "train"]
    rows = read()
    if whole:
        return Split(rows, range(len(rows)), origin)
    held_out = [name for name in SPLITS[1:] if name not in places]
    return Split(rows, _part(task, rows, held_out, split, origin), origin)


def _places(task: Task, data: DataConfig) -> _Places:
    from zflora_jax.data.builders.prepared import open_rows  # imports TFDS, which takes seconds

    if task.source == "generated":
        make = partial(generate, task.name)
        return {x: (f"{task.name}, {x}", partial(open_rows, task.name, make, x)) for x in SPLITS}
    form = (data.row_format or "") if task.own else ""
    dataset = PUBLIC.get(task.dataset) if data.data_dir is None else None
    if task.own and (data.data_dir or "").startswith(NAMED):
        dataset = named_dataset(data.data_dir or "", form)
    if dataset:
        return {
            split: (f"{dataset.source.name}, {there}", partial(_open, task, dataset, split))
            for split, there in dataset.splits.items()
        }
    places: _Places = {}
    for split, (format, paths) in find_files(task, data.data_dir).items():
        name = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files of {paths[0].parent}"
        read = partial(_read_files, format or form, paths)
        places[split] = name, partial(open_rows, format or form or "own", read, "rows", paths)
    return places


def _read_files(format: str, paths: Sequence[Path]) -> dict[str, Any]:
    return {"rows": [row for path in paths for row in read_rows(table_rows(path), format)]}


def _open(task: Task, dataset: Dataset, split: str) -> Sequence[Row]:
    try:
        return dataset.open(split)
    except ConfigError as error:
        or_files = "" if task.own else f" Or read files. {_fix(task, or_unset=False)}"
        raise ConfigError(f"task {task.name!r}: {error}{or_files}") from error


def _require_train(task: Task, split: str, places: _Places) -> None:
    names = task.files[0].names
    wanted = [f"{names[x][0]}.json(l)" for x in dict.fromkeys(("train", split)) if x in names]
    require(
        "train" in places,
        f"task {task.name!r}: no train file next to {', '.join(x for x, _ in places.values())}. The"
        f" {split} split needs {' or '.join(wanted)} there. Or train on another task: many have"
        " only published test rows.",
    )


# --- hold-outs ------------------------------------------------------------------------------------


def _part(
    task: Task, rows: Sequence[Row], held_out: Sequence[str], split: str, origin: str
) -> list[int]:
    """Returns the rows of one split of a train file, without held-out rows that equal a train row
    except for case and punctuation.
    """
    keys = [_key(row) for row in rows]
    parts = _hold_out([key.encode() for key in keys], held_out)
    if split != "train":
        simple = [_MARKS.sub(" ", key.lower()).strip() for key in keys]
        trained = {simple[i] for i in parts["train"]}
        parts[split] = [i for i in parts[split] if simple[i] not in trained]
    missing = [split] if split != "train" else held_out
    require(
        len(parts[split]) > 0,
        f"task {task.name!r}: {origin} has {len(rows)} rows, too few different ones to hold out"
        f" {' and '.join(missing)} (a tenth of them each; rows with the same question, and"
        " dialogues with the same beginning, stay together). Put"
        f" {' and '.join(f'{name}.json(l)' for name in missing)} next to it.",
    )
    return parts[split]


def _key(row: Row) -> str:
    """Returns the text that keeps rows on one side of a hold-out: the dialogue's, or a question."""
    if "unit" in row:
        return row["unit"]
    return "\n".join(filter(None, (row["prompt"], row.get("input"))))


def _hold_out(questions: Sequence[bytes], names: Sequence[str]) -> dict[str, list[int]]:
    """Returns the indices of "train" and of each split in `names`: rows sorted by a hash of the
    question, cut where it changes. A question with more rows than a split should have stays in
    train, unless there are hardly any others.
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


# --- files ----------------------------------------------------------------------------------------

Found = tuple[str, tuple[Path, ...]]  # format, files


def find_files(task: Task, data_dir: str | None) -> dict[str, Found]:
    """Finds the files of a task: split -> (format, paths) of each split that has a file.

    Files of a published task are in a folder of its name, below data_dir or data_dir itself. The
    user's rows are in data_dir, whole or in parts ("train-00000-of-00002.parquet"), or data_dir is
    a file of training rows. ConfigError if there are no files, or their split is unclear.
    """
    place = f"task {task.name!r}: data.data_dir={data_dir!r}"
    require(data_dir is not None, f"{place} is not set, and the task reads files. {_fix(task)}")
    require(
        not is_url(data_dir or ""),
        f"{place} is a URL, and rows are only read from local files. Copy them to each machine"
        " (gcloud storage cp -r, aws s3 cp --recursive) or mount the bucket (gcsfuse, mount-s3),"
        " and give that directory.",
    )
    root = Path(data_dir or "").expanduser()
    require(root.exists(), f"{place} does not exist. {_fix(task)}")
    if root.is_file():
        require(task.own, f"{place} is a file. {_fix(task)}")
        return {"train": (task.files[0].format, (root,))}
    prefixes = ("", "dataset", "llm_adapters/dataset", "llm_adapters")
    tried = [] if task.own else [root / prefix / task.folder for prefix in prefixes]
    if task.own or root.resolve().name.lower() == task.folder.lower():
        tried.append(root)
    for folder in tried:
        if files := _files(task, folder):
            return files
    raise ConfigError(
        f"{place} has no train, validation or test file. Tried: {', '.join(map(str, tried))}."
        f" {_fix(task)}"
    )


def _files(task: Task, folder: Path) -> dict[str, Found]:
    """Returns the files of each split in a folder; ConfigError if that is unclear."""
    tables = sorted(path for path in folder.glob("*") if path.suffix.lower() in TABLES)
    part = f"(?:{_PART})?" if task.own else ""
    found: dict[str, Found] = {}
    for split, files in itertools.product(SPLITS, task.files):
        names = files.names.get(split, ())
        stem = re.compile(f"(?:{'|'.join(map(re.escape, names))}){part}")
        paths = tuple(path for path in tables if stem.fullmatch(path.stem))
        require(
            len(paths) < 2 or all(path.stem not in names for path in paths),
            f"task {task.name!r}: {folder} has {' and '.join(path.name for path in paths)} for one"
            " split. Keep one of them, or only parts (train-1.jsonl, train-2.jsonl).",
        )
        if paths and paths[0].stem not in names:
            parts = [m.group(1, 2) for path in paths if (m := stem.fullmatch(path.stem))]
            _require_all_parts(f"task {task.name!r}: {folder}", paths, parts)
        if paths:
            found.setdefault(split, (files.format, paths))
    named = {path for _, paths in found.values() for path in paths}
    unread = re.compile(rf"(?:{_WORDS})\b.*\.(?:gz|bz2|xz|zst|zip|arrow|tsv|orc)", re.IGNORECASE)
    others = [path.name for path in tables if path not in named]
    # Not the archive that a split was unpacked from.
    there = tuple(f"{path.name.partition('.')[0]}." for path in named)
    others += sorted(
        path.name
        for path in folder.glob("*")
        if unread.fullmatch(path.name) and not path.name.startswith(there)
    )
    require(
        not (task.own and found and others),
        f"task {task.name!r}: {folder} has {', '.join(sorted(path.name for path in named))}, which"
        f" are splits, and {', '.join(others)}, which belong to no readable split. Name these as"
        f" parts of a split (train-1.jsonl; {', '.join(TABLES)}), or move them elsewhere.",
    )
    return found


def _require_all_parts(
    place: str, paths: Sequence[Path], parts: Sequence[tuple[str | Any, ...]]
) -> None:
    """Raises ConfigError if one of the parts (number, "of" number) is missing or there twice."""
    numbers, totals = sorted(int(number) for number, _ in parts), {total for _, total in parts}
    twice = sorted({n for n in numbers if numbers.count(n) > 1})
    wrong = twice
    if len(totals) == 1 and (total := totals.pop()):
        first = int(numbers[0] == 1 and numbers[-1] == int(total))
        wrong = sorted({*twice, *({*range(first, first + int(total))} ^ {*numbers})})
    require(
        not wrong and not totals,
        f"{place} has {', '.join(path.name for path in paths)}, which are not all parts of one"
        f" split, each once{': see ' * bool(wrong)}{', '.join(map(str, wrong[:9]))}. Add what is"
        " missing, and move the rest elsewhere.",
    )


def _fix(task: Task, or_unset: bool = True) -> str:
    """Returns advice about data.data_dir, for messages."""
    if task.own:
        return (
            "Set data.data_dir to (--data-dir) a file, or a directory with a file train and, if you"
            f" have them, validation and test. Files may be {', '.join(TABLES)}. Or name a dataset:"
            f" {HOW}."
        )
    names = task.files[0].names
    files = ", ".join(f"{names[split][0]}.json(l)" for split in SPLITS if split in names)
    unset = " Or leave it unset: then the public dataset is downloaded."
    return (
        f"Set data.data_dir to (--data-dir) the folder that holds {task.folder}/, or"
        f" dataset/{task.folder}/, or {task.folder} itself. The files"
        f" ({task.folder}/{{{files}}}) come from {task.origin}."
        f"{unset if or_unset and task.dataset in PUBLIC else ''}"
    )
