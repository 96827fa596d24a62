"""Start, watch and stop training jobs on Kubernetes: `python -m jobs.k8s COMMAND NAME ...`.

python -m jobs.k8s render NAME --preset PRESET --bucket s3://BUCKET --source ... --target ...
python -m jobs.k8s submit NAME ... (as render)
python -m jobs.k8s status NAME
python -m jobs.k8s logs NAME
python -m jobs.k8s stop NAME

`render` prints a RayJob: RayJob/train of an overlay of k8s/ with this run's name, entrypoint and
size in it. `submit` has the API server validate it strictly, then creates it. Both refuse, before
anything is sent, a name, preset or option that the run itself would refuse. The rest of the
overlay (namespace, policies, accounts) is applied once, by `kubectl apply -k`.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.config import TrainConfig
from cluster.errors import WorkError
from jobs.command_line import parse, run

OVERLAYS = Path(__file__).parents[1] / "k8s" / "overlays"
NAMESPACE = "sepico"
# KubeRay appends to it to name the cluster, and that is part of the names of pods.
NAME_LIMIT = 47
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
KUEUE_LABEL = "kueue.x-k8s.io/queue-name"
GPU_PRODUCT = "nvidia.com/gpu.product"


@dataclass
class NamedJob:
    """A job by its name.

    Attributes:
        name: Name of the RayJob, and of the run in the bucket.
    """

    name: str

    def __post_init__(self) -> None:
        if len(self.name) > NAME_LIMIT or not DNS_LABEL.fullmatch(self.name):
            raise ValueError(
                f"name {self.name!r} must be at most {NAME_LIMIT} lower-case letters, digits and "
                "dashes, and begin with a letter"
            )


@dataclass
class TrainJob(NamedJob):
    """Trains on Kubernetes. `render` takes the same; `status`, `logs` and `stop` take NAME alone.

    Attributes:
        preset: What is trained: a preset, or a YAML file of the same path here and in the image.
        bucket: URL of the bucket; the run is `runs/NAME` in it. Relative data lie in it too.
        source: Labelled source shards.
        target: Unlabelled target shards.
        validation: Labelled validation shards; empty for none.
        workers: Most workers; a pod and, on GPUs, a GPU each, less those that would make no step
            faster.
        min_workers: Fewest workers that the run goes on with, and with the autoscaler also starts
            with: without it KubeRay waits for the pods of all. 0 for `workers`.
        gpu: GPU product by the node label nvidia.com/gpu.product; empty for any.
        image: Image of all pods; empty for the overlay's.
        overlay: Folder below k8s/overlays, or any other kustomization.
        options: More options of jobs.train, as one string.
    """

    preset: str = "gta2cityscapes_daformer_distcl"
    bucket: str = ""
    source: str = ""
    target: str = ""
    validation: str = ""
    workers: int = 1
    min_workers: int = 0
    gpu: str = ""
    image: str = ""
    overlay: str = "gpu"
    options: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("bucket", "source", "target"):
            if not getattr(self, key):
                raise ValueError(f"{key} is missing: give --{key}")
        if "://" not in self.bucket:
            raise ValueError(f"bucket {self.bucket} is no URL: pods share no files, give s3://...")
        self.min_workers = self.min_workers or self.workers

    def arguments(self, of_overlay: str) -> list[str]:
        """The command line of jobs.train; the job's own options come after those of its overlay."""
        bucket = self.bucket.rstrip("/")
        data = {
            "data.source": self.source,
            "data.target": self.target,
            "validation.data": self.validation,
        }
        options = {
            "config": self.preset,
            "run": f"{bucket}/runs/{self.name}",
            **{k: v if "://" in v else f"{bucket}/{v}" for k, v in data.items() if v},
            "workers.min": str(self.min_workers),
            "workers.max": str(self.workers),
            "placement_timeout": "1800",
            "max_failures": "100",
        }
        flags = [word for key, value in options.items() for word in (f"--{key}", value)]
        return [*flags, *shlex.split(of_overlay), *shlex.split(self.options)]


