"""Sequences whose items are made when they are indexed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, TypeVar

T = TypeVar("T")


class Lazy(Sequence[T]):
    """The sequence `make(i) for i in indices`. A slice of it is lazy too."""

    def __init__(self, make: Callable[[int], T], indices: Sequence[int]) -> None:
        self._make, self._indices = make, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Lazy(self._make, self._indices[index])
        return self._make(self._indices[index])


class Joined(Lazy[T]):
    """The items of several sequences, one sequence after the other."""

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        ends = list(accumulate(map(len, parts)))

        def make(index: int) -> T:
            part = bisect_right(ends, index)
            return parts[part][index - ends[part]]  # from the end of the part: negative

        super().__init__(make, range(ends[-1] if ends else 0))
