"""The files that a task's rows come from, found below data.data_dir."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.data.task import SPLITS, Task

TABLES = (".json", ".jsonl", ".csv", ".parquet")  # suffixes of files of rows
NAMED = ("hub:", "tfds:")  # the beginnings of a data.data_dir that names a dataset
HOW = (
    "hub:OWNER/NAME or tfds:NAME, with :CONFIG where it has several, and after it @ and a pattern"
    " where its splits have other names than train, validation and test, such as @{}_sft"
)

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
    """Refuses files of the user's own rows that are of no split."""
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
