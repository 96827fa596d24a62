"""The authors' checkpoints against what their own networks answer with the same weights.

`official_network.npz` holds key names, shapes, an image and the authors' outputs; the weights are
made by the rule of `fill`. Projections are kept on every 4th (r101) or 8th (mitb5) grid point.
"""

import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from sepico.import_official import load_official

DATA = Path(__file__).parent.parent / "data" / "official_network.npz"
PROJECTION_STEP = {"r101": 4, "mitb5": 8}


def fill(seed: int, key: str, shape: list[int]) -> torch.Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    philox = np.random.Philox(key=[seed, zlib.crc32(key.encode())])
    values = np.random.Generator(philox).standard_normal(shape).astype(np.float32)
    if key.endswith("running_var"):
        values = 1 + 0.1 * abs(values)
    elif len(shape) == 1:
        values = float(key.endswith("weight")) + 0.1 * values
    else:
        values = values / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    return dict(np.load(DATA))


def official_shapes(stored: dict[str, np.ndarray], name: str) -> dict[str, list[int]]:
    shapes = map(json.loads, stored[f"{name}_shapes"].tolist())
    return dict(zip(stored[f"{name}_keys"].tolist(), shapes, strict=True))


@pytest.fixture(scope="module")
def state(stored) -> dict[str, torch.Tensor]:
    """Zeros of the DeepLab-v2 network's shapes, a few bytes each; copy the dict to change it."""
    shapes = official_shapes(stored, "r101")
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


def saved(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save({"meta": {"iter": 40000}, "state_dict": state}, folder / "official.pth")
    return folder / "official.pth"


@pytest.mark.parametrize("name", ["r101", "mitb5"])
def test_logits_and_projections_are_the_authors(name, stored, tmp_path):
    seed, shapes = int(stored["seed"]), official_shapes(stored, name)
    weights = {key: fill(seed, key, shape) for key, shape in shapes.items()}
    weights["ema_model.backbone.anything"] = torch.zeros(1)  # the teacher is left out
    image = torch.from_numpy(stored["image"])
    with torch.no_grad():
        logits, projection = load_official(saved(tmp_path, weights))(image)

    assert_close(logits, stored[f"{name}_logits"])
    step = PROJECTION_STEP[name]
    assert_close(projection[:, :, ::step, ::step], stored[f"{name}_projection"])
    large = torch.nn.functional.interpolate(logits, image.shape[-2:], mode="bilinear")
    assert (large.argmax(1).numpy() == stored[f"{name}_prediction"]).all()


def assert_close(ours: torch.Tensor, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours.numpy() - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_the_number_of_classes_is_read_from_the_file(state, tmp_path):
    weights = {
        key: value[:16] if ".aspp_modules." in key else value for key, value in state.items()
    }
    logits, _ = load_official(saved(tmp_path, weights))(torch.zeros(1, 3, 32, 32))
    assert logits.shape == (1, 16, 4, 4)


LAST_BIAS = "model.decode_head.aspp_modules.3.conv.bias"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({LAST_BIAS: None}, ["missing", LAST_BIAS]),
        ({"model.backbone.stem.0.weight": None}, ["missing", "model.backbone.stem.0.weight"]),
        ({"model.backbone.odd": torch.zeros(1)}, ["extra", "model.backbone.odd"]),
        ({"odd_model.weight": torch.zeros(1)}, ["extra", "odd_model.weight"]),
        ({LAST_BIAS: torch.zeros(18)}, ["misshapen", LAST_BIAS, "(18,)", "(19,)"]),
    ],
    ids=["missing", "missing-stem", "extra", "extra-elsewhere", "misshapen"],
)
def test_a_file_that_does_not_fit_says_which_key(change, words, state, tmp_path):
    weights = {**state, **change}
    path = saved(tmp_path, {key: value for key, value in weights.items() if value is not None})
    with pytest.raises(ValueError, match=r"official\.pth") as refused:
        load_official(path)
    message = str(refused.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    kinds = {"missing", "extra", "misshapen"} - set(words)
    assert not any(kind in message for kind in kinds), message


def write_text(path: Path) -> None:
    path.write_text("no checkpoint")


def write_half(path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])


def write_code(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Path}, protocol=2))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: None, "no checkpoint file"),
        (write_text, "no weights file that loads safely"),
        (write_half, "no weights file that loads safely"),
        (write_code, "no weights file that loads safely"),
        (lambda path: torch.save([1, 2], path), "state_dict"),
        (lambda path: torch.save({"state_dict": {"a": 1}}, path), "state_dict"),
        (lambda path: torch.save({"state_dict": {"a": torch.zeros(1)}}, path), "'model.'"),
    ],
    ids=["no-file", "text", "half", "code", "list", "no-tensors", "other-network"],
)
def test_a_file_that_is_no_official_checkpoint_is_refused(write, words, tmp_path):
    write(tmp_path / "some.pth")
    with pytest.raises(ValueError, match=r"some\.pth") as refused:
        load_official(tmp_path / "some.pth")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
