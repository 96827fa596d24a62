"""What every encoder, head and projection mode answers with."""

import pytest
import torch
from torch import nn

from sepico.config import ModelConfig
from sepico.network import build_blank, build_segmentor, check_model

CLASSES, WIDTH = 5, 8


def config(**changes) -> ModelConfig:
    options = {
        "encoder": "tu-test_efficientnet",
        "encoder_weights": None,
        "head_channels": 8,
        "projection_channels": WIDTH,
        "num_classes": CLASSES,
    }
    return ModelConfig(**{**options, **changes})


@pytest.mark.parametrize(
    "encoder",
    [
        "resnet18",
        "mobilenet_v2",
        "mobileone_s0",
        "mit_b0",
        "timm-skresnet18",
        "tu-test_resnet",
        "tu-test_convnext",  # starts at stride 4
        "tu-mobilenetv3_small_050",
        "vgg11",  # its last stage is a pooling layer
    ],
)
def test_every_kind_of_encoder_feeds_both_heads(encoder):
    images = torch.zeros(2, 3, 64, 96)
    for head, stride in (("daformer", 4), ("deeplabv2", 32)):
        segmentor = build_blank(config(encoder=encoder, head=head)).eval()
        logits, projections = segmentor(images)
        assert logits.shape == (2, CLASSES, 64 // stride, 96 // stride)
        assert projections.shape == (2, WIDTH, 16, 24)


@pytest.mark.parametrize(
    "encoder", ["resnet18", "mit_b0", "tu-test_resnet", "tu-test_convnext", "tu-pvt_v2_b0"]
)
def test_a_network_for_loaded_weights_draws_none_and_is_otherwise_the_same(encoder):
    donor = build_segmentor(config(encoder=encoder)).eval()
    state = torch.get_rng_state()
    blank = build_blank(config(encoder=encoder, encoder_weights="not read")).eval()
    assert torch.equal(torch.get_rng_state(), state)
    blank.load_state_dict(donor.state_dict())
    images = torch.rand(1, 3, 64, 64)
    for ours, want in zip(blank(images), donor(images), strict=True):
        assert torch.equal(ours, want)


def test_what_a_network_for_loaded_weights_computes_itself_is_computed(monkeypatch):
    class Scaled(nn.Identity):
        def __init__(self, *_):
            super().__init__()
            self.register_buffer("scale", torch.ones(3).mul_(2).add_(1).clamp_(max=2.5), False)

    monkeypatch.setattr("sepico.network._decode_head", Scaled)
    assert build_blank(config()).head.scale.tolist() == [2.5, 2.5, 2.5]


@pytest.mark.parametrize("encoder", ["resnet18", "mit_b0", "tu-resnet18", "tu-test_convnext"])
@pytest.mark.parametrize("stride", [8, 16])
def test_output_stride_sets_the_grid_of_the_last_stage(encoder, stride):
    options = {"encoder": encoder, "output_stride": stride, "projection_stages": (3,)}
    segmentor = build_blank(config(head="deeplabv2", **options)).eval()
    logits, projections = segmentor(torch.zeros(1, 3, 64, 96))
    assert logits.shape[-2:] == projections.shape[-2:] == (64 // stride, 96 // stride)


def test_per_layer_projections_are_one_a_stage_on_its_own_grid():
    segmentor = build_segmentor(config(projection_mode="per_layer", projection_stages=(0, 2, 3)))
    _, projections = segmentor(torch.rand(2, 3, 64, 96))
    assert [tuple(p.shape) for p in projections] == [
        (2, WIDTH, 16, 24),
        (2, WIDTH, 4, 6),
        (2, WIDTH, 2, 3),
    ]
    for projection in projections:
        norms = projection.norm(dim=1)
        # Behind a ReLU a narrow projection may be zero.
        assert ((norms - 1).abs().lt(1e-5) | norms.eq(0)).all()
        assert norms.max() > 0


def test_stages_convolved_before_resizing_equal_the_resized_concatenation():
    segmentor = build_segmentor(config())
    reduce = segmentor.projection.reduce
    features = segmentor.encoder(torch.rand(1, 3, 64, 96))[-4:]
    resized = [
        nn.functional.interpolate(feature, features[0].shape[-2:], mode="bilinear")
        for feature in features
    ]
    expected = nn.functional.conv2d(torch.cat(resized, 1), reduce.weight)
    assert torch.allclose(reduce(features), expected, atol=1e-5)


def test_parts_that_are_not_asked_for_are_none():
    images = torch.zeros(1, 3, 32, 32)
    segmentor = build_segmentor(config()).eval()
    assert segmentor(images, logits=False)[0] is None
    assert segmentor(images, projections=False)[1] is None
    assert build_segmentor(config(), with_projection=False).eval()(images)[1] is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder": "no_such_encoder"}, ["model.encoder", "no_such_encoder"]),
        ({"encoder": "tu-no_such_encoder"}, ["model.encoder", "no_such_encoder"]),
        ({"encoder": "tu-vit_tiny_patch16_224"}, ["model.encoder", "tu-vit_tiny_patch16_224"]),
        ({"encoder": "tu-nest_tiny"}, ["model.encoder", "tu-nest_tiny", "too few stages"]),
        ({"encoder": "vgg11", "output_stride": 8}, ["vgg11", "model.output_stride 8"]),
        ({"num_classes": 0}, ["model.num_classes"]),
        ({"encoder_weights": "nowhere.pth"}, ["model.encoder_weights", "nowhere.pth"]),
    ],
)
def test_a_network_that_cannot_be_built_is_refused_in_one_line(changes, words):
    with pytest.raises(ValueError, match=words[0]) as refused:
        build_segmentor(config(**changes))
    assert all(word in str(refused.value) for word in words)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "crop"),
    [
        ({}, (64, 90)),
        ({"projection_mode": "per_layer"}, (48, 64)),  # no multiple of stage 3's stride
        ({"encoder": "tu-swin_tiny_patch4_window7_224"}, (64, 96)),  # fixed to 224
    ],
)
def test_a_crop_the_network_cannot_take_is_refused(changes, crop):
    with pytest.raises(ValueError, match=f"data.crop_height {crop[0]}"):
        check_model(config(**changes), crop)


