"""Console output of commands; notices of other libraries are switched off."""

from __future__ import annotations

import glob
import os
from typing import Any

from zflora_jax.core.libtpu import ABSENT


def silence() -> None:
    """Switches off notices of transformers (no PyTorch) and, without a TPU, of libtpu."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not glob.glob("/dev/accel*") + glob.glob("/dev/vfio/*"):
        os.environ.update(ABSENT | os.environ)


def print_table(values: dict[str, Any], title: str) -> None:
    """Prints the scalars of `values` as two columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # As text: otherwise rich reads square brackets as its markup.
    table = Table("", "", title=Text(title), title_justify="left", show_header=False)
    for column in table.columns:
        column.overflow = "fold"  # otherwise it cuts long values
    for key, value in values.items():
        if isinstance(value, str | bool) or value is None:
            table.add_row(key, Text(str(value)))
        elif isinstance(value, int | float):
            table.add_row(key, f"{value:,}" if isinstance(value, int) else f"{value:.6g}")
    Console().print(table)
