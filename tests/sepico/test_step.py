"""Properties of the step that no stored number shows."""

from dataclasses import replace

import pytest
import torch

from sepico import augment
from sepico.config import AugmentationConfig, ContrastConfig, MethodConfig
from sepico.statistics import FeatureBank
from sepico.step import AdaptationStep
from sepico.taxonomies import Taxonomy
from tests.cluster.engine_ranks import BATCH, build, global_batch, method_config


def test_class_mix_draws_half_of_the_classes_and_never_the_ignore_value():
    labels = torch.tensor([[0, 1, 2, 255], [3, 4, 255, 255]])
    for seed in range(50):
        chosen = augment.draw_mix_classes(labels, seed)
        assert len(chosen) == 3
        assert 255 not in chosen


def test_the_images_of_a_slot_get_the_same_strong_augmentation():
    image = torch.rand(3, 16, 16)
    config = AugmentationConfig()
    first = augment.strong_augment(image, 7, config)
    assert torch.equal(first, augment.strong_augment(image, 7, config))
    assert not torch.equal(first, augment.strong_augment(image, 8, config))


def test_a_taxonomy_survives_its_dictionary():
    taxonomy = Taxonomy(("road", "sky"), ((1, 2, 3), (4, 5, 6)))
    assert Taxonomy.from_dict(taxonomy.to_dict()) == taxonomy


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([{"train_id": 1, "name": "a", "color": [0, 0, 0]}], "train ids must be"),
        ([{"train_id": 0, "name": "a"}], "missing or malformed"),
        ([{"train_id": 0, "name": "a", "color": [0, 0, 300]}], "three integers"),
        ([{"train_id": 0, "name": "a", "color": [0, 0, 0]}], "at least two classes"),
    ],
)
def test_a_malformed_taxonomy_is_refused(classes, message):
    with pytest.raises(ValueError, match=message):
        Taxonomy.from_dict({"classes": classes})


def test_a_full_bank_drops_its_oldest_rows():
    bank = FeatureBank(2, 1, length=3)
    for value in range(5):
        bank.update(torch.full((2, 1), float(value)), torch.tensor([True, False]))
    assert bank.rows(0).flatten().tolist() == [2, 3, 4]
    assert len(bank.rows(1)) == 0
    assert bank.means().flatten().tolist() == [3, 0]
    restored = FeatureBank(2, 1, length=3)
    restored.load_state_dict(bank.state_dict())
    assert restored.rows(0).tolist() == bank.rows(0).tolist()


def test_stage_weights_need_one_projection_a_stage():
    with pytest.raises(ValueError, match=r"stage_weights has 2 weights"):
        MethodConfig(contrast=ContrastConfig(stage_weights=(1.0, 0.5)))


@pytest.mark.parametrize("method", ["protocl", "distcl", "bankcl"])
def test_without_a_confident_pixel_the_target_is_not_contrasted(method):
    config = method_config(method, start=0)
    config = replace(config, teacher=replace(config.teacher, threshold=2.0))
    network, teacher, contrast = build(config)
    step = AdaptationStep(config, network.normalize, teacher, contrast)
    terms = step.terms(network, global_batch(0, range(BATCH)), 0)
    source, target, _ = ((term.item(), term.requires_grad) for term in terms)
    assert step.metrics["confident_share"] == 0
    assert source[0] > 0
    assert target == (0, True)
    assert step.metrics["target_contrast"] == step.metrics["target_regularizer"] == 0
    assert step.metrics["source_contrast"] > 0
