"""Grids of parameters of which a part runs always and the whole in `make soak`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest


def always(values: Iterable[Any], chosen: Callable[[Any], bool]) -> list[Any]:
    """For parametrize: of `values`, those that are not `chosen` run in `make soak` alone."""
    return [
        v
        if chosen(v)
        else pytest.param(*(v if isinstance(v, tuple) else [v]), marks=pytest.mark.soak)
        for v in values
    ]


def pairwise(*axes: Sequence[Any]) -> list[Any]:
    """For parametrize: every combination of `axes`. Some run always, which together hold every pair
    of values of two axes (of two axes: every value), and each value about as often as another; the
    others run in `make soak` alone.
    """
    width = 1 if len(axes) == 2 else 2

    def parts(combination: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(combination), width))

    grid = list(itertools.product(*(range(len(axis)) for axis in axes)))
    missing, chosen = set().union(*map(parts, grid)), set()
    used: Counter[tuple[int, int]] = Counter()

    def worth(combination: tuple[int, ...]) -> tuple[int, int]:
        new = len(missing & parts(combination))
        return new, -sum(used[value] for value in enumerate(combination))

    while missing:
        best = max(grid, key=worth)
        chosen.add(best)
        used.update(enumerate(best))
        missing -= parts(best)
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(axes, combination, strict=True)),
            marks=[] if combination in chosen else pytest.mark.soak,
        )
        for combination in grid
    ]
