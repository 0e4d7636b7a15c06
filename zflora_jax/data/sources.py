"""Where the rows of a task come from: files below `data.data_dir`, or a public dataset.

Splits without a file of their own are held out of the train file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from zflora_jax.core.fields import ConfigError, require

SPLITS = ("train", "validation", "test")
TABLES = (".json", ".jsonl", ".csv", ".parquet")  # kinds of files of rows
NAMED = ("hub:", "tfds:")  # what a data.data_dir begins with that names a dataset
HOW = (
    "hub:OWNER/NAME, hub:OWNER/NAME:CONFIG or tfds:NAME, and after it @ and a pattern where its"
    " splits have other names than train, validation and test, such as @{}_sft"
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
    fix += f" Files may be {', '.join(TABLES)}. Or name a dataset: {HOW}." if source.own else ""
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
    if source.own and any(tables_of(folder := path) for path in tried):
        return {"train": ("rows", folder)}
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
            for suffix in (TABLES if source.own else TABLES[:2])
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


def tables_of(folder: Path) -> list[Path]:
    """The files of rows in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLES)
