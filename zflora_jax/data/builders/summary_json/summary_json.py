"""Texts and their summaries: DialogSum, SAMSum, XSum and CNN/DailyMail rows as published."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zflora_jax.core.fields import ConfigError
from zflora_jax.data.builders import wording
from zflora_jax.data.builders.files import FileBuilder, field, json_rows

# Field -> what it is called in the instruction.
_TEXTS = {
    "dialogue": "dialogue",
    "article": "article",
    "document": "article",
}
_SUMMARIES = ("summary", "highlights", "summary1", "summary2", "summary3")
_FIELDS = "dialogue, article or document, and summary, highlights or summary1 to summary3"


class SummaryJson(FileBuilder):
    """Several summaries (DialogSum's test file has three) are the references; the first is the
    target.
    """

    FIELDS = ("instruction", "input", "output", "references")

    @staticmethod
    def read(path: str) -> Iterator[dict[str, Any]]:
        for where, row in json_rows(path):
            name = next((name for name in _TEXTS if name in row), "dialogue")
            text = field(row, name, where, _FIELDS).strip()
            names = [name for name in _SUMMARIES if name in row] or ["summary"]
            references = [field(row, name, where, _FIELDS).strip() for name in names]
            if not text or not all(references):
                raise ConfigError(f"{where}: the {name} or a summary of it is empty.")
            yield wording.summary(_TEXTS[name], text, references)
