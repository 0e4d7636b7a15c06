"""The settings of a run as a list: dotted name, allowed values, default and meaning of each.

The help of the command line and docs/settings.md are made from this list.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import types
import typing
from typing import Any, Literal, NamedTuple

from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.run_config import RunConfig

TABLES = {"adapter.method": METHODS}  # settings whose values are the names of a table


class Setting(NamedTuple):
    """One setting: its dotted name, its type or possible values, its default, and the string under
    its field in the dataclass.
    """

    name: str
    allowed: str
    default: str
    meaning: str


class Section(NamedTuple):
    """The settings of one dataclass, in the order of declaration; those without a dot are "run"."""

    name: str
    title: str
    settings: tuple[Setting, ...]


def sections() -> list[Section]:
    """All settings, by section, in the order in which `RunConfig` declares them."""
    run = RunConfig()
    values = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
    nested = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
    return [_section("run", run), *(_section(name, value) for name, value in nested.items())]


def _section(section: str, config: Any) -> Section:
    cls, settings = type(config), []
    hints, meanings = typing.get_type_hints(cls), field_docs(cls)
    for name, hint in hints.items():
        value = getattr(config, name)
        if not dataclasses.is_dataclass(value):
            dotted = name if section == "run" else f"{section}.{name}"
            values = " | ".join(TABLES.get(dotted, ())) or allowed(hint)
            default = f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
            settings.append(Setting(dotted, values, default, meanings.get(name, "")))
    return Section(section, " ".join((cls.__doc__ or "").split()), tuple(settings))


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a class, on one line; nothing where Python has no source."""
    try:
        source = inspect.getsource(cls)
    except OSError:
        return {}
    found = {}
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    for field, below in itertools.pairwise(body):
        match field, below:
            case (ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text)))):
                found[name] = " ".join(text.split())
    return found


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
