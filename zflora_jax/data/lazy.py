"""Sequences whose items are made when they are indexed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
