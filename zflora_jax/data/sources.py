"""Where the rows of a task come from: files below `data.data_dir`, or a public dataset.

Splits without a file of their own are held out of the train file.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from zflora_jax.core.fields import ConfigError, require

SPLITS = ("train", "validation", "test")
TABLES = (".json", ".jsonl", ".csv", ".parquet")  # kinds of files of rows
NAMED = ("hub:", "tfds:")  # what a data.data_dir begins with that names a dataset
HOW = (
    "hub:OWNER/NAME or tfds:NAME, with :CONFIG where it has several, and after it @ and a pattern"
    " where its splits have other names than train, validation and test, such as @{}_sft"
)

LLM_ADAPTERS = "https://github.com/AGI-Edgerunners/LLM-Adapters, folder dataset/"
TRAINING_SETS = "https://github.com/AGI-Edgerunners/LLM-Adapters, folder ft-training_set/"


@dataclass(frozen=True)
class Format:
    """Files of one format.

    Attributes:
      builder: the key of the builder in `data.builders.formats.BUILDERS`.
      names: split -> the names that its file may have, without .json or .jsonl.
    """

    builder: str
    names: Mapping[str, tuple[str, ...]]


_WORDS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "validate", "dev"),
    "test": ("test",),
}


def named(builder: str, pattern: str = "{}") -> Format:
    """A format whose files are called `pattern` with the split in place of {}.

    Args:
      builder: the key of the builder.
      pattern: "{}" stands for train, validation (or valid, val, validate, dev) or test.
    """
    return Format(
        builder, {split: tuple(map(pattern.format, names)) for split, names in _WORDS.items()}
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
    def own(self) -> bool:
        """Whether its rows are of the user's own forms, in files of any name and kind."""
        return self.formats[0].builder == "rows"

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


def find_files(
    task: str, source: Source, data_dir: str | None, folders: Collection[str] = ()
) -> dict[str, tuple[str, tuple[Path, ...]]]:
    """Find the files of a task, in the first folder that has any.

    Args:
      task: its name, for messages.
      source: where its rows come from.
      data_dir: the user's folder or file.
      folders: of all tasks, in lower case.

    Returns:
      Split -> (builder, paths) of each split that has a file; several where rows of one's own are
      in parts ("train-00000-of-00002.parquet") or in files of other names.

    Raises:
      ConfigError: there is no file, or two for one split, or one of one's own that is of no split,
        or of which one its name only hints at.
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
    fix += f" Files may be {', '.join(TABLES)}. Or name a dataset: {HOW}." if source.own else ""
    if not data_dir:
        raise ConfigError(f"task {task!r} reads files, but data.data_dir is not set. {fix}")
    root = Path(data_dir).expanduser()
    require(root.exists(), f"task {task!r}: data.data_dir={data_dir!r} does not exist. {fix}")
    if root.is_file():
        require(source.anywhere, f"task {task!r}: data.data_dir={data_dir!r} is a file. {fix}")
        return {"train": (source.formats[0].builder, (root,))}
    tried = _folders(source, root, folders)
    for folder in tried:
        found = {split: _file(task, source, folder, split) for split in SPLITS}
        if files := {split: file for split, file in found.items() if file}:
            return _with_all(task, folder, files) if source.own else files
    if source.own and any(tables := tables_of(folder) for folder in tried):
        _require_no_split(task, tables)
        return {"train": ("rows", tuple(tables))}
    listed = ", ".join(map(str, tried))
    raise ConfigError(
        f"task {task!r}: no train, validation or test file in data.data_dir={data_dir!r}. Tried:"
        f" {listed}. {fix}"
    )


def files_digest(paths: Iterable[Path]) -> str:
    """A hash of the names and bytes of files, in their order."""
    found = [(path.name, _digest(path, *_stamp(path))) for path in paths]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=4096)  # a sweep asks for each of its runs
def _digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _file(
    task: str, source: Source, folder: Path, split: str
) -> tuple[str, tuple[Path, ...]] | None:
    for form in source.formats:
        names = form.names.get(split, ())
        suffixes = TABLES if source.own else TABLES[:2]
        candidates = [folder / f"{name}{suffix}" for name in names for suffix in suffixes]
        found = [path for path in candidates if path.is_file()]
        require(
            len(found) < 2,
            f"task {task!r}: both {' and '.join(path.name for path in found)} are in {folder}. Keep"
            " one of them.",
        )
        parts = re.compile(rf"({'|'.join(map(re.escape, names))})[-_.]\d.*")
        if source.own and not found:
            found = [path for path in tables_of(folder) if parts.fullmatch(path.stem)]
        if found:
            return form.builder, tuple(found)
    return None


def _with_all(
    task: str, folder: Path, files: dict[str, tuple[str, tuple[Path, ...]]]
) -> dict[str, tuple[str, tuple[Path, ...]]]:
    """`files`, if they are all that the folder has; no row is left out in silence."""
    named = {path for _, paths in files.values() for path in paths}
    others = [path.name for path in tables_of(folder) if path not in named]
    require(
        not others,
        f"task {task!r}: {folder} has {', '.join(sorted(path.name for path in named))}, which are"
        f" splits, and {', '.join(others)}, which are of none. Name these as parts of a split"
        " (train-1.jsonl; not beside a train.jsonl), or move them elsewhere.",
    )
    return files


def _require_no_split(task: str, tables: list[Path]) -> None:
    """Refuse files that would all be trained on, where a name says that one is for evaluation."""
    held_out = {*_WORDS["validation"], *_WORDS["test"], "testing", "eval", "evaluation"}
    found = [x.name for x in tables if held_out & set(re.findall("[a-z]+", x.stem.lower()))]
    require(
        not found,
        f"task {task!r}: all files of {tables[0].parent} would be the train split, and"
        f" {', '.join(found)} may be meant for evaluation. Name the files train, validation and"
        " test, or give the file to train on itself.",
    )


def tables_of(folder: Path) -> list[Path]:
    """The files of rows in a folder, by name; none where it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLES)
