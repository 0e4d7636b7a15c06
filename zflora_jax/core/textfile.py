"""Text files and their lines, read one way everywhere.

`str.splitlines` also cuts at U+2028, VT, FF and NEL, which prompts and JSON strings may hold, and
a byte order mark would become part of the first line.
"""

from __future__ import annotations

import re

from zflora_jax.core.fields import ConfigError

_LINE_END = re.compile(r"\r\n|\r|\n")


def decode(data: bytes, name: object) -> str:
    """The text of the user's file `name` without its byte order mark; ConfigError if not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start}"
        raise ConfigError(f"{name}: not UTF-8 text ({place}). Save it as UTF-8.") from error


def lines_of(text: str) -> list[str]:
    r"""The lines of `text` without their ends, which are \n, \r\n or \r and nothing else."""
    lines = _LINE_END.split(text)
    return lines[:-1] if lines[-1] == "" else lines
