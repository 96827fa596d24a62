"""Jobs on GPUs: a run whose last checkpoint is lost goes on, and what others make of it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from cluster.checkpoint_format import list_checkpoints
from cluster.storage import StorageConfig, open_storage
from tests.jobs.training import STEPS, TINY, final_weights, metrics, run_job

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="needs a CUDA device: pytest -m gpu"),
]


@pytest.fixture(scope="module", params=["fp32", "auto"])
def options(request, data, tmp_path_factory) -> dict[str, str]:
    """Those of a finished run, under ZeRO-3."""
    changed = {
        "runs": str(tmp_path_factory.mktemp("runs")),
        "run": "first",
        "workers": str(min(GPUS, 2)),
        "engine.zero_stage": "3",
        "engine.precision": request.param,
    }
    job = run_job("jobs.train", {**TINY, **data, **changed})
    assert job.returncode == 0, job.stderr
    return {**TINY, **data, **changed}


@pytest.fixture
def finished(options) -> Path:
    return Path(options["runs"], options["run"])


def test_a_run_on_gpus_computes_the_same_after_a_loss(options, finished):
    undisturbed, before = final_weights(finished), metrics(finished)
    last = list_checkpoints(open_storage(str(finished), StorageConfig()))[-1]
    shutil.rmtree(finished / last.prefix)
    kept = list_checkpoints(open_storage(str(finished), StorageConfig()))[-1].step
    start = final_weights(finished)
    again = run_job("jobs.train", options)
    assert again.returncode == 0, again.stderr
    after = metrics(finished)
    assert [line for line in after if line["step"] < kept] == [
        line for line in before if line["step"] < kept
    ], "it began anew"
    lines = [line for line in after if "mix_ce" in line]
    assert {line["step"] for line in lines} == set(range(STEPS))
    assert all(math.isfinite(line[term]) for line in lines for term in ("source_ce", "mix_ce"))
    gap = moved = 0.0
    for name, weight in final_weights(finished).items():
        gap += (weight - undisturbed[name]).square().sum().item()
        moved += (undisturbed[name] - start[name]).square().sum().item()
    assert gap <= 0.2**2 * moved  # CUDA adds up in another order, and Adam divides by it
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["gpu"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("job", ["evaluate", "predict", "export"])
def test_jobs_take_a_run_of_gpus(job, options, folder, tmp_path):
    of_job = {
        "evaluate": {},
        "predict": {"images": str(folder / "images"), "to": str(tmp_path)},
        "export": {"to": str(tmp_path)},
    }
    run = {name: options[name] for name in ("run", "runs")}
    answer = run_job(f"jobs.{job}", run | of_job[job])
    assert answer.returncode == 0, answer.stderr
