"""Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zflora_jax.reporting.files import plain


def markdown_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str]
) -> str:
    """A Markdown table; columns of numbers align right, missing values show as "-".

    Args:
      rows: Rows of the table.
      columns: The keys to show in order, or key -> heading.

    >>> rows = [{"method": "lora", "params": 4884480, "loss": 0.32891}]
    >>> print(markdown_table(rows, ["method", "params", "loss"]))
    | method | params | loss |
    |---|---:|---:|
    | lora | 4,884,480 | 0.3289 |
    """
    headings = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    cells = [[plain(row.get(key)) for key in headings] for row in rows]

    def aligned(column: Sequence[Any]) -> str:
        numbers = all(x is None or type(x) in (int, float) for x in column)
        return "---:" if numbers else "---"

    lines = [[_cell(h) for h in headings.values()], *([_cell(v) for v in row] for row in cells)]
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    rule = [aligned(column) for column in zip(*cells, strict=True)] or ["---"] * len(headings)
    return "\n".join([head, f"|{'|'.join(rule)}|", *body])


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