def build(job: TrainJob) -> dict[str, Any]:
    """The RayJob of a training job. Raises ValueError where kustomize does."""
    folder = OVERLAYS / job.overlay if (OVERLAYS / job.overlay).is_dir() else Path(job.overlay)
    rendered = yaml.safe_load_all(_kubectl("kustomize", str(folder)))
    objects = {(o["kind"], o["metadata"]["name"]): o for o in rendered}
    pattern = objects.get(("RayJob", "train"))
    if pattern is None:
        raise ValueError(f"overlay {folder} has no RayJob/train")
    settings = objects.get(("ConfigMap", "sepico"), {"data": {}})["data"]
    arguments = job.arguments(settings.get("TRAIN_OPTIONS", ""))
    # Says what is wrong and ends the process.
    workers = parse(TrainConfig, arguments).worker_range.max
    pattern["metadata"]["name"] = job.name
    for kind, name in objects:
        if kind == "LocalQueue":
            pattern["metadata"].setdefault("labels", {})[KUEUE_LABEL] = name
    spec = pattern["spec"]
    # The shell of the submitter's pod reads it once.
    spec["entrypoint"] = f"python -m jobs.train {shlex.join(arguments)}"
    spec.pop("suspend", None)
    cluster = spec["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    group["minReplicas"] = min(group["minReplicas"], job.min_workers)
    group["maxReplicas"] = workers
    # The autoscaler brings them as the run asks for them.
    group["replicas"] = 0 if cluster.get("enableInTreeAutoscaling") else workers
    if job.gpu:
        group["template"]["spec"].setdefault("nodeSelector", {})[GPU_PRODUCT] = job.gpu
    if job.image:
        for pod in (cluster["headGroupSpec"]["template"], group["template"]):
            pod["spec"]["containers"][0]["image"] = job.image
        spec["submitterPodTemplate"]["spec"]["containers"][0]["image"] = job.image
    return pattern


def render(job: TrainJob) -> None:
    print(yaml.safe_dump(build(job), sort_keys=False), end="")


def submit(job: TrainJob) -> None:
    manifest = yaml.safe_dump(build(job))
    create = ("create", "--validate=strict", "-f", "-")
    _kubectl(*create, "--dry-run=server", stdin=manifest)
    print(_kubectl(*create, stdin=manifest), end="")


def status(job: NamedJob) -> None:
    print(_kubectl("get", "rayjob", job.name, "-o", "wide"), end="")
    # Each retry is a new cluster.
    cluster = _kubectl("get", "rayjob", job.name, "-o", "jsonpath={.status.rayClusterName}")
    print(_kubectl("get", "pods", "-l", f"ray.io/cluster={cluster}", "-o", "wide"), end="")


def logs(job: NamedJob) -> None:
    """Follow the log of the job, from its beginning."""
    _kubectl("logs", "--follow", "--tail=-1", "-l", f"job-name={job.name}", show=True)


def stop(job: NamedJob) -> None:
    """Delete the job with its cluster. The run stays in the bucket; submitted again, it goes on."""
    print(_kubectl("delete", "rayjob", job.name), end="")


def _kubectl(*arguments: str, stdin: str | None = None, show: bool = False) -> str:
    """What kubectl prints.

    Raises ValueError with its last line, or its exit code, WorkError if a cluster said it.
    """
    command = ["kubectl", "--namespace", NAMESPACE, *arguments]
    if arguments[0] == "kustomize":
        command = ["kubectl", *arguments]
    output = None if show else subprocess.PIPE
    try:
        done = subprocess.run(
            command, input=stdin, stdout=output, stderr=subprocess.PIPE, text=True
        )
    except FileNotFoundError:
        raise ValueError("kubectl is not installed: it is needed to render and to submit") from None
    if done.returncode:
        wrong = WorkError if arguments[0] != "kustomize" else ValueError
        reasons = [f"exit code {done.returncode}", *done.stderr.strip().splitlines()]
        raise wrong(f"kubectl {arguments[0]}: {reasons[-1]}")
    return done.stdout or ""


COMMANDS: dict[str, tuple[Callable[[Any], None], type[NamedJob]]] = {
    "render": (render, TrainJob),
    "submit": (submit, TrainJob),
    "status": (status, NamedJob),
    "logs": (logs, NamedJob),
    "stop": (stop, NamedJob),
}


if __name__ == "__main__":
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word not in COMMANDS:
        print(f"usage: python -m jobs.k8s {{{','.join(COMMANDS)}}} NAME ...", file=sys.stderr)
        sys.exit(0 if word in ("-h", "--help") else 2)
    function, config_class = COMMANDS[word]
    run(function, config_class, arguments=sys.argv[2:], command=word)
