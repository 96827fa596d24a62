"""A memory bank that is loaded into a shorter one, and what it gives away."""

import torch

from sepico.statistics import FeatureBank


def test_a_longer_bank_is_cut_to_what_the_shorter_one_would_hold():
    draws = torch.Generator().manual_seed(0)
    longer, shorter = FeatureBank(4, 3, 7), FeatureBank(4, 3, 3)

    def push(*banks: FeatureBank) -> None:
        means, present = torch.randn(4, 3, generator=draws), torch.rand(4, generator=draws) < 0.6
        present[3] = False  # a class without a row
        for bank in banks:
            bank.update(means, present)

    for pushes in (2, 4, 9):
        for _ in range(pushes):
            push(longer, shorter)
        cut = FeatureBank(4, 3, 3)
        cut.load_state_dict(longer.state_dict())
        for _ in range(2):  # and the next rows go where they would have gone
            assert all(torch.equal(cut.rows(c), shorter.rows(c)) for c in range(4))
            assert torch.equal(cut.means(), shorter.means())
            push(longer, shorter, cut)


def test_rows_that_were_given_away_stay_what_they_are():
    bank = FeatureBank(1, 1, length=1)
    bank.update(torch.ones(1, 1), torch.tensor([True]))
    rows = bank.rows(0)
    bank.update(torch.zeros(1, 1), torch.tensor([True]))
    assert rows.tolist() == [[1]]
