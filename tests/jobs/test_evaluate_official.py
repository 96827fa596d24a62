"""`python -m jobs.evaluate`: the authors' weights on our data, and which data are refused."""

import json
import shutil

import pytest

from cluster.evaluation import EvaluateConfig, evaluate
from cluster.report import ReportConfig, check
from cluster.storage import StorageConfig, open_storage
from tests.conftest import NUM_CLASSES
from tests.jobs.training import run_job
from tests.sepico.test_import_official import LAST_BIAS, saved, state, stored

__all__ = ["state", "stored"]  # fixtures


@pytest.fixture
def checkpoint(state, tmp_path):
    """A file of the DeepLab-v2 network, all zeros, with as many classes as the test data."""
    return saved(
        tmp_path,
        {
            key: value[:NUM_CLASSES] if ".aspp_modules." in key else value
            for key, value in state.items()
        },
    )


def test_a_file_of_the_authors_is_evaluated_by_two_workers(checkpoint, data, joined, tmp_path):
    options = {
        "checkpoint": str(checkpoint),
        "data": data["data.source"],
        "runs": str(tmp_path / "runs"),
        "workers": "2",
    }
    job = run_job("jobs.evaluate", options)
    assert job.returncode == 0, job.stderr
    (written,) = (tmp_path / "runs/evaluation").glob("official-labelled-*.json")
    report = json.loads(written.read_text())
    # Equal logits everywhere: the first class wins every pixel.
    ious = list(report["rows"]["student"]["iou"].values())
    assert ious[0] > 0
    assert ious[1:] == [0] * (NUM_CLASSES - 1)
    assert str(checkpoint) in job.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["--run", "--checkpoint", "exactly one"]),
        ({"run": "a", "checkpoint": "b.pth"}, ["--run", "--checkpoint", "exactly one"]),
        ({"checkpoint": "b.pth"}, ["--data"]),
        ({"checkpoint": "nowhere/b.pth", "data": "shards"}, ["nowhere/b.pth"]),
    ],
    ids=["neither", "both", "no-data", "no-file"],
)
def test_evaluation_refuses(options, words, tmp_path):
    assert_refused({**options, "runs": str(tmp_path)}, words)


def test_a_file_that_does_not_fit_is_refused_before_work_starts(state, data, tmp_path):
    path = saved(tmp_path, {key: value for key, value in state.items() if key != LAST_BIAS})
    options = {"checkpoint": str(path), "data": data["data.source"], "runs": str(tmp_path)}
    assert_refused(options, [path.name, "missing", LAST_BIAS])


def test_another_number_of_classes_is_refused_before_work_starts(state, data, tmp_path):
    path = saved(tmp_path, state)
    options = {"checkpoint": str(path), "data": data["data.source"], "runs": str(tmp_path)}
    assert_refused(options, [path.name, "19 classes", f"has {NUM_CLASSES}"])


def test_images_of_several_sizes_to_adapt_to_are_refused_before_work_starts(
    checkpoint, data, make_folder, write_dataset, tmp_path
):
    mixed = make_folder(tmp_path / "mixed", count=2)
    other = make_folder(tmp_path / "other", count=1, size=(56, 64))
    (other / "images/frame000.jpg").replace(mixed / "images/frame000.jpg")
    url = (tmp_path / "shards").as_uri()
    write_dataset(mixed, open_storage(url, StorageConfig()), labels=False)
    options = {"checkpoint": str(checkpoint), "data": data["data.source"], "adapt_data": url}
    assert_refused({**options, "runs": str(tmp_path)}, [f"{url} differ in size", "--size"])


def test_labels_with_the_classes_in_another_order_are_refused(
    trained, folder, write_dataset, tmp_path
):
    classes = json.loads((folder / "classes.json").read_text())
    one, three = (classes["classes"][i] for i in (1, 3))
    one["name"], three["name"] = three["name"], one["name"]
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "classes.json").write_text(json.dumps(classes))
    shards = str(tmp_path / "shards")
    write_dataset(other, open_storage(shards, StorageConfig()))
    run = str(trained[0])
    with pytest.raises(ValueError, match=r"with 'class1' as class 1, .*shards has 'class3' there"):
        evaluate(EvaluateConfig(run=run, data=shards))
    with pytest.raises(ValueError, match="labelled with the runs' classes: class0, class1, "):
        check(ReportConfig(run=[run], data=shards, to=str(tmp_path / "report.html")))
    renamed = shutil.copytree(run, tmp_path / "renamed")
    config = json.loads((renamed / "config.json").read_text())
    config["classes"].reverse()
    (renamed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="classes, or their order, differ"):
        check(ReportConfig(run=[run, str(renamed)], to=str(tmp_path / "report.html")))


def assert_refused(options: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ValueError, match=words[0]) as refused:
        evaluate(EvaluateConfig(**options))
    assert "\n" not in str(refused.value)
    assert all(word in str(refused.value) for word in words), refused.value
