"""What `python -m jobs.evaluate` leaves beside its table: pictures, or a benchmark's submission."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from cluster.evaluation import EvaluateConfig, evaluate
from cluster.storage import StorageConfig, open_storage
from sepico.prediction import InferenceConfig

pytestmark = [pytest.mark.usefixtures("joined"), pytest.mark.slow]


def test_worst_images_and_confusion_are_pictured_beside_the_report(trained):
    run, _ = trained
    inference = InferenceConfig(scales=(0.5, 1.0), flip=True, window="32x32")
    report, url = evaluate(EvaluateConfig(run=str(run), workers=2, worst=3, inference=inference))
    folder = run / "evaluation" / url.rpartition("/")[2].removesuffix(".json")
    for row in ("student", "teacher"):
        worst = [image["miou"] for image in report["rows"][row]["worst"]]
        assert len(worst) == 3 and worst == sorted(worst)
        for name in ("confusion", "worst"):
            picture = Image.open(folder / row / f"{name}.png")
            assert min(picture.size) > 200
    written = json.loads((folder.parent / f"{folder.name}.json").read_text())
    assert written == json.loads(json.dumps(report))
    assert report["inference"]["flip"] is True


def test_a_set_without_labels_becomes_the_submission_that_servers_take(trained):
    run, options = trained
    # The network has hardly been trained: 5 classes, none of them likely.
    below = 0.23
    config = EvaluateConfig(
        run=str(run), data=options["data.target"], workers=2, invalid_below=below
    )
    report, _ = evaluate(config)
    place = report["rows"]["student"]["submission"]
    folder, _, name = place.rpartition("/")
    store = open_storage(folder, StorageConfig())
    assert store.list() == [name]  # the workers' parts are gone
    with zipfile.ZipFile(io.BytesIO(store.get(name))) as archive:
        folders = {path.split("/")[0] for path in archive.namelist()}
        assert folders == {"labelTrainIds", "labelTrainIds_invalid", "confidence"}
        assert len(archive.namelist()) == 3 * 12
        read = {
            part: np.stack(
                [
                    np.asarray(Image.open(io.BytesIO(archive.read(f"{part}/frame{i:03d}.png"))))
                    for i in range(12)
                ]
            )
            for part in folders
        }
    labels, valid, sure = (
        read[part] for part in ("labelTrainIds", "labelTrainIds_invalid", "confidence")
    )
    assert labels.dtype == np.uint8 and labels.shape == (12, 48, 64) and labels.max() < 5
    assert sure.dtype == np.uint16
    limit = round(below * 65535)  # which some below and some above are rounded to
    unsure, certain = sure < limit, sure > limit
    assert unsure.any() and certain.any()
    assert (valid[unsure] == 255).all() and (valid[certain] == labels[certain]).all()
