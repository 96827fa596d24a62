"""A shuffled order that is computed place by place: no array, whatever its length.

Swap-or-not (Hoang, Morris, Rogaway: An Enciphering Scheme Based on a Card Shuffle, CRYPTO 2012).
A round pairs every x of 0..size-1 with (k - x) mod size and tosses one coin a pair: heads swaps
the two. Each round is a bijection of 0..size-1 for any size, hence so is their composition.
"""

from __future__ import annotations

from collections.abc import Sequence

# What a round leaves undecided about a place halves with each: 2**-32 is below what a run draws.
ROUNDS = 32
WORDS = 2 * ROUNDS
_MASK = 2**64 - 1


def permute(place: int, size: int, words: Sequence[int]) -> int:
    """The element of 0..size-1 at `place` of the order given by WORDS random 64-bit words."""
    x = place
    for k, coin in zip(words[:ROUNDS], words[ROUNDS:], strict=True):
        partner = (k * size >> 64) - x
        if partner < 0:
            partner += size
        # Both of a pair must see the same coin: it is tossed for the larger one.
        if _mix(coin ^ (x if x > partner else partner)) >> 63:
            x = partner
    return x


def _mix(x: int) -> int:
    """The finaliser of SplitMix64: every bit of 64 depends on every other."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31
