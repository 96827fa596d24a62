"""The order of an epoch is a bijection, and all orders are equally likely."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.permutation import WORDS, permute


def words(seed):
    return np.random.Philox(key=seed).random_raw(WORDS).tolist()


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 400), seed=st.integers(0, 2**64 - 1))
def test_every_element_has_one_place(size, seed):
    order = [permute(place, size, words(seed)) for place in range(size)]
    assert sorted(order) == list(range(size))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), size=st.integers(2, 2**63), seed=st.integers(0, 2**64 - 1))
def test_places_of_a_huge_order_do_not_collide(data, size, seed):
    place = st.integers(0, size - 1)
    places = data.draw(st.lists(place, min_size=2, max_size=8, unique=True))
    elements = {permute(place, size, words(seed)) for place in places}
    assert len(elements) == len(places) and all(0 <= e < size for e in elements)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_orders_are_equally_likely(size):
    counts = dict.fromkeys(permutations(range(size)), 0)
    repeats = 100 * len(counts)
    for seed in range(repeats):
        counts[tuple(permute(place, size, words(seed)) for place in range(size))] += 1
    chi_square = sum((n - 100) ** 2 / 100 for n in counts.values())
    degrees = len(counts) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_neighbours_end_up_anywhere():
    """The distance of two places that follow each other is as likely short as long."""
    size, steps = 1000, np.zeros(10)
    for seed in range(200):
        here, there = permute(0, size, words(seed)), permute(1, size, words(seed))
        steps[(there - here) % size * 10 // size] += 1
    assert ((steps - 20) ** 2 / 20).sum() < 27.9  # 9 degrees, p = 0.001
