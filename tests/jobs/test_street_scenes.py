"""The generated street scenes: repeatable, complete, and really two domains."""

import json

import numpy as np
import pytest
import torch
from torchvision.io import decode_image

from jobs.street_scenes import TAXONOMY, render, write_dataset
from sepico.taxonomies import Taxonomy

DOMAINS = ("day", "night")


@pytest.fixture(scope="module")
def scenes() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """40 pictures (40, H, W, 3) and their labels (40, H, W) of each domain."""
    return {
        domain: tuple(
            np.stack(part) for part in zip(*(render(domain, i) for i in range(40)), strict=True)
        )
        for domain in DOMAINS
    }


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(domain):
    picture, labels = render(domain, 5)
    again, labels_again = render(domain, 5)
    assert picture.tobytes() == again.tobytes()
    assert labels.tobytes() == labels_again.tobytes()
    assert picture.tobytes() != render(domain, 6)[0].tobytes()


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_class_occurs_and_nothing_but_classes_and_the_ignored_value(scenes, domain):
    values = set(np.unique(scenes[domain][1]).tolist())
    assert values == {*range(TAXONOMY.num_classes), TAXONOMY.ignore_index}


def test_night_is_darker_than_day_and_has_another_street_under_the_same_seed(scenes):
    (day, day_labels), (night, night_labels) = scenes["day"], scenes["night"]
    assert night.mean() < 0.8 * day.mean()
    assert (day_labels != night_labels).any(axis=(1, 2)).all()


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_picture_has_the_size_that_was_asked_for(domain):
    picture, labels = render(domain, 0, height=48, width=80)
    assert (picture.shape, picture.dtype) == ((48, 80, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((48, 80), np.uint8)


def test_a_data_set_holds_images_labels_and_its_classes(tmp_path):
    write_dataset(tmp_path, domain="night", count=3, seed=2)
    names = ["night_00000.png", "night_00001.png", "night_00002.png"]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == names
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == names
    classes = json.loads((tmp_path / "classes.json").read_text())
    assert Taxonomy.from_dict(classes) == TAXONOMY
    picture, labels = render("night", 2_000_001)
    written = decode_image(str(tmp_path / "images" / names[1]))
    assert torch.equal(written.permute(1, 2, 0), torch.from_numpy(picture))
    written = decode_image(str(tmp_path / "labels" / names[1]))
    assert torch.equal(written[0], torch.from_numpy(labels))


def test_progress_sees_every_picture(tmp_path):
    seen = []

    def count(indices):
        for index in indices:
            yield index
            seen.append(index)

    write_dataset(tmp_path, domain="day", count=2, seed=0, progress=count)
    assert seen == [0, 1]
