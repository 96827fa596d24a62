"""`python -m jobs.predict` on photographs of all kinds, and `sepico.load(path).predict(image)`."""

import io
import json
import shutil

import numpy as np
import pytest
import ray
import torch
from PIL import Image

import sepico
from cluster.datasets import read_taxonomy
from cluster.layouts import DATASETS
from cluster.prediction import PredictConfig, check, predict
from cluster.predictor import PredictImages
from cluster.storage import StorageConfig, open_storage
from sepico.config import ModelConfig
from sepico.network import build_segmentor
from tests.conftest import NUM_CLASSES
from tests.jobs.training import run_job

pytestmark = pytest.mark.usefixtures("joined")


@pytest.fixture(scope="module")
def photos(folder, tmp_path_factory):
    """Three images of 64x48, one of another size, one to be turned, and one that is none."""
    root = tmp_path_factory.mktemp("photos") / "in"
    (root / "more").mkdir(parents=True)
    for i in range(3):
        shutil.copy(folder / f"images/frame{i:03d}.jpg", root)
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (50, 90, 3), np.uint8))
    pixels.save(root / "more/other.PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels.save(root / "more/turned.jpeg", exif=exif)
    (root / "broken.jpg").write_bytes((root / "frame000.jpg").read_bytes()[:20])
    return root


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    to = tmp_path_factory.mktemp("exported")
    job = run_job("jobs.export", {"run": str(trained[0]), "to": str(to)})
    assert job.returncode == 0, job.stderr
    return to


@pytest.fixture(scope="module")
def predicted(photos, trained, s3):
    """The job from files into a bucket with two workers; its options and where it wrote."""
    options = {
        "images": str(photos),
        "to": f"{s3.make_bucket('predictions')}/a",
        "run": str(trained[0]),
        "workers": "2",
        "batch": "2",
        "storage.endpoint": s3.endpoint,
    }
    job = run_job("jobs.predict", options)
    assert job.returncode == 0, job.stderr
    assert "predicted 5 images" in job.stdout and "1 could not be" in job.stdout
    assert "not predicted" in job.stderr and "broken.jpg does not decode" in job.stderr
    return options, open_storage(options["to"], StorageConfig(endpoint=s3.endpoint))


def read(store, key):
    return np.asarray(Image.open(io.BytesIO(store.get(key))))


def test_every_image_gets_labels_an_overlay_and_confidences_in_its_size(predicted):
    _, store = predicted
    stems = ["frame000", "frame001", "frame002", "more/other", "more/turned"]
    kinds = {"labels": "png", "overlays": "jpg", "confidence": "png"}
    expected = [f"{kind}/{stem}.{suffix}" for kind, suffix in kinds.items() for stem in stems]
    assert store.list() == sorted([*expected, "predictions.json"])
    assert read(store, "labels/more/other.png").shape == (50, 90)
    assert read(store, "labels/more/turned.png").shape == (90, 50)
    assert read(store, "overlays/more/turned.jpg").shape == (90, 50, 3)
    assert read(store, "labels/frame000.png").max() < 5
    assert read(store, "confidence/frame000.png").min() >= 255 // 5


def test_what_could_not_be_predicted_is_listed_beside_the_predictions(predicted):
    description = json.loads(predicted[1].get("predictions.json"))
    assert list(description["failed"]) == ["broken.jpg"]
    assert description["origin"]["step"] == 6


def test_started_again_it_predicts_only_what_is_missing(predicted, trained):
    options, store = predicted
    expected = store.get("labels/frame001.png")
    store.delete("labels/frame001.png")
    before = {key: store.describe(key) for key in store.list("labels")}
    config = PredictConfig(
        images=options["images"],
        to=options["to"],
        run=options["run"],
        storage=StorageConfig(endpoint=options["storage.endpoint"]),
    )
    result = predict(config)
    assert (result["predicted"], result["done"]) == (1, 4)
    assert store.get("labels/frame001.png") == expected
    assert {key: store.describe(key) for key in before} == before


def test_the_python_interface_answers_as_the_job(predicted, exported, photos):
    _, store = predicted
    predictor = sepico.load(exported)
    for stem, file in {"frame002": "frame002.jpg", "more/turned": "more/turned.jpeg"}.items():
        found = predictor.predict(photos / file)
        assert (found.labels == read(store, f"labels/{stem}.png")).mean() > 0.999
    assert predictor.taxonomy.names[0] == "class0"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "--run NAME_OR_URL, --exported FOLDER and --checkpoint"),
        ({"run": "a", "checkpoint": "b.pth"}, "run and checkpoint given"),
        ({"run": "RUN", "to": "PHOTOS/out"}, "lies below images"),
        ({"run": "RUN", "ids": "label"}, "ids label is for the classes of Cityscapes"),
        ({"run": "RUN", "images": "EMPTY"}, "no images .* below .*EMPTY"),
        ({"run": "RUN", "images": "TWINS"}, "a.jpg and a.png of .* have one stem"),
        ({"run": "EMPTY/none"}, "no run at"),
        ({"exported": "EMPTY"}, "no exported network at"),
        (
            {"run": "RUN", "to": "s3://predictions/a", "ids": "train", "network": "teacher"},
            "origin",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_prediction_refuses(change, words, trained, photos, predicted, s3, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "TWINS").mkdir()
    for name in ("a.jpg", "a.png"):
        (tmp_path / "TWINS" / name).touch()
    options = {"images": "PHOTOS", "to": str(tmp_path / "to"), **change}
    for key, value in options.items():
        value = value.replace("RUN", str(trained[0])).replace("PHOTOS", str(photos))
        options[key] = str(tmp_path / value) if value.startswith(("EMPTY", "TWINS")) else value
    with pytest.raises(ValueError, match=words) as refused:
        check(PredictConfig(**options, storage=StorageConfig(endpoint=s3.endpoint)))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "to").exists()


def test_a_folder_of_broken_images_is_an_error(trained, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of 1 images: .*a.png does not decode"):
        predict(PredictConfig(str(tmp_path / "in"), str(tmp_path / "to"), run=str(trained[0])))


def test_images_that_do_not_fit_together_are_predicted_one_by_one():
    """A GPU whose memory is too small for two, which a CPU cannot be."""

    class Small:
        def predict_batch(self, images):
            if len(images) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return [int(images.max())]

    actor = object.__new__(PredictImages)
    actor._predictor = Small()
    images = [torch.full((3, 4, 4), value, dtype=torch.uint8) for value in (1, 2, 3)]
    assert actor._predict(images) == [1, 2, 3]


def test_an_image_of_a_size_that_the_network_asserts_not_to_be_is_refused_alone(
    make_folder, tmp_path, monkeypatch
):
    (tmp_path / "in").mkdir()
    for name, size in (("fits", (256, 256)), ("other", (48, 64))):
        folder = make_folder(tmp_path / name, count=1, size=size)
        (folder / "images/frame000.jpg").rename(tmp_path / f"in/{name}.jpg")
    model = ModelConfig("tu-halonet26t", None, num_classes=NUM_CLASSES, head_channels=8)
    network = build_segmentor(model, with_projection=False).eval()
    taxonomy = read_taxonomy(folder, DATASETS["folder"], None)
    config = PredictConfig(str(tmp_path / "in"), str(tmp_path / "to"), run="any")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the tests' process
    predict_images = PredictImages(config, taxonomy, ray.put(network))
    answer = predict_images({"key": np.array(["fits.jpg", "other.jpg"])})
    assert answer["error"] == ["", "other.jpg of 64x48 pixels: it asserts another size"]
    assert (tmp_path / "to/labels/fits.png").exists()
