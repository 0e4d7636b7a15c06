"""HellaSwag rows as published (activity_label, ctx, endings, label), in LLM-Adapters' wording."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zflora_jax.core.fields import ConfigError
from zflora_jax.data.builders import wording
from zflora_jax.data.builders.files import FileBuilder, field, json_rows

_FIELDS = "activity_label, ctx, endings, label (HellaSwag)"


class HellaswagJson(FileBuilder):
    """hellaswag_train.jsonl and hellaswag_val.jsonl; the published test file has no labels."""

    @staticmethod
    def read(path: str) -> Iterator[dict[str, Any]]:
        for where, row in json_rows(path):
            activity, context = (
                field(row, name, where, _FIELDS) for name in ("activity_label", "ctx")
            )
            endings, label = field(row, "endings", where, _FIELDS, list), row.get("label")
            if not all(isinstance(ending, str) for ending in endings):
                raise ConfigError(f"{where}: field 'endings' must be a list of strings.")
            if str(label) not in map(str, range(len(endings))):
                raise ConfigError(
                    f"{where}: label={label!r} is not the index of one of the {len(endings)}"
                    " endings. Unlabelled rows cannot be scored."
                )
            yield wording.hellaswag(activity, context, endings, int(str(label)))
