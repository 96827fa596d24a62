"""The draw of a position: independent of workers, resumable, and distributed as it says."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.sampling import Sampler, rare_class_probabilities

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "rcs.npz")


def make_sampler(counts=None, target_size=37, **options):
    if counts is None:
        counts = np.random.default_rng(0).integers(0, 6000, (50, 4)) * [1, 1, 0, 1]
    options = {"seed": 7, "global_batch": 24, "temperature": 0.5, "min_pixels": 3000} | options
    return Sampler(counts, target_size, **options)


@pytest.mark.parametrize("case", range(3))
def test_probabilities_equal_the_authors(case):
    probabilities = rare_class_probabilities(
        GOLDEN[f"counts_{case}"].sum(axis=0), float(GOLDEN[f"temp_{case}"])
    )
    expected = np.zeros_like(probabilities)
    expected[GOLDEN[f"classes_{case}"]] = GOLDEN[f"probs_{case}"]
    np.testing.assert_allclose(probabilities, expected, rtol=2e-4, atol=1e-7)


def test_a_class_that_does_not_occur_has_probability_zero():
    probabilities = rare_class_probabilities(np.array([10, 0, 1000]), 0.01)
    assert probabilities[1] == 0 and probabilities.sum() == pytest.approx(1)
    assert probabilities[0] > probabilities[2]


@pytest.mark.parametrize(("counts", "temperature"), [([1, 2], 0.0), ([1, 2], -1.0), ([0, 0], 1.0)])
def test_probabilities_that_do_not_exist_are_refused(counts, temperature):
    with pytest.raises(ValueError, match=r"rcs_temperature|labelled pixel"):
        rare_class_probabilities(np.array(counts), temperature)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_any_number_of_workers_draws_the_same_sequence(workers):
    one = make_sampler()
    expected = [one.draw(step, slot) for step in range(20) for slot in range(24)]
    drawn = {}
    for rank in reversed(range(workers)):
        sampler = make_sampler()
        for step in range(20):
            for slot in range(rank, 24, workers):
                drawn[step, slot] = sampler.draw(step, slot)
    assert [drawn[step, slot] for step in range(20) for slot in range(24)] == expected


def test_a_resume_needs_the_step_only():
    sampler = make_sampler()
    expected = [sampler.draw(step, 5) for step in range(200)]
    assert [make_sampler().draw(step, 5) for step in range(150, 200)] == expected[150:]


def test_positions_do_not_depend_on_the_global_batch():
    small, large = make_sampler(global_batch=2), make_sampler(global_batch=24)
    assert [small.draw(p // 2, p % 2) for p in range(96)] == [
        large.draw(p // 24, p % 24) for p in range(96)
    ]


def test_another_seed_draws_other_samples():
    one, other = make_sampler(seed=1), make_sampler(seed=2)
    same = [one.draw(t, 0) == other.draw(t, 0) for t in range(100)]
    assert not any(same)


def test_augmentation_seeds_differ():
    sampler = make_sampler()
    seeds = [sampler.draw(step, slot).seed for step in range(100) for slot in range(24)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


@pytest.fixture(scope="module")
def many():
    """Pixel counts of a source, and what 24,000 positions draw from it."""
    counts = np.random.default_rng(0).integers(0, 6000, (50, 4)) * [1, 1, 0, 1]
    sampler = make_sampler(counts)
    return counts, [sampler.draw(*divmod(position, 24)) for position in range(24_000)]


def test_classes_are_drawn_with_their_probabilities(many):
    counts, draws = many
    drawn = np.bincount([draw.rare_class for draw in draws], minlength=4)
    expected = rare_class_probabilities(counts.sum(axis=0), 0.5) * 24_000
    assert drawn[2] == 0
    occurring = expected > 0
    chi_square = ((drawn - expected)[occurring] ** 2 / expected[occurring]).sum()
    assert chi_square < 13.8  # 2 degrees of freedom, p = 0.001


def test_images_of_a_class_are_drawn_evenly_and_hold_enough_of_it(many):
    counts, draws = many
    for rare_class in (0, 1, 3):
        eligible = np.flatnonzero(counts[:, rare_class] > 3000)
        drawn = np.bincount([d.source for d in draws if d.rare_class == rare_class], minlength=50)
        assert set(np.flatnonzero(drawn)) == set(eligible)
        mean = drawn.sum() / len(eligible)
        degrees = len(eligible) - 1
        chi_square = ((drawn[eligible] - mean) ** 2 / mean).sum()
        assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_a_class_that_is_small_everywhere_is_refused():
    counts = np.array([[9000, 0], [9000, 5], [9000, 0], [9000, 1]])
    with pytest.raises(ValueError, match="class 1: no image has more than 3000 pixels"):
        make_sampler(counts, temperature=0.01)


def test_source_labels_without_any_class_are_refused():
    with pytest.raises(ValueError, match="no class has a labelled pixel"):
        make_sampler(np.zeros((5, 3), int))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 300),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**30),
    global_batch=st.integers(1, 64),
)
def test_every_target_epoch_is_a_permutation(size, seed, epoch, global_batch):
    sampler = make_sampler(target_size=size, seed=seed, global_batch=global_batch)
    positions = range(epoch * size, (epoch + 1) * size)
    targets = [sampler.draw(*divmod(position, global_batch)).target for position in positions]
    assert sorted(targets) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        sampler = make_sampler(target_size=100, seed=seed, global_batch=1)
        return tuple(sampler.draw(p, 0).target for p in range(epoch * 100, epoch * 100 + 100))

    assert len({order(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)}) == 9


def test_all_orders_of_an_epoch_are_equally_likely():
    sampler = make_sampler(target_size=3, global_batch=1)
    orders: dict[tuple[int, ...], int] = {}
    for epoch in range(1200):
        order = tuple(sampler.draw(3 * epoch + i, 0).target for i in range(3))
        orders[order] = orders.get(order, 0) + 1
    assert len(orders) == 6
    assert sum((n - 200) ** 2 / 200 for n in orders.values()) < 20.5  # 5 degrees, p = 0.001
