"""A set of samples in a bit each: its k-th member is found without a list of them."""

from __future__ import annotations

import numpy as np

BLOCK_BYTES = 64


class Bitmap:
    """The members of a set of 0..N-1: N / 8 bytes, and 8 bytes for each block of 512."""

    def __init__(self, members: np.ndarray) -> None:
        """`members` (N,) bool says who belongs to it."""
        blocks = -(-len(members) // (8 * BLOCK_BYTES))
        self._bits = np.zeros((blocks, BLOCK_BYTES), np.uint8)
        packed = np.packbits(members, bitorder="little")
        self._bits.reshape(-1)[: len(packed)] = packed
        self._up_to = np.cumsum(np.bitwise_count(self._bits).sum(axis=1), dtype=np.int64)

    def __len__(self) -> int:
        return int(self._up_to[-1]) if len(self._up_to) else 0

    @property
    def nbytes(self) -> int:
        return self._bits.nbytes + self._up_to.nbytes

    def select(self, k: int) -> int:
        """The k-th member in rising order, 0 <= k < len(self)."""
        assert 0 <= k < len(self), k
        block = int(np.searchsorted(self._up_to, k, side="right"))
        before = int(self._up_to[block - 1]) if block else 0
        places = np.flatnonzero(np.unpackbits(self._bits[block], bitorder="little"))
        return 8 * BLOCK_BYTES * block + int(places[k - before])
