"""Turns plain values into frozen dataclasses and back; errors name the wrong key or value.

Nothing here imports jax: a config can be read, checked and printed on a machine without it.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import itertools
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from zflora_jax.core.foreign import FOREIGN

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be used; the message says what was given, what is allowed and how to
    fix it.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


_FOREIGN = {name: here for names, here in FOREIGN.items() for name in names.lower().split(", ")}


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns a hint for error messages: this project's name for one of PEFT, TRL or transformers,
    or the closest allowed name if there is one; then all allowed names.
    """
    names = sorted(allowed)
    if known := _FOREIGN.get(name.lower()):
        return f"here that is {known}. Allowed: {', '.join(names)}"
    whatever_case = {allowed_name.lower(): allowed_name for allowed_name in names}
    close = difflib.get_close_matches(name.lower(), whatever_case, n=1, cutoff=0.5)
    hint = f"did you mean {whatever_case[close[0]]!r}? " if close else ""
    return f"{hint}Allowed: {', '.join(names)}"


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_in(allowed: Collection[str], name: str, said: str, more: str = "") -> None:
    """Raises ConfigError unless `name` is allowed: `said`, a near name, `more`."""
    if name not in allowed:  # to look for a near one takes a millisecond
        raise ConfigError(f"{said}: {nearest(name, allowed)}.{more}")


class Bounds(NamedTuple):
    """A condition on a value and its wording in messages. `check_types` checks it."""

    text: str
    holds: Callable[[Any], bool]


