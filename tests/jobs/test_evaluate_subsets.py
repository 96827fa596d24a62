"""Results on the 16 and 13 classes of SYNTHIA, from a network with the 19 of Cityscapes."""

import numpy as np
import pytest
import torch

from cluster.evaluation import report_row
from jobs.evaluate import table
from sepico.metrics import ConfusionMatrix
from sepico.taxonomies import CITYSCAPES_13, CITYSCAPES_16, CITYSCAPES_19, Taxonomy

# Train ids that SYNTHIA does not have, and those left out for 13 classes besides.
ABSENT, SMALL = ("terrain", "truck", "train"), ("wall", "fence", "pole")


@pytest.fixture
def matrix() -> ConfusionMatrix:
    """Truth of all 19 classes; a network that has never seen three of them."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(19, (64, 64), generator=generator)
    wrong = torch.rand(truth.shape, generator=generator) < 0.3
    prediction = torch.where(wrong, torch.randint(19, truth.shape, generator=generator), truth)
    absent = torch.tensor([CITYSCAPES_19.names.index(name) for name in ABSENT])
    prediction[torch.isin(prediction, absent)] = CITYSCAPES_19.names.index("vegetation")
    matrix = ConfusionMatrix(19)
    matrix.update(prediction, truth)
    return matrix


def test_means_over_16_and_13_classes_are_those_of_the_classes_iou(matrix):
    row = report_row(matrix.counts.tolist(), CITYSCAPES_19)
    iou = row["iou"]
    assert [iou[name] for name in ABSENT] == [0, 0, 0]
    of_16 = [value for name, value in iou.items() if name not in ABSENT]
    of_13 = [value for name, value in iou.items() if name not in ABSENT + SMALL]
    assert (len(of_16), len(of_13)) == (16, 13)
    assert row["miou_16"] == pytest.approx(np.mean(of_16), abs=0.01)
    assert row["miou_13"] == pytest.approx(np.mean(of_13), abs=0.01)
    # Classes that are never right are in the mean over 19: the published factor.
    assert row["miou_16"] == pytest.approx(row["miou"] * 19 / 16, abs=0.02)


def test_a_class_without_a_pixel_is_left_out_of_a_subset_too(matrix):
    bus = CITYSCAPES_19.names.index("bus")
    matrix.counts[bus] = matrix.counts[:, bus] = 0
    row = report_row(matrix.counts.tolist(), CITYSCAPES_19)
    assert row["iou"]["bus"] is None
    kept = [v for name, v in row["iou"].items() if name not in (*ABSENT, "bus")]
    assert row["miou_16"] == pytest.approx(np.mean(kept), abs=0.01)


def test_the_table_ends_with_the_means(matrix):
    row = report_row(matrix.counts.tolist(), CITYSCAPES_19)
    lines = table({"classes": list(CITYSCAPES_19.names), "rows": {"student": row}}).splitlines()
    assert [line.rsplit(maxsplit=1)[0].strip() for line in lines[-3:]] == [
        "mIoU", "mIoU (16)", "mIoU (13)",
    ]  # fmt: skip
    assert [line.split()[-1] for line in lines[-3:]] == [
        f"{row[key]:.1f}" for key in ("miou", "miou_16", "miou_13")
    ]


@pytest.mark.parametrize(
    "taxonomy",
    [CITYSCAPES_13, Taxonomy(("road", "sky"), ((1, 2, 3), (4, 5, 6)))],
    ids=["13 classes", "own"],
)
def test_other_classes_have_one_mean(taxonomy):
    counts = torch.eye(taxonomy.num_classes, dtype=torch.int64).tolist()
    row = report_row(counts, taxonomy)
    assert set(row) == {"miou", "iou"}
    assert table({"classes": list(taxonomy.names), "rows": {"student": row}}).count("mIoU") == 1


def test_a_network_of_16_classes_has_a_mean_over_13():
    counts = torch.eye(16, dtype=torch.int64)
    wall = CITYSCAPES_16.names.index("wall")
    counts[wall, wall], counts[wall, 0] = 0, 1  # a wall taken for road: half of the road is right
    row = report_row(counts.tolist(), CITYSCAPES_16)
    assert row["miou"] == pytest.approx(100 * 14.5 / 16, abs=0.01)
    assert row["miou_13"] == pytest.approx(100 * 12.5 / 13, abs=0.01)
    assert "miou_16" not in row
