"""The settings of a run as a list: dotted name, allowed values, default and meaning of each.

The meaning of a setting is the string under its field in the dataclass. The help of the command
line and docs/settings.md are made from this list.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.run_config import RunConfig

TABLES = {"adapter.method": METHODS}  # settings whose values are the names of a table


@dataclass(frozen=True)
class Setting:
    """One setting of a run, as a user reads it."""

    name: str
    """Dotted, as `--set` takes it: adapter.rank."""
    allowed: str
    """Type, or the values that there are."""
    default: str
    """Value in `RunConfig()`."""
    meaning: str
    """One sentence or more."""


@dataclass(frozen=True)
class Section:
    """The settings of one dataclass."""

    name: str
    """adapter, data, ...; run for those without a dot."""
    title: str
    """The docstring of the dataclass."""
    settings: tuple[Setting, ...]


def sections() -> list[Section]:
    """All settings, by section, in the order in which `RunConfig` declares them."""
    run = RunConfig()
    nested = [f.name for f in dataclasses.fields(run) if _is_config(getattr(run, f.name))]
    return [
        _section("run", run),
        *(_section(name, getattr(run, name), f"{name}.") for name in nested),
    ]


def _section(name: str, config: Any, prefix: str = "") -> Section:
    hints = typing.get_type_hints(type(config))
    meanings = field_docs(type(config))
    listed = (f.name for f in dataclasses.fields(config) if not _is_config(getattr(config, f.name)))
    settings = tuple(
        Setting(
            prefix + f,
            " | ".join(TABLES.get(prefix + f, ())) or allowed(hints[f]),
            shown(getattr(config, f)),
            meanings.get(f, ""),
        )
        for f in listed
    )
    return Section(name, " ".join((type(config).__doc__ or "").split()), settings)


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value)


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a class, on one line; nothing where Python has no source."""
    try:
        source = inspect.getsource(cls)
    except OSError:
        return {}
    definition = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(source)).body[0])
    return dict(_documented(definition.body))


def _documented(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, below in itertools.pairwise(body):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                yield name, " ".join(text.split())


def allowed(hint: Any) -> str:
    """The values that a type hint admits, for a reader.

    >>> allowed(int | None), allowed(tuple[int, ...]), allowed(Literal["a", "b"])
    ('int | None', 'list of int', 'a | b')
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join("None" if a is type(None) else allowed(a) for a in args)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is tuple:
        return f"list of {allowed(args[0])}"
    return {str: "text", bool: "True | False"}.get(hint, hint.__name__)


def shown(value: Any) -> str:
    """A value as `--set` takes it."""
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
