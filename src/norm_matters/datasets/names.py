"""A million names in little memory."""

import os
from collections.abc import Iterable, Sequence
from typing import final, overload

import numpy as np


@final
class Names(Sequence[str]):
    """Many names in one piece: a million Python strings take 100 MB in each process that looks at them.

    Args:
        blob: the names in UTF-8, one behind the other.
        ends: int64 (N,), where each ends.
    """

    def __init__(self, blob: bytes, ends: np.ndarray) -> None:
        self.blob = blob
        self.ends = ends

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Put names together."""
        encoded = [os.fsencode(name) for name in names]
        return cls(b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64))

    @classmethod
    def joined(cls, parts: "Sequence[Names]") -> "Names":
        """Those of each part, one part behind the other."""
        starts = np.cumsum([0, *(len(part.blob) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, starts[:-1], strict=True)]
        return cls(b"".join(part.blob for part in parts), np.concatenate([np.zeros(0, np.int64), *ends]))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Names": ...
    def __getitem__(self, index: int | slice) -> "str | Names":
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self.take(np.array(range(start, stop, step), np.int64))  # np.arange takes no step of any size
            first = int(self.ends[start - 1]) if start else 0
            ends = self.ends[start:stop] - first
            return Names(self.blob[first : first + (int(ends[-1]) if len(ends) else 0)], ends)
        index = range(len(self))[index]
        return os.fsdecode(self.blob[self.ends[index - 1] if index else 0 : self.ends[index]])

    def take(self, indices: np.ndarray) -> "Names":
        """The names of those numbers, in that order."""
        starts = np.concatenate([[0], self.ends[:-1]])[indices].tolist() if len(indices) else []
        ends = self.ends[indices]
        parts = [self.blob[start:end] for start, end in zip(starts, ends.tolist(), strict=True)]
        return Names(b"".join(parts), np.cumsum([len(part) for part in parts], dtype=np.int64))
