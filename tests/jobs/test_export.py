"""`python -m jobs.export` on what `python -m jobs.train` left."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from cluster.evaluation import load_network
from cluster.export import ExportConfig, export
from cluster.manifest import read_manifest
from cluster.prediction import PredictConfig, describe_network
from cluster.storage import StorageConfig, open_storage
from sepico.exported import load
from sepico.taxonomies import Taxonomy
from tests.jobs.training import run_job


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_the_exported_network_answers_as_the_run_s(trained, tmp_path, network):
    run, _ = trained
    job = run_job("jobs.export", {"run": str(run), "to": str(tmp_path), "network": network})
    assert job.returncode == 0, job.stderr
    assert f"wrote the {network} of step 6" in job.stdout
    image = torch.rand(1, 3, 32, 64)
    expected, _ = load_network(str(run), StorageConfig(), network)(image)
    assert torch.equal(load(tmp_path)(image)[0], expected)
    assert len(json.loads((tmp_path / "config.json").read_text())["taxonomy"]["classes"]) == 5


@pytest.mark.parametrize("older", [False, True], ids=["data gone", "classes in the data alone"])
def test_classes_and_colours_come_with_the_run(trained, tmp_path, older):
    run = shutil.copytree(trained[0], tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    if older:
        del config["taxonomy"]
    else:
        config["data"]["source"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    export(ExportConfig(run=str(run), to=str(tmp_path / "to")))
    expected = read_manifest(open_storage(trained[1]["data.source"], StorageConfig())).taxonomy
    taxonomy = json.loads((tmp_path / "to/config.json").read_text())["taxonomy"]
    assert Taxonomy.from_dict(taxonomy) == expected
    predicts = PredictConfig(images=".", to=str(tmp_path), run=str(run))
    assert describe_network(predicts)[1] == expected


def test_the_three_lines_need_neither_ray_nor_deepspeed(trained, tmp_path):
    run_job("jobs.export", {"run": str(trained[0]), "to": str(tmp_path)})
    code = (
        "import sys, torch; from sepico.exported import load\n"
        f"network = load({str(tmp_path)!r})\n"
        "network(network.normalize(torch.rand(1, 3, 32, 64)))\n"
        "assert not {'ray', 'deepspeed', 'cluster'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_step_without_checkpoint_is_named(trained, tmp_path):
    job = run_job("jobs.export", {"run": str(trained[0]), "to": str(tmp_path), "step": "4"})
    assert job.returncode == 2
    assert "has no checkpoint of step 4; complete are: 3, 6" in job.stderr
    assert not list(tmp_path.iterdir())
