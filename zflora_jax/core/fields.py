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
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be used; the message says what was given, what is allowed and how to
    fix it.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or the name of its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, allowed: typing.Iterable[str]) -> str:
    """A sentence for error messages: the closest allowed name if there is one, and all of them."""
    names = sorted(allowed)
    whatever_case = {allowed_name.lower(): allowed_name for allowed_name in names}
    close = difflib.get_close_matches(name.lower(), whatever_case, n=1, cutoff=0.5)
    hint = f"did you mean {whatever_case[close[0]]!r}? " if close else ""
    return f"{hint}Allowed: {', '.join(names)}"


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


# --- dataclass <-> dict, dotted overrides ---------------------------------------------------------


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def check_types(config: Any) -> None:
    """Hold every field to its declared type, also where a config is built by keyword in Python: the
    first line of each __post_init__.
    """
    hints: dict[str, Any] = _hints(typing.cast(Any, type(config)))
    section = {
        "AdapterConfig": "adapter.",
        "DataConfig": "data.",
        "OptimConfig": "optim.",
        "TrainConfig": "train.",
        "EvalConfig": "eval.",
        "MeshConfig": "mesh.",
        "QuantizeConfig": "quantize.",
        "Comparison": "comparison.",
    }
    prefix = section.get(type(config).__name__, "")
    for f in dataclasses.fields(config):
        if f.init:
            object.__setattr__(
                config, f.name, _coerce(getattr(config, f.name), hints[f.name], prefix + f.name)
            )


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type `hint` declares, or ConfigError. Lists become tuples, ints become floats;
    nothing else changes.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _coerce(value, option, name)
            except ConfigError as error:
                errors.append(str(error))
        raise ConfigError(errors[-1])
    if origin is Literal:
        value = _FORMER.get(hint, {}).get(str(value), value)
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
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        require(
            isinstance(value, dict),
            f"{name}={value!r}: expected a table of {hint.__name__} fields.",
        )
        return from_dict(hint, value, name)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        require(math.isfinite(number), f"{name}={value!r}: expected a finite number.")
        return number
    is_plain_int = isinstance(value, int) and not isinstance(value, bool)
    wanted = "bool (True or False)" if hint is bool else hint.__name__
    require(
        is_plain_int if hint is int else isinstance(value, hint),
        f"{name}={value!r}: expected {wanted}, got {type(value).__name__}.",
    )
    return value


