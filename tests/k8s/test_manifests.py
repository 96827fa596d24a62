"""Every overlay and every component renders to objects in which nothing is wrong."""

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from cluster.manifest import read_manifest
from cluster.storage import StorageConfig, open_storage
from jobs.demo import DATA_SETS, DemoConfig, dry_run
from jobs.k8s import TrainJob, build
from tests.k8s.crds import EXTRACT, extract
from tests.k8s.manifests import (
    K8S,
    OVERLAYS,
    Object,
    find,
    pod_templates,
    problems,
    render,
    words,
)

SHARED = K8S.parents[1] / "shared" / "kuberay"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_is_wrong_with_an_overlay(rendered, overlay):
    assert problems(rendered[overlay]) == []


@pytest.fixture(scope="module")
def with_scheduler(k8s) -> dict[str, Path]:
    """The gpu overlay with a scheduler's component, by its name."""
    folders = {}
    for component in ("kueue", "volcano"):
        folders[component] = folder = k8s / "overlays" / f"gpu-{component}"
        folder.mkdir()
        kustomization = {
            "resources": ["../gpu"],
            "components": [f"../../components/{component}"],
            "transformers": ["../../one-cluster"],
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folders


def queue(o: Object) -> list[str]:
    """The names of the queues in an object's labels."""
    labels = o["metadata"].get("labels", {})
    return [name for key, name in labels.items() if key.endswith("/queue-name")]


@pytest.mark.parametrize("component", ["kueue", "volcano"])
def test_nothing_is_wrong_with_a_scheduler_in_the_gpu_overlay(with_scheduler, component):
    assert problems(render(with_scheduler[component])) == []
    job = build(TrainJob("run", "demo", "s3://b", "a", "b", overlay=with_scheduler[component]))
    assert queue(job) == ["sepico"]


def test_kueue_which_starts_what_is_in_a_queue_finds_no_pattern_there(with_scheduler):
    assert not any(queue(o) for o in render(with_scheduler["kueue"]))


def test_pods_that_wait_for_the_others_give_their_accelerators_back(rendered, with_scheduler):
    for name in ("train", "sweep"):
        job = find(rendered["gpu"], "RayJob", name)
        assert job["spec"]["preRunningDeadlineSeconds"] == 3600
        # Volcano's hold none before all of them start.
        job = find(render(with_scheduler["volcano"]), "RayJob", name)
        assert "preRunningDeadlineSeconds" not in job["spec"]


def test_a_run_that_fails_is_tried_once_more(rendered):
    assert find(rendered["gpu"], "RayJob", "train")["spec"]["backoffLimit"] == 1


def requested(pod: Object, name: str) -> float:
    """Cores, or GB of memory, that a pod requests."""

    def of(container: Object) -> float:
        quantity = container["resources"]["requests"][name]
        number, unit = re.fullmatch(r"(\d+)(m|Gi|)", quantity).groups()
        return int(number) * {"": 1, "m": 1e-3, "Gi": 1.024**3}[unit]

    return max(sum(map(of, pod["containers"])), *map(of, pod.get("initContainers", [])), 0)


def test_the_local_overlay_fits_where_it_says(rendered):
    text = (K8S / "overlays/local-cpu/kustomization.yaml").read_text()
    cores, gigabytes = map(int, re.search(r"(\d+) cores, (\d+) GB", text).groups())
    train = find(rendered["local-cpu"], "RayJob", "train")
    (group,) = train["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    store = find(rendered["local-cpu"], "StatefulSet", "seaweedfs")
    submitter, head, worker = pod_templates(train)
    templates = [submitter, head, *[worker] * group["replicas"], *pod_templates(store)]
    # Besides, the operator takes 500m and 512Mi, kind's own pods 950m and 290Mi.
    assert 1.45 + sum(requested(template["spec"], "cpu") for template in templates) <= cores
    assert 0.85 + sum(requested(template["spec"], "memory") for template in templates) <= gigabytes


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_sweep_and_interactive_cluster_have_the_pods_of_train(rendered, overlay):
    cluster = find(rendered[overlay], "RayJob", "train")["spec"]["rayClusterSpec"]
    assert find(rendered[overlay], "RayJob", "sweep")["spec"]["rayClusterSpec"] == cluster
    interactive = find(rendered[overlay], "RayCluster", "interactive")["spec"]
    for group in ("headGroupSpec", "workerGroupSpecs"):
        assert interactive[group] == cluster[group]


def test_a_sweep_takes_the_options_of_its_overlay(rendered):
    sweep = find(rendered["production"], "RayJob", "sweep")
    settings = find(rendered["production"], "ConfigMap", "sepico")["data"]
    command = words(sweep["spec"]["entrypoint"], settings)
    assert command[command.index("/cache") - 1] == "--data.cache"


def test_applying_an_overlay_for_gpus_starts_nothing(rendered):
    for overlay in ("gpu", "production"):
        started = [o for o in rendered[overlay] if o["apiVersion"].startswith("ray.io/")]
        assert len(started) == 3 and all(o["spec"]["suspend"] for o in started)


def test_one_more_gpu_worker_is_a_number(k8s, rendered):
    before = yaml.safe_dump_all(rendered["gpu"])
    kustomization = k8s / "overlays/gpu/kustomization.yaml"
    text = kustomization.read_text()
    kustomization.write_text(text.replace("eplicas, value: 2}", "eplicas, value: 3}"))
    after = yaml.safe_dump_all(render(kustomization.parent))
    kustomization.write_text(text)
    assert before != after and len(before.splitlines()) == len(after.splitlines())


def test_keys_of_the_local_store_are_ignored_by_git():
    keys = K8S / "overlays/local-cpu/keys.env"
    assert subprocess.run(["git", "check-ignore", "-q", keys], cwd=K8S).returncode == 0


def test_the_image_passes_the_linter():
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([hadolint, K8S / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_check_at_the_end_of_the_images_build_passes(capsys):
    last = (K8S / "Dockerfile").read_text().splitlines()[-1]
    assert last == "RUN python -m jobs.demo --dry-run"
    dry_run(DemoConfig())
    assert "9 classes" in capsys.readouterr().out


def test_the_operators_values_are_restricted_to_one_namespace():
    values = yaml.safe_load((K8S / "operator/values.yaml").read_text())
    assert values["singleNamespaceInstall"] and values["watchNamespace"] == ["sepico"]
    assert values["image"]["tag"] == "v1.7.0"


@pytest.mark.slow
def test_the_data_of_the_local_overlays_demo_are_what_its_job_reads(s3, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    script = K8S / "overlays/local-cpu/demo_data.py"
    subprocess.run([sys.executable, script, "s3://k8s-demo", s3.endpoint], check=True)
    storage = StorageConfig(endpoint=s3.endpoint)
    for name, (_, count, labelled) in DATA_SETS.items():
        manifest = read_manifest(open_storage(f"s3://k8s-demo/{name}", storage))
        assert len(manifest) == count and manifest.labelled == labelled


@pytest.mark.slow
@pytest.mark.shared
def test_the_extract_is_that_of_the_release():
    if not SHARED.is_dir():
        pytest.skip("needs ../shared")
    assert json.loads(EXTRACT.read_text()) == extract(SHARED)
