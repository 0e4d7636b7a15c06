"""Grids of parameters of which a part runs always and the whole in `make soak`."""

from __future__ import annotations

import itertools
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


def in_turn(
    first: Sequence[Any], *others: Sequence[Any], few: Callable[[Any], bool] = lambda _: True
) -> list[Any]:
    """For parametrize: every combination of the axes. Always run some in which each value of
    `first` that is `few`, and of the others, stands once at least; the rest in `make soak`.
    """
    some = [value for value in first if few(value)]
    # At half the pace of the axis before, so that two of a length do not pair up.
    axes = [(some, 1), *((axis, 2**i) for i, axis in enumerate(others))]
    count = max(len(axis) * pace for axis, pace in axes)
    chosen = [tuple(axis[i // pace % len(axis)] for axis, pace in axes) for i in range(count)]
    return always(itertools.product(first, *others), chosen.__contains__)
