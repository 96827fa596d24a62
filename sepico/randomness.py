"""Randomness with an address: whatever a slot draws comes from its seed and a named purpose."""

import zlib

import numpy as np


def slot_generator(seed: int, purpose: str) -> np.random.Generator:
    """Generator of one slot of one step for one purpose.

    `seed` is the slot's own (see `cluster.sampling`). Because the purpose is part of the key, a
    draw added in one place never shifts the draws of another.
    """
    return np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(purpose.encode())]))
