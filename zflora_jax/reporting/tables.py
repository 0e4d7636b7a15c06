"""Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zflora_jax.reporting.files import plain


def markdown_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str]
) -> str:
    """Make a Markdown table. Number columns align right.

    Args:
      rows: missing values show as "-".
      columns: the keys to show in order, or key -> heading.

    >>> rows = [{"method": "lora", "params": 4884480, "loss": 0.32891}]
    >>> print(markdown_table(rows, ["method", "params", "loss"]))
    | method | params | loss |
    |---|---:|---:|
    | lora | 4,884,480 | 0.3289 |
    """
    headings = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    cells = [[plain(row.get(key)) for key in headings] for row in rows]

    def is_number(value: Any) -> bool:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))

    right = [bool(cells) and all(is_number(row[i]) for row in cells) for i in range(len(headings))]
    lines = [[_cell(h) for h in headings.values()], *([_cell(v) for v in row] for row in cells)]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(
        [text[0], "|" + "|".join("---:" if r else "---" for r in right) + "|", *text[1:]]
    )


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        case _:
            return str(value).replace("|", "\\|").replace("\n", " ")
