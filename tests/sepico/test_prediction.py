"""Windows, scales and mirrored views answer as one picture; files are read as they are meant."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from torch import nn

import sepico
from sepico.config import ModelConfig
from sepico.exported import DESCRIPTION, WEIGHTS
from sepico.network import build_segmentor
from sepico.prediction import InferenceConfig, Predictor, class_probabilities, decode
from sepico.taxonomies import Taxonomy

TAXONOMY = Taxonomy(("dark", "red", "green"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)))


class PixelNetwork(nn.Module):
    """Classifies every pixel by its own colour, so that the truth of any view is known."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.sizes: list[tuple[int, int]] = []

    def normalize(self, images):
        return images

    def forward(self, images, *, projections):
        self.sizes.append(tuple(images.shape[-2:]))
        red, green, _ = images.unbind(1)
        return 20 * torch.stack([torch.full_like(red, 0.25), red, green], 1), None


@pytest.fixture
def network():
    return PixelNetwork()


@pytest.fixture
def images():
    return torch.rand(2, 3, 37, 53, generator=torch.Generator().manual_seed(1))


WINDOWS = [("16x16", None), ("16x16", "5x7"), ("53x37", None), ("99x99", "9x9"), ("20x37", "20x37")]


@pytest.mark.parametrize(("window", "stride"), WINDOWS)
def test_windows_cover_every_pixel_and_answer_as_the_whole_image(network, images, window, stride):
    whole = class_probabilities(network, images, InferenceConfig())
    slid = class_probabilities(network, images, InferenceConfig(window=window, stride=stride))
    assert torch.allclose(slid, whole, atol=1e-5)


def test_a_mirrored_view_is_turned_back(network, images):
    whole = class_probabilities(network, images, InferenceConfig())
    both = class_probabilities(network, images, InferenceConfig(flip=True))
    assert torch.allclose(both, whole, atol=1e-6)
    assert len(network.sizes) == 3


def test_scales_are_averaged_in_the_size_of_the_image(network, images):
    found = class_probabilities(network, images, InferenceConfig(scales=(0.5, 1.0, 2.0)))
    assert network.sizes == [(18, 26), (37, 53), (74, 106)]
    assert found.shape == (2, 3, 37, 53)
    assert torch.allclose(found.sum(1), torch.ones(2, 37, 53), atol=1e-5)
    alone = [
        class_probabilities(network, images, InferenceConfig(scales=(s,))) for s in (0.5, 1, 2)
    ]
    assert torch.allclose(found, torch.stack(alone).mean(0), atol=1e-6)


def test_the_network_sees_the_size_that_was_asked_for(network, images):
    found = class_probabilities(network, images, InferenceConfig(size="32x16", flip=True))
    assert network.sizes == [(16, 32)] * 2
    assert found.shape[-2:] == (37, 53)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": "big"}, "inference.window 'big' must be WIDTHxHEIGHT"),
        ({"stride": "8x8"}, "without inference.window"),
        ({"window": "8x8", "stride": "9x8"}, "larger than inference.window"),
        ({"scales": (1.0, 0.0)}, "above 0"),
        ({"scales": ()}, "above 0"),
    ],
)
def test_inference_that_makes_no_sense_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        InferenceConfig(**options)


def test_a_photograph_that_was_taken_upright_is_predicted_upright(network, tmp_path):
    pixels = np.zeros((16, 40, 3), np.uint8)
    pixels[:, 20:] = (255, 0, 0)  # lies on its side: the sensor's rows are the picture's columns
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees to see it
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    found = Predictor(network, TAXONOMY).predict(tmp_path / "a.jpg")
    assert found.labels.shape == found.confidence.shape == (40, 16)
    assert (found.labels[:18] == 0).all() and (found.labels[22:] == 1).all()
    assert found.image.shape == found.overlay().shape == (40, 16, 3)


def test_arrays_are_predicted_with_confidence_and_colours(network):
    image = np.full((4, 6, 3), (0, 255, 0), np.uint8)
    found = Predictor(network, TAXONOMY).predict(image)
    assert (found.labels == 2).all() and found.labels.dtype == np.uint8
    assert (found.confidence > 0.99).all()
    assert (found.colored() == (0, 255, 0)).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_grey_palette_and_transparent_images_become_rgb(mode):
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (102, 102, 102)).convert(mode).save(buffer, "png")
    planes = decode(buffer.getvalue(), "a.png")
    assert planes.shape == (3, 4, 5)
    assert (planes == 102).all()


@pytest.mark.parametrize("content", ["16-bit PNG", "does not decode"])
def test_what_is_no_8_bit_image_is_named(content):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(buffer, "png")
    data = buffer.getvalue() if "16" in content else b"\x89PNG and nothing else"
    with pytest.raises(ValueError, match=f"street.png .*{content}"):
        decode(data, "street.png")


@pytest.fixture
def exported_folder(tmp_path):
    """A small network as `jobs.export` writes it."""
    model = {"encoder": "tu-test_efficientnet", "encoder_weights": None, "head_channels": 8}
    model |= {"head_dilations": [1], "num_classes": 3}
    network = build_segmentor(ModelConfig(**model), with_projection=False)
    (tmp_path / WEIGHTS).write_bytes(save(network.state_dict()))
    description = {"model": model, "taxonomy": TAXONOMY.to_dict(), "origin": {}}
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    return tmp_path


def test_an_exported_network_predicts_in_two_calls(exported_folder):
    predictor = sepico.load(exported_folder)
    found = predictor.predict(np.zeros((45, 70, 3), np.uint8))
    assert found.labels.shape == (45, 70) and found.labels.max() < 3
    assert predictor.taxonomy == TAXONOMY


@pytest.mark.parametrize("damage", [WEIGHTS, DESCRIPTION])
def test_a_damaged_exported_network_is_one_line(exported_folder, damage):
    path = exported_folder / damage
    path.unlink() if damage == DESCRIPTION else path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="export") as refused:
        sepico.load(exported_folder)
    assert "\n" not in str(refused.value)
