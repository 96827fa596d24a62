"""A bitmap holds the members of a set and finds the k-th of them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.bitmap import Bitmap


@settings(max_examples=100, deadline=None)
@given(size=st.integers(0, 3000), density=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_it_selects_what_a_list_would(size, density, seed):
    members = np.random.default_rng(seed).random(size) < density
    bitmap = Bitmap(members)
    expected = np.flatnonzero(members).tolist()
    assert len(bitmap) == len(expected)
    assert [bitmap.select(k) for k in range(len(bitmap))] == expected


def test_ten_million_samples_take_little_more_than_a_bit_each():
    assert Bitmap(np.ones(10_000_000, bool)).nbytes < 1.2 * 10_000_000 / 8
