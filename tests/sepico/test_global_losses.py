"""`count` and `group` make losses and statistics those of all workers' pixels together."""

import pytest
import torch
import torch.distributed as dist

from sepico import losses
from sepico.statistics import ClassStatistics
from tests.processes import run_ranks
from tests.sepico.test_losses import CLASSES, MEAN, VARIANCE, WIDTH, bank_without, draw

PIXELS = 30
SHARES = (slice(0, 10), slice(10, PIXELS))  # of unequal size, which a mean of means would show


def contrasts(rows: torch.Tensor, labels: torch.Tensor, count) -> dict[str, torch.Tensor]:
    options = {"temperature": 0.5, "count": count}
    return {
        "proto": losses.proto_contrast(rows, labels, MEAN, **options),
        "dist": losses.dist_contrast(rows, labels, MEAN, VARIANCE, **options),
        "bank": losses.bank_contrast(rows, labels, bank_without(-1), **options),
    }


def whole() -> tuple[torch.Tensor, torch.Tensor]:
    return draw(PIXELS, WIDTH), torch.arange(PIXELS) % CLASSES


@pytest.mark.parametrize("count", [PIXELS, torch.tensor(PIXELS)], ids=["int", "tensor"])
def test_shares_of_a_contrast_add_up_to_that_of_all_pixels(count):
    rows, labels = whole()
    expected = contrasts(rows, labels, None)
    parts = [contrasts(rows[share], labels[share], count) for share in SHARES]
    for name, value in expected.items():
        assert sum(part[name] for part in parts).item() == pytest.approx(value.item(), rel=1e-6)


def on_rank(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    group = dist.new_group()
    rows, labels = (tensor[SHARES[rank]] for tensor in whole())
    found = {}
    for name, count in (("summed", None), ("given", torch.tensor(PIXELS))):
        of_rank = rows.clone().requires_grad_()
        spread = losses.regularizer(of_rank, MEAN, temperature=0.5, count=count, group=group)
        spread.backward()
        found[f"{name} R"] = spread.detach()
        found[f"{name} gradient"] = of_rank.grad
    found["local R"] = losses.regularizer(rows, MEAN, temperature=0.5)
    statistics = ClassStatistics(CLASSES, WIDTH)
    statistics.update(rows, labels, group=group)
    found["mean"], found["variance"] = statistics.mean, statistics.variance
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_regularizer_and_statistics_of_a_group_are_those_of_all_pixels(tmp_path):
    run_ranks(on_rank, 2, str(tmp_path))
    rows, labels = whole()
    statistics = ClassStatistics(CLASSES, WIDTH)
    statistics.update(rows, labels)
    rows.requires_grad_()
    expected = losses.regularizer(rows, MEAN, temperature=0.5)
    expected.backward()
    for rank, share in enumerate(SHARES):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(found["mean"], statistics.mean, atol=1e-6)
        assert torch.allclose(found["variance"], statistics.variance, atol=1e-6)
        for name in ("summed", "given"):
            assert found[f"{name} R"].item() == pytest.approx(expected.item(), rel=1e-6)
            # The optimiser averages over the two ranks.
            assert torch.allclose(found[f"{name} gradient"] / 2, rows.grad[share], atol=1e-7)
        local = losses.regularizer(rows[share], MEAN, temperature=0.5)
        assert found["local R"].item() == pytest.approx(local.item(), rel=1e-6)
        assert local.item() != pytest.approx(expected.item(), rel=1e-3)
