"""MAWPS rows with equations (original_text, equation, ans): LLM-Adapters'
dataset/mawps/trainset.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zflora_jax.core.fields import ConfigError
from zflora_jax.data.builders.files import FileBuilder, field, json_rows

_FIELDS = "original_text, equation, ans (MAWPS)"


class MawpsJson(FileBuilder):
    """The equation is the worked solution: "X=((22.0-14.0)/4.0)\\nThe answer is 2.0."."""

    @staticmethod
    def read(path: str) -> Iterator[dict[str, Any]]:
        for where, row in json_rows(path):
            question, equation = (
                field(row, name, where, _FIELDS) for name in ("original_text", "equation")
            )
            answer = str(row.get("ans"))
            try:
                float(answer)
            except ValueError:
                raise ConfigError(
                    f"{where}: field 'ans' must be a number, got {answer!r}."
                ) from None
            yield {
                "instruction": question.strip(),
                "input": "",
                "output": f"{equation}\nThe answer is {answer}.",
                "answer": answer,
            }
