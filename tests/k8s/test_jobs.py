"""`python -m jobs.k8s` renders a job that nothing is wrong with, or refuses it."""

import os
import subprocess
import sys

import pytest

from cluster.errors import WorkError
from jobs.k8s import NamedJob, TrainJob, build, status
from tests.k8s.manifests import find, problems, words

DATA = {"bucket": "s3://b", "source": "shards/day", "target": "s3://other/night"}


def test_a_rendered_job_has_what_was_asked_for_and_nothing_wrong(rendered):
    asked = {
        "preset": "cityscapes2darkzurich_daformer_distcl",
        "validation": "shards/val",
        "workers": 8,
        "min_workers": 2,
        "gpu": "NVIDIA-H100-80GB-HBM3",
        "image": "registry.example.com/mine:1",
        "options": "--optimization.global_batch 8 --optimization.scale_lr sqrt",
    }
    job = build(TrainJob("night-1", **DATA, **asked))
    assert problems([job, find(rendered["gpu"], "ConfigMap", "sepico")]) == []
    assert job["metadata"]["name"] == "night-1" and "suspend" not in job["spec"]
    command = words(job["spec"]["entrypoint"], {})
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options["--run"] == "s3://b/runs/night-1"
    assert options["--data.source"] == "s3://b/shards/day"
    assert options["--data.target"] == "s3://other/night"
    assert options["--workers.max"] == "8" and options["--optimization.scale_lr"] == "sqrt"
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (1, 8, 8)
    pod = group["template"]["spec"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": asked["gpu"]}
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    submitter = job["spec"]["submitterPodTemplate"]["spec"]
    for spec in (pod, head, submitter):
        assert spec["containers"][0]["image"] == asked["image"]


def test_a_job_has_no_pods_that_make_no_step_faster():
    asked = {"workers": 7, "min_workers": 2, "options": "--optimization.global_batch 8"}
    (group,) = build(TrainJob("run", **DATA, **asked))["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["maxReplicas"]) == (4, 4)


def test_a_job_has_the_options_of_its_overlay_before_its_own():
    job = build(TrainJob("run", **DATA, overlay="production", options="--data.cache /other"))
    command = words(job["spec"]["entrypoint"], {})
    assert command.index("--data.cache_bytes") < command.index("/other")
    assert command[command.index("/cache") - 1] == "--data.cache"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("x" * 48, {}, "at most 47"),
        ("My_run", {}, "lower-case"),
        ("run", {"bucket": "/data"}, "no URL"),
        ("run", {"target": ""}, "--target"),
        ("run", {"overlay": "none"}, "none"),
    ],
)
def test_a_job_that_kubernetes_could_not_run_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(TrainJob(name, **{**DATA, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "gta"}, "neither a file nor a preset"),
        ({"options": "--optimisation.lr 1"}, "optimisation.lr"),
        ({"workers": 3}, "workers is 3 to 3"),
    ],
)
def test_what_the_run_would_refuse_is_refused_before_it_is_sent(changes, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        build(TrainJob("run", **{**DATA, **changes}))
    assert message in capsys.readouterr().err


def test_a_cluster_that_does_not_answer_is_one_line(unused_port, tmp_path):
    config = tmp_path / "config"
    config.write_text(
        "{apiVersion: v1, kind: Config, current-context: none, contexts: [{name: none, context: "
        "{cluster: none}}], clusters: [{name: none, cluster: "
        f"{{server: 'http://127.0.0.1:{unused_port}'}}}}]}}"
    )
    done = subprocess.run(
        [sys.executable, "-m", "jobs.k8s", "stop", "run"],
        env={**os.environ, "KUBECONFIG": str(config)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: kubectl delete:") and "127.0.0.1" in line


def test_a_kubectl_that_is_killed_is_named_with_its_exit_code(tmp_path, monkeypatch):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text("#!/bin/sh\nkill -9 $$\n")
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WorkError, match="kubectl get: exit code -9"):
        status(NamedJob("run"))
