"""Rows that belong together, such as the turns of one dialogue. Other data would bring other
dialogues, so intervals draw them whole: rows alone, drawn one by one, would claim too much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from zflora_jax.core.fields import require


class Column(NamedTuple):
    """A score of a task's rows by the units that are drawn.

    Attributes:
      sums: of the scores of each unit's rows, [..., U]; of rows that are drawn one by one those
        scores.
      rows: how many rows each unit has, [U].
    """

    sums: np.ndarray
    rows: np.ndarray


def shared_units(names: Sequence[str]) -> list[int] | None:
    """Numbers of the units that rows belong to.

    Args:
      names: of the unit of each row; "" of a row that belongs to no other.

    Returns:
      One number per row; None where each row is alone.
    """
    numbers: dict[str | int, int] = {}
    found = [numbers.setdefault(name or row, len(numbers)) for row, name in enumerate(names)]
    return found if len(numbers) < len(found) else None


def by_unit(scores: np.ndarray, units: Sequence[int] | None) -> Column:
    """The scores of rows by their units.

    Args:
      scores: [..., R].
      units: the number of each row's unit, [R]; None: each row is alone. Rows of one unit only are
        alone, too, because one unit does not show how units differ.

    Returns:
      Their sums [..., U] and numbers of rows [U].

    Raises:
      ConfigError: there are not as many numbers as rows.
    """
    count = scores.shape[-1]
    numbers = np.arange(count) if units is None else np.asarray(units)
    require(
        len(numbers) == count,
        f"units must have one number for each row: got {len(numbers)} numbers for {count} rows.",
    )
    if len(np.unique(numbers)) < 2:
        numbers = np.arange(count)
    order = np.argsort(numbers, kind="stable")
    _, starts, rows = np.unique(numbers[order], return_index=True, return_counts=True)
    return Column(np.add.reduceat(scores[..., order], starts, axis=-1), rows)
