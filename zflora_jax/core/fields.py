"""Frozen dataclasses from plain values and back: every wrong key or value refused by name.

Nothing here imports jax: a config can be read, checked and printed on a machine without it.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be used; the message says what was given, what is allowed and how to
    fix it.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A sentence for error messages: the closest allowed name if there is one, and all of them."""
    names = sorted(allowed)
    whatever_case = {allowed_name.lower(): allowed_name for allowed_name in names}
    close = difflib.get_close_matches(name.lower(), whatever_case, n=1, cutoff=0.5)
    hint = f"did you mean {whatever_case[close[0]]!r}? " if close else ""
    return f"{hint}Allowed: {', '.join(names)}"


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_at_least(
    least: int, config: Any, *names: str, section: str = "", none: str = ""
) -> None:
    """Refuses fields of `config` below `least`.

    Args:
      least: The smallest allowed value.
      config: A dataclass.
      names: Names of its fields.
      section: The section of its settings, for messages.
      none: What None means where a field may be None, for messages.
    """
    for name in names:
        value = getattr(config, name)
        require(
            value >= least if value is not None else bool(none),
            f"{_dotted(section, name)}={value}: must be at least {least}"
            f"{f', or None for {none}' if none else ''}.",
        )


def check_types(config: Any, section: str = "") -> None:
    """Holds every field to its declared type, also where a config is built by keyword in Python:
    the first line of each __post_init__.

    Args:
      config: A dataclass.
      section: The section of its settings, for messages: "train" for train.steps.
    """
    hints = _hints(type(config))
    for f in dataclasses.fields(config):
        if f.init:
            value = _coerce(getattr(config, f.name), hints[f.name], _dotted(section, f.name))
            object.__setattr__(config, f.name, value)


def from_dict(cls: type[T], values: Mapping[str, Any], name: str = "") -> T:
    """Builds the dataclass `cls` from a plain dict (nested for nested dataclasses).

    Args:
      cls: The dataclass.
      values: Its fields as JSON has them.
      name: The name of `values`, for messages.

    Raises:
      ConfigError: Unknown or missing keys, wrong types, impossible values.
    """
    what = name or cls.__name__
    require(
        isinstance(values, Mapping),
        f"{what}={values!r}: expected a table of {cls.__name__} fields.",
    )
    hints, fields = _hints(cls), _fields(cls)
    for key in values:
        require(key in fields, f"unknown key {_dotted(name, key)!r}: {nearest(str(key), fields)}.")
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


def override(config: T, changes: Mapping[str, Any], name: str = "") -> T:
    """`config` with dotted changes, e.g. {"train.steps": "50"}.

    All changes to one nested config are made together, so that fields which constrain each other
    can be changed in one call.

    Args:
      config: A dataclass; it stays unchanged.
      changes: Value by dotted name. A string is parsed as a Python literal where the field is not a
        string; a single number stands for a list of it.
      name: The name of `config` in a larger one, for messages.

    Raises:
      ConfigError: An unknown name, or a value that cannot be used.
    """
    cls = type(config)
    nested: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    hints, fields = _hints(cls), _fields(cls)
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        require(head in fields, f"unknown key {key!r} of {cls.__name__}: {nearest(head, fields)}.")
        if rest:
            require(
                dataclasses.is_dataclass(getattr(config, head)),
                f"{key!r}: {head!r} has no fields of its own.",
            )
            nested.setdefault(head, {})[rest] = value
        else:
            flat[head] = _coerce(_parse(value, hints[head]), hints[head], _dotted(name, key))
    for head, inner in nested.items():
        flat[head] = override(flat.get(head, getattr(config, head)), inner, head)
    return dataclasses.replace(config, **flat)  # type: ignore[type-var]


def _dotted(section: str, name: Any) -> Any:
    return f"{section}.{name}" if section else name


_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)
_fields: Callable[[Any], dict[str, dataclasses.Field[Any]]] = functools.cache(
    lambda cls: {f.name: f for f in dataclasses.fields(cls) if f.init}
)
_UNIONS = (typing.Union, types.UnionType)


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type `hint` declares: lists become tuples, ints floats; or ConfigError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (value is None and type(None) in args):
        return value
    if origin in _UNIONS:
        return _coerce_any(value, args, name)
    if origin is Literal:
        require(value in args, f"{name}={value!r}: {nearest(str(value), map(str, args))}.")
        return value
    if origin is tuple:
        return _coerce_tuple(value, args, name)
    if origin in (dict, Mapping):
        require(isinstance(value, Mapping), f"{name}={value!r}: expected a table, {{NAME: VALUE}}.")
        return {
            _coerce(key, args[0], f"{name}, key {key!r}"): _coerce(of, args[1], f"{name}[{key!r}]")
            for key, of in value.items()
        }
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, name)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        require(math.isfinite(number), f"{name}={value!r}: expected a finite number.")
        return number
    wanted = "bool (True or False)" if hint is bool else hint.__name__
    require(
        isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
        f"{name}={value!r}: expected {wanted}, got {type(value).__name__}.",
    )
    return value


def _coerce_any(value: Any, options: tuple[Any, ...], name: str) -> Any:
    """`value` as the first of several types that takes it."""
    errors = []
    for option in options:
        if option is not type(None):
            try:
                return _coerce(value, option, name)
            except ConfigError as error:
                errors.append(error)
    raise errors[-1]


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
    if args[-1] is not Ellipsis:
        wanted = ", ".join(one.__name__ for one in args)
        require(len(value) == len(args), f"{name}={value!r}: expected ({wanted}).")
        return tuple(_coerce(v, a, name) for v, a in zip(value, args, strict=True))
    return tuple(_coerce(v, args[0], f"{name}[{i}]") for i, v in enumerate(value))


def _parse(value: Any, hint: Any) -> Any:
    """A value of the command line as a Python literal, unless the field takes text."""
    if not isinstance(value, str):
        return value
    options = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
    text_allowed = any(
        o is str or (typing.get_origin(o) is Literal and isinstance(typing.get_args(o)[0], str))
        for o in options
    )
    if text_allowed:
        return None if value == "None" and type(None) in options else value
    if bool in options and value.lower() in ("true", "false"):  # as shells and JSON write them too
        return value.lower() == "true"
    if float in options and value.strip().lstrip("+-").lower() in ("inf", "infinity", "nan"):
        return float(value)  # no Python literals; _coerce refuses them as not finite
    try:
        parsed = ast.literal_eval(value)
        several = any(typing.get_origin(o) is tuple for o in options)
        return (parsed,) if several and isinstance(parsed, int | float) else parsed
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value  # _coerce then says what was expected
