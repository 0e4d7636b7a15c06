"""Several sequences as one."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, TypeVar, overload

T = TypeVar("T", covariant=True)


class Joined(Sequence[T]):
    """The items of `parts`, one part after the other."""

    parts: Sequence[Sequence[T]]

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = operator.index(index)
        index += len(self) if index < 0 else 0
        for part in self.parts:
            if 0 <= index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError("index out of range")