@pytest.mark.parametrize(
    ("encoder", "output_stride", "crop"),
    [("resnet18", 32, (620, 620)), ("mit_b0", 32, (48, 48)), ("resnet18", 8, (42, 42))],
)
def test_a_crop_that_a_rounded_grid_divides_is_refused_with_the_stride(
    encoder, output_stride, crop
):
    options = {"output_stride": output_stride, "head": "deeplabv2", "projection_stages": (3,)}
    with pytest.raises(ValueError, match=f"stride {output_stride}: choose multiples"):
        check_model(config(encoder=encoder, **options), crop)


def test_a_crop_needs_to_divide_by_the_strides_of_the_outputs_alone():
    check_model(config(encoder="mit_b0"), (620, 612))  # both grids lie at stride 4


def test_whole_images_the_network_cannot_take_are_refused_with_their_data():
    swin = config(encoder="tu-swin_tiny_patch4_window7_224")
    check_model(swin, (224, 224), whole={"file:///night": (224, 224)})
    with pytest.raises(ValueError, match="takes no 320x240 images of file:///night: "):
        check_model(swin, (224, 224), whole={"file:///night": (240, 320)})


def test_an_encoder_that_asserts_another_size_is_named():
    with pytest.raises(ValueError, match="crop_width 224: it asserts another size"):
        check_model(config(encoder="tu-halonet26t"), (224, 224))


@pytest.mark.parametrize("encoder", ["resnet18", "mit_b0", "densenet121", "tu-test_resnet"])
def test_encoder_weights_come_from_a_file_of_a_whole_classifier(encoder, tmp_path):
    donor = build_segmentor(config(encoder=encoder)).encoder
    weights = getattr(donor, "model", donor).state_dict()
    path = tmp_path / "encoder.pth"
    torch.save({**weights, "classifier.odd": torch.zeros(1)}, path)
    loaded = build_segmentor(config(encoder=encoder, encoder_weights=str(path))).encoder
    for key, value in donor.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"junk", "no weights file that loads safely"), ({"a": torch.zeros(1)}, "lacks")],
)
def test_a_wrong_file_of_encoder_weights_is_refused(content, words, tmp_path):
    path = tmp_path / "encoder.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=words) as refused:
        build_segmentor(config(encoder_weights=str(path)))
    assert str(path) in str(refused.value)
