"""The splits of a task: opened from its files or dataset, or held out of the train rows."""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.builders.files import table_rows
from zflora_jax.data.builders.generated import generate
from zflora_jax.data.builders.own import read_own
from zflora_jax.data.builders.public import HOW, NAMED, PUBLIC, named_dataset
from zflora_jax.data.builders.published import read_file
from zflora_jax.data.lazy import Joined
from zflora_jax.data.task import SPLIT_WORDS, SPLITS, Task

TABLES = (".json", ".jsonl", ".csv", ".parquet")  # suffixes of files of rows
HOLD_OUT = 200  # rows of train, at most a tenth, for a missing validation or test file

_OTHER = re.compile(r"[\W_]+")
_MARKS = re.compile(r"[\s?.!,;:'\"]+")  # not operators: "7 - 3" and "7 + 3" are two questions
Row = Mapping[str, Any]


class Split(NamedTuple):
    """All rows of a file or dataset, the indices of those in the split, in its order, and the
    origin's name.
    """

    rows: Sequence[Row]
    indices: Sequence[int]
    origin: str


# Split -> (what messages call it, the function that opens its rows)
_Places = dict[str, tuple[str, Callable[[], Sequence[Row]]]]


def open_split(task: Task, split: str, data: DataConfig) -> Split:
    """Opens the rows of one split of a task.

    A validation or test split without a file is held out of the train file: HOLD_OUT rows, at most
    a tenth, which the train split then lacks. The choice is a fixed function of the question texts,
    not of data.seed or the order of the file. Equal questions (or rows of one dialogue) are on the
    same side; a question with more rows than a split should have stays in train where others are
    enough. The train split comes in that pseudo-random order, so that `train_limit` takes a sample;
    a test or validation file comes in its own order.

    Raises:
      ConfigError: There is no such file (the message lists the paths that were tried), it is not a
        file of the task, or it has too few rows to hold some out.
    """
    form = (data.row_format or "") if task.own else ""
    if task.source == "generated":
        places = _generated(task.name)
    elif task.own and (data.data_dir or "").startswith(NAMED):
        places = _named(data.data_dir or "", form)
    elif data.data_dir is None and task.dataset in PUBLIC:
        places = _public(task)
    else:
        files = find_files(task, data.data_dir, public=task.dataset in PUBLIC)
        places = {name: _rows_of(*found, form) for name, found in files.items()}
    if split in places and (split != "train" or task.source == "generated"):
        origin, read = places[split]
        rows = read()
        return Split(rows, range(len(rows)), origin)
    _require_train(task, split, places)
    origin, read = places["train"]
    rows = read()
    held_out = [name for name in SPLITS[1:] if name not in places]
    return Split(rows, _part(task, rows, held_out, split, origin), origin)


def _generated(name: str) -> _Places:
    from zflora_jax.data.builders.prepared import open_rows

    make = partial(generate, name)
    return {x: (f"{name}, {x}", partial(open_rows, name, make, x)) for x in SPLITS}


def _named(data_dir: str, form: str) -> _Places:
    dataset = named_dataset(data_dir)
    there = dataset.source.splits()
    wanted = {split: map(dataset.pattern.format, words) for split, words in SPLIT_WORDS.items()}
    found = {split: name for split, names in wanted.items() for name in names if name in there}
    require(
        bool(found),
        f"{dataset.name} has the splits {', '.join(there)}: none is"
        f" {dataset.pattern.format('train')!r}. Name them by a pattern after @, such as"
        f" {dataset.name}@{{}}_sft.",
    )
    return {
        split: (f"{dataset.name}, {name}", partial(dataset.open, name, form))
        for split, name in found.items()
    }


def _public(task: Task) -> _Places:
    dataset = PUBLIC[task.dataset]

    def read(split: str) -> Sequence[Row]:
        try:
            return dataset.open(split)
        except ConfigError as error:
            raise ConfigError(
                f"task {task.name!r}: data.data_dir is not set, and {error} Or read files: set"
                f" data.data_dir (--data-dir) to the folder that holds {task.folder}/; they come"
                f" from {task.origin}."
            ) from error

    return {x: (f"{dataset.source.name}, {x}", partial(read, x)) for x in dataset.splits}


def _rows_of(
    format: str, paths: Sequence[Path], form: str
) -> tuple[str, Callable[[], Sequence[Row]]]:
    """Returns the name and the rows of files; several are called by their folder."""
    from zflora_jax.data.builders.prepared import open_rows

    def rows(path: Path) -> dict[str, Any]:
        own = format == "own"
        return {"rows": read_own(table_rows(path), form) if own else read_file(path, format)}

    def read() -> Sequence[Row]:
        name = f"{format}-{form}" if form else format
        return Joined([open_rows(name, partial(rows, path), "rows", file=path) for path in paths])

    return str(paths[0]) if len(paths) == 1 else f"{len(paths)} files of {paths[0].parent}", read


def _require_train(task: Task, split: str, places: _Places) -> None:
    names = task.files[0].names
    wanted = [f"{names[x][0]}.json(l)" for x in dict.fromkeys(("train", split)) if x in names]
    found = ", ".join(origin for origin, _ in places.values())
    require(
        "train" in places,
        f"task {task.name!r}: no train file beside {found}. The {split} split needs"
        f" {' or '.join(wanted)} there. Or train on another task: many have only published test"
        " rows.",
    )