Text = Annotated[str, Bounds("a name or a path, not empty", bool)]
Count = Annotated[int, Bounds("at least 1", lambda x: x >= 1)]
Natural = Annotated[int, Bounds("at least 0", lambda x: x >= 0)]
Seed = Annotated[int, Bounds("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32)]
Positive = Annotated[float, Bounds("positive", lambda x: x > 0)]
NotNegative = Annotated[float, Bounds("at least 0", lambda x: x >= 0)]
Share = Annotated[float, Bounds("at least 0 and below 1", lambda x: 0 <= x < 1)]


def check_types(config: Any, section: str = "") -> None:
    """Checks the type and bounds of every field of a dataclass: the first line of __post_init__.
    section: Its name in messages, "train" for train.steps.
    """
    hints = _hints(type(config))
    for name in _fields(type(config)):
        value = _coerce(getattr(config, name), hints[name], _dotted(section, name))
        object.__setattr__(config, name, value)


def from_dict(cls: type[T], values: Mapping[str, Any], name: str = "") -> T:
    """Builds the dataclass `cls`, called `name` in messages, from its fields as JSON has them.
    ConfigError for unknown or missing keys, wrong types and impossible values.
    """
    what = name or cls.__name__
    require(
        isinstance(values, Mapping),
        f"{what}={values!r}: expected a table of {cls.__name__} fields.",
    )
    hints, fields = _hints(cls), _fields(cls)
    for key in values:
        if key not in fields:
            raise ConfigError(f"unknown key {_dotted(name, key)!r}: {meaning_of(key, cls)}.")
    missing = [
        key
        for key, f in fields.items()
        if key not in values and f.default is f.default_factory is dataclasses.MISSING
    ]
    require(
        not missing,
        f"{what} is incomplete or damaged: {', '.join(missing)} missing, and {cls.__name__} has no"
        " default for it.",
    )
    return cls(**{k: _coerce(v, hints[k], _dotted(name, k)) for k, v in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`, JSON-ready (tuples become lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {name: plain(getattr(value, name)) for name in _fields(type(value))}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return plain(config)


def override(config: T, changes: Mapping[str, Any], name: str = "", root: type | None = None) -> T:
    """Returns a copy of `config` with dotted changes, e.g. {"train.steps": "50"}. They are made
    together, so fields that constrain each other can be changed in one call.

    Args:
      config: A dataclass; it stays unchanged.
      changes: Value by dotted name. A string is parsed as a Python literal where the field is not a
        string; a single number stands for a list of it.
      name: Name of `config` within a larger config, for messages.
      root: Class of that larger config, whose settings messages suggest.

    Raises:
      ConfigError: An unknown name, or a value that cannot be used.
    """
    cls = type(config)
    nested: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    hints, fields = _hints(cls), _fields(cls)
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if head not in fields:
            meant = meaning_of(key, cls, root)
            raise ConfigError(f"unknown key {key!r} of {cls.__name__}: {meant}.")
        if rest:
            require(
                dataclasses.is_dataclass(getattr(config, head)),
                f"{key!r}: {head!r} has no fields of its own.",
            )
            nested.setdefault(head, {})[rest] = value
        else:
            parsed = _parse(value, typing.get_type_hints(cls)[head])
            flat[head] = _coerce(parsed, hints[head], _dotted(name, key))
    for head, inner in nested.items():
        flat[head] = override(flat.get(head, getattr(config, head)), inner, head, root or cls)
    for given, other in itertools.permutations(getattr(cls, "_either", ()), 2):
        if flat.get(given) is not None:  # in place of the other
            flat.setdefault(other, None)
    return dataclasses.replace(config, **flat)  # type: ignore[type-var]


def checked_names(cls: type[T]) -> type[T]:
    """Decorator of a dataclass: unknown keyword arguments are ConfigErrors with a suggestion."""
    init: Callable[..., None] = cls.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **values: Any) -> None:
        for key in values.keys() - _fields(cls).keys():
            raise ConfigError(f"unknown key {key!r} of {cls.__name__}: {meaning_of(key, cls)}.")
        init(self, *args, **values)

    cls.__init__ = checked  # type: ignore[method-assign]
    return cls


def meaning_of(key: Any, cls: type, root: type | None = None) -> str:
    """Returns a hint for an unknown key of `cls`: a setting of that name in a section of `root`, or
    the nearest field.
    """
    head, leaf, fields = str(key).partition(".")[0], str(key).rpartition(".")[2], _fields(cls)
    if leaf.lower() in _FOREIGN:  # whatever stands before it
        return nearest(leaf, fields)
    hints = _hints(root or cls).items()
    sections = [(s, _fields(hint)) for s, hint in hints if dataclasses.is_dataclass(hint)]
    paths = [(f"{section}.{name}", name) for section, names in sections for name in names]
    close = difflib.get_close_matches(leaf, [name for _, name in paths], 1, 0.8)
    if difflib.get_close_matches(head, fields, 1, 0.8) or not close:
        return nearest(head, fields)
    meant = " or ".join(repr(path) for path, name in paths if name == close[0])
    return f"did you mean {meant}? Allowed: {', '.join(sorted(fields))}"


def _dotted(section: str, name: Any) -> Any:
    return f"{section}.{name}" if section else name


_hints: Callable[[Any], dict[str, Any]] = functools.cache(
    lambda cls: typing.get_type_hints(cls, include_extras=True)
)
_fields: Callable[[Any], dict[str, dataclasses.Field[Any]]] = functools.cache(
    lambda cls: {f.name: f for f in dataclasses.fields(cls) if f.init}
)
_UNIONS = (typing.Union, types.UnionType)


def _coerce(value: Any, hint: Any, name: str, optional: bool = False) -> Any:
    """`value` as the type `hint` declares: lists become tuples, ints floats; or ConfigError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (value is None and type(None) in args):
        return value
    if origin in _UNIONS:
        return _coerce_any(value, args, name)
    if origin is Annotated:
        value, bounds = _coerce(value, args[0], name), args[1]
        none = ", or None" if optional else ""
        require(bounds.holds(value), f"{name}={value}: must be {bounds.text}{none}.")
        return value
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{name}={value!r}: {nearest(str(value), map(str, args))}.")
        return value
    if origin is tuple:
        return _coerce_tuple(value, args, name)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, name)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        finite = abs(value) <= sys.float_info.max  # also of an int that no float can hold
        require(finite, f"{name}={value!r}: expected a finite number.")
        return float(value)
    wanted = "bool (True or False)" if hint is bool else hint.__name__
    require(
        isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
        f"{name}={value!r}: expected {wanted}, got {type(value).__name__}.",
    )
    return value


def _coerce_any(value: Any, options: tuple[Any, ...], name: str) -> Any:
    """`value` as the first of several types that accepts it."""
    error = None
    for option in options:
        if option is not type(None):
            try:
                return _coerce(value, option, name, optional=type(None) in options)
            except ConfigError as refused:
                error = refused
    raise error or ConfigError(name)


def _coerce_tuple(value: Any, args: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    """`value` as a tuple of the types `args`, of which ... repeats the first."""
    names = args[-1] is Ellipsis and (args[0] is str or typing.get_origin(args[0]) is Literal)
    if names and isinstance(value, str):  # names need no quotes: a,b or [a, b]
        value = [part.strip(" '\"") for part in value.strip("[]() ").split(",") if part.strip()]
    if isinstance(value, dict):  # a table is the list of its pairs
        value = list(value.items())
    pairs = typing.get_origin(args[0]) is tuple
    what = "names" if names else "pairs" if pairs else args[0].__name__
    written = "{'NAME': VALUE}" if pairs else f"[{value}]"
    require(
        isinstance(value, list | tuple | range),
        f"{name}={value!r}: expected a list of {what}, written as {written}.",
    )
    if args[-1] is Ellipsis:
        return tuple(_coerce(v, args[0], f"{name}[{i}]") for i, v in enumerate(value))
    wanted = ", ".join(one.__name__ for one in args)
    require(len(value) == len(args), f"{name}={value!r}: expected ({wanted}).")
    return tuple(_coerce(v, a, name) for v, a in zip(value, args, strict=True))


def _parse(value: Any, hint: Any) -> Any:
    """A value of the command line as a Python literal, unless the field takes text."""
    if not isinstance(value, str):
        return value
    options = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
    origins = [typing.get_origin(option) for option in options]
    if str in options or Literal in origins:
        return None if value == "None" and type(None) in options else value
    text = value.strip().lower()
    if bool in options and text in ("true", "false"):  # as shells and JSON write them too
        return text == "true"
    if float in options and text.lstrip("+-") in ("inf", "infinity", "nan"):
        return float(value)  # no Python literals; _coerce refuses them as not finite
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value  # _coerce then says what was expected
    return (parsed,) if tuple in origins and isinstance(parsed, int | float) else parsed
