"""What commands print."""

from __future__ import annotations

from typing import Any


def print_table(values: dict[str, Any], title: str) -> None:
    """Print the scalars of `values` as two columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # As text: rich else takes what is in square brackets for its own markup.
    table = Table(title=Text(title), title_justify="left", show_header=False)
    for _ in range(2):
        table.add_column(overflow="fold")  # and cuts off what is longer than a line
    for key, value in values.items():
        if isinstance(value, str | int | float) or value is None:
            table.add_row(key, Text(_shown(value)))
    Console().print(table)


def _shown(value: str | int | float | None) -> str:
    match value:
        case bool() | str() | None:
            return str(value)
        case int():
            return f"{value:,}"
        case _:
            return f"{value:.6g}"