def _part(
    task: Task, rows: Sequence[Row], held_out: Sequence[str], split: str, origin: str
) -> list[int]:
    """Returns the rows of one split of a train file. Held-out rows that equal a train row except
    for case and punctuation are left out.
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
        " dialogues that begin alike, stay together). Put"
        f" {' and '.join(f'{name}.json(l)' for name in missing)} beside it.",
    )
    return parts[split]


# --- hold-outs ---


def normalise(text: str) -> str:
    """Returns a text in lower case with one space for every run of other characters than letters
    and digits. Questions that differ only in operators ("7 - 3", "7 * 3") become equal.
    """
    return _OTHER.sub(" ", text.lower()).strip()


def _key(row: Row) -> str:
    """Returns the text that is kept on one side of a hold-out: of a dialogue, or the question."""
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


def find_files(task: Task, data_dir: str | None, public: bool = False) -> dict[str, Found]:
    """Finds the files of a task: split -> (format, paths) of each split that has a file.

    Files of a published task are in a folder of its name, below data_dir or data_dir itself. The
    user's own rows are in data_dir, whole or in parts ("train-00000-of-00002.parquet"), or data_dir
    is a file of training rows. `public`: whether there is a public dataset, for messages.

    Raises:
      ConfigError: There is no file, two for one split, or one of the user's own that is of no
        split.
    """
    fix = _fix(task, public)
    if not data_dir:
        raise ConfigError(f"task {task.name!r} reads files, but data.data_dir is not set. {fix}")
    root = Path(data_dir).expanduser()
    require(root.exists(), f"task {task.name!r}: data.data_dir={data_dir!r} does not exist. {fix}")
    if root.is_file():
        require(task.own, f"task {task.name!r}: data.data_dir={data_dir!r} is a file. {fix}")
        return {"train": (task.files[0].format, (root,))}
    prefixes = ("", "dataset", "llm_adapters/dataset", "llm_adapters")
    tried = [] if task.own else [root / prefix / task.folder for prefix in prefixes]
    if task.own or root.resolve().name.lower() == task.folder.lower():
        tried.append(root)
    for folder in tried:
        files = {split: found for split in SPLITS if (found := _files(task, folder, split))}
        if files:
            _require_all(task, folder, files)
            return files
    raise ConfigError(
        f"task {task.name!r}: no train, validation or test file in data.data_dir={data_dir!r}."
        f" Tried: {', '.join(map(str, tried))}. {fix}"
    )


def _fix(task: Task, public: bool) -> str:
    """Says what data.data_dir has to be."""
    if task.own:
        return (
            "Set data.data_dir to (--data-dir) a file, or a directory with a file train and, if you"
            f" have them, validation and test. Files may be {', '.join(TABLES)}. Or name a dataset:"
            f" {HOW}."
        )
    names = task.files[0].names
    files = ", ".join(f"{names[split][0]}.json(l)" for split in SPLITS if split in names)
    return (
        f"Set data.data_dir to (--data-dir) the folder that holds {task.folder}/, or"
        f" dataset/{task.folder}/, or {task.folder} itself. The files"
        f" ({task.folder}/{{{files}}}) come from {task.origin}."
    ) + (" Or leave it unset: then the public dataset is downloaded." if public else "")


def _files(task: Task, folder: Path, split: str) -> Found | None:
    for files in task.files:
        names, suffixes = files.names.get(split, ()), TABLES if task.own else TABLES[:2]
        candidates = [folder / f"{name}{suffix}" for name in names for suffix in suffixes]
        paths = [path for path in candidates if path.is_file()]
        require(
            len(paths) < 2,
            f"task {task.name!r}: both {' and '.join(path.name for path in paths)} are in {folder}."
            " Keep one of them.",
        )
        if task.own and not paths:
            parts = re.compile(rf"({'|'.join(names)})[-_.]\d.*")
            paths = [path for path in _tables(folder) if parts.fullmatch(path.stem)]
        if paths:
            return files.format, tuple(paths)
    return None


def _tables(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLES)


def _require_all(task: Task, folder: Path, files: dict[str, Found]) -> None:
    named = {path for _, paths in files.values() for path in paths}
    others = [path.name for path in _tables(folder) if path not in named]
    require(
        not (task.own and others),
        f"task {task.name!r}: {folder} has {', '.join(sorted(path.name for path in named))}, which"
        f" are splits, and {', '.join(others)}, which are of none. Name these as parts of a split"
        " (train-1.jsonl; not beside a train.jsonl), or move them elsewhere.",
    )


def files_digest(paths: Iterable[Path]) -> str:
    """Returns a hash of the names and bytes of files, in their order."""
    found = [
        (path.name, _digest(path, path.stat().st_size, path.stat().st_mtime_ns)) for path in paths
    ]
    return hashlib.sha256(repr(found).encode()).hexdigest()


@functools.lru_cache(maxsize=4096)  # a sweep asks for each of its runs
def _digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
