"""Dialogues, one per row: DailyDialog's `dialog` (a list of utterances) and MultiWOZ 2.2's `turns`
(a list of speaker and utterance).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zflora_jax.core.fields import ConfigError
from zflora_jax.data.builders import wording
from zflora_jax.data.builders.files import FileBuilder, field, json_rows

_FIELDS = "dialog (DailyDialog) or turns (MultiWOZ 2.2)"


class DialogueJson(FileBuilder):
    """One row per reply of the second speaker; in MultiWOZ that is the system."""

    FIELDS = ("instruction", "input", "output", "references", "unit")

    @staticmethod
    def read(path: str) -> Iterator[dict[str, Any]]:
        found = False
        for where, row in json_rows(path):
            turns: list[Any]
            if "turns" in row:
                turns = [
                    turn.get("utterance") if isinstance(turn, dict) else None
                    for turn in field(row, "turns", where, _FIELDS, list)
                ]
            else:
                turns = field(row, "dialog", where, _FIELDS, list)
            if not all(isinstance(turn, str) for turn in turns):
                raise ConfigError(
                    f"{where}: every turn must be a string, or an object whose 'utterance' is one."
                )
            for reply in wording.replies(turns, unit=" ".join(turns[:2])):
                found = True
                yield reply
        if not found:
            raise ConfigError(
                f"{path}: no dialogue has a second turn, so there is no reply to learn."
            )