def _coerce_tuple(value: Any, args: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    """`value` as a tuple of the types `args`, of which ... repeats the first."""
    names = args[-1] is Ellipsis and (args[0] is str or typing.get_origin(args[0]) is Literal)
    if names and isinstance(value, str):  # names need no quotes: a,b or [a, b]
        value = [part.strip(" '\"") for part in value.strip("[]() ").split(",") if part.strip()]
    if isinstance(value, dict):  # a table is the list of its pairs
        value = list(value.items())
    pairs = typing.get_origin(args[0]) is tuple
    kind = "names" if names else "pairs" if pairs else args[0].__name__
    form = "{'NAME': VALUE}" if pairs else f"[{value}]"
    require(
        isinstance(value, list | tuple | range),
        f"{name}={value!r}: expected a list of {kind}, written as {form}.",
    )
    if args[-1] is not Ellipsis:
        wanted = ", ".join(one.__name__ for one in args)
        require(len(value) == len(args), f"{name}={value!r}: expected ({wanted}).")
        return tuple(_coerce(v, a, name) for v, a in zip(value, args, strict=True))
    return tuple(_coerce(v, args[0], f"{name}[{i}]") for i, v in enumerate(value))


_FORMER: dict[Any, dict[str, Any]] = {}  # a Literal -> its former values, as text


def respelt(literal: Any, former: Mapping[Any, str]) -> None:
    """Values of a Literal that had another spelling are still taken by it.

    Args:
      literal: the type.
      former: old value -> new one.
    """
    _FORMER[literal] = {str(old): new for old, new in former.items()}


def renamed(**names: str) -> Callable[[type[T]], type[T]]:
    """Class decorator for a dataclass: fields that had another name are still taken by it, from
    keywords, files and the command line.

    Args:
      names: old name = new name; "nested.field" for a field of the dataclass in field `nested`.
    """

    def decorate(cls: type[T]) -> type[T]:
        init: Any = cls.__init__

        @functools.wraps(init)
        def with_old_names(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **current_names(cls, kwargs))

        setattr(cls, "__init__", with_old_names)  # noqa: B010 (mypy knows no other way)
        setattr(cls, _RENAMED, names)
        return cls

    return decorate


_RENAMED = "__renamed_fields__"


def current_names(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of fields of `cls`, each under the name that it has now (see `renamed`)."""
    names = getattr(cls, _RENAMED, {})
    twice = [old for old in values if old in names and names[old] in values]
    require(
        not twice,
        "; ".join(
            f"{old} is the name of before of {names[old]}, which is given too" for old in twice
        )
        + ": give one of them (dataclasses.replace gives every field: use the new name there).",
    )
    found = {names.get(name, name): value for name, value in values.items()}
    for path in [name for name in names.values() if "." in name and name in found]:
        outer, _, inner = path.partition(".")
        value, nested = {inner: found.pop(path)}, found.get(outer, {})
        if isinstance(nested, Mapping):
            found[outer] = {**nested, **value}
        elif dataclasses.is_dataclass(nested) and not isinstance(nested, type):
            found[outer] = dataclasses.replace(nested, **value)
    return found


def from_dict(cls: type[T], values: dict[str, Any], name: str = "") -> T:
    """Build the dataclass `cls` from a plain dict (nested for nested dataclasses). Raises
    ConfigError on unknown keys or wrong types.
    """
    require(
        isinstance(values, dict),
        f"{name or cls.__name__}={values!r}: expected a table of {cls.__name__} fields.",
    )
    hints, values = _hints(typing.cast(Any, cls)), current_names(cls, values)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(
                f"unknown key {f'{name}.{key}' if name else key!r}: {nearest(str(key), fields)}."
            )
    missing = [
        k
        for k, f in fields.items()
        if k not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    require(
        not missing,
        f"{name or cls.__name__} is incomplete or damaged: {', '.join(missing)} missing, and"
        f" {cls.__name__} has no default for it.",
    )
    return cls(**{k: _coerce(v, hints[k], f"{name}.{k}" if name else k) for k, v in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`, JSON-ready (tuples become lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {
                f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init
            }
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return plain(config)


def override(config: T, changes: dict[str, Any], name: str = "") -> T:
    """`config` with dotted changes, e.g. {"train.steps": "50"}.

    All changes to one nested config are made together, so that fields which constrain each other
    can be changed in one call.

    Args:
      config: a dataclass; it stays as it is.
      changes: value by dotted name. A string is parsed as a Python literal where the field is not a
        string; one number stands for a list of it.
      name: of `config` in a greater one, for messages.

    Raises:
      ConfigError: an unknown name, a field given by two names, or a value that cannot be used.
    """
    nested: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    hints = _hints(typing.cast(Any, type(config)))
    known = [f.name for f in dataclasses.fields(config) if f.init]  # type: ignore[arg-type]
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        head = next(iter(current_names(type(config), {head: None})))
        if head not in known:
            raise ConfigError(
                f"unknown key {key!r} of {type(config).__name__}: {nearest(head, known)}."
            )
        if rest:
            require(
                dataclasses.is_dataclass(getattr(config, head)),
                f"{key!r}: {head!r} has no fields of its own.",
            )
            nested.setdefault(head, {})[rest] = value
        else:
            path = f"{name}.{key}" if name else key
            require(
                head not in flat, f"{path}: {head} is given by another name too: give one of them."
            )
            flat[head] = _coerce(_parse(value, hints[head]), hints[head], path)
    for head, inner in nested.items():
        flat[head] = override(flat.get(head, getattr(config, head)), inner, head)
    return dataclasses.replace(config, **flat)  # type: ignore[type-var]


def _parse(value: Any, hint: Any) -> Any:
    if not isinstance(value, str):
        return value
    options = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )
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
