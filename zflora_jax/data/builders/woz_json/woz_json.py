"""WOZ 2.0 restaurant dialogues: one row per user turn, from the dialogue so far to the belief
state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zflora_jax.core.fields import ConfigError
from zflora_jax.data.builders import wording
from zflora_jax.data.builders.files import FileBuilder, field, json_rows

_FIELDS = (
    "dialogue_idx and dialogue, a list of turns with system_transcript, transcript, belief_state"
    " (WOZ 2.0)"
)


class WozJson(FileBuilder):
    """woz_train_en.json, woz_validate_en.json, woz_test_en.json."""

    FIELDS = ("instruction", "input", "output", "answer", "references", "unit")

    @staticmethod
    def read(path: str) -> Iterator[dict[str, Any]]:
        for where, row in json_rows(path):
            said: list[tuple[str, str]] = []
            for number, turn in enumerate(field(row, "dialogue", where, _FIELDS, list), start=1):
                there = f"{where}, turn {number}"
                if not isinstance(turn, dict):
                    raise ConfigError(f"{there}: expected an object, got {type(turn).__name__}.")
                said.append(
                    (
                        field(turn, "system_transcript", there, _FIELDS),
                        field(turn, "transcript", there, _FIELDS),
                    )
                )
                yield wording.belief(
                    said,
                    _slots(field(turn, "belief_state", there, _FIELDS, list), there),
                    unit=str(row.get("dialogue_idx", where)),
                )


def _slots(state: list[Any], where: str) -> list[tuple[str, str]]:
    """(slot, value) of what is informed, ("request", slot) of what is requested."""
    try:
        return [
            ("request" if act["act"] == "request" else name, value)
            for act in state
            for name, value in act["slots"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: 'belief_state' must be a list of {{act, slots: [[name, value]]}}, got"
            f" {state!r:.120}."
        ) from error
