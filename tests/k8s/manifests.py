"""Rendered manifests, and everything that is wrong with them: what the tests of k8s/ share."""

import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from jobs.command_line import parse
from tests.k8s.schema import schema_problems

Object = dict[str, Any]
K8S = Path(__file__).parents[2] / "k8s"
OVERLAYS = ("local-cpu", "gpu", "production")
KUBERNETES = "1.34"
# Labels and names of everything are DNS labels; KubeRay appends to those of its own kinds.
NAME_LIMITS = {"RayJob": 47, "RayCluster": 53}
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
# Kinds of other operators, whose schemas no package brings.
FOREIGN = ("kueue.x-k8s.io", "monitoring.coreos.com", "scheduling.volcano.sh")
CONFIGS = {
    "jobs.train": "cluster.config:TrainConfig",
    "jobs.ingest": "cluster.ingest:IngestConfig",
    "jobs.sweep": "cluster.sweep_config:SweepConfig",
}


def copy_k8s(folder: Path) -> Path:
    """A copy of k8s/ with the keys that a person makes for the local overlay."""
    copy = folder / "k8s"
    shutil.copytree(K8S, copy, ignore=shutil.ignore_patterns("keys.env"))
    keys = copy / "overlays/local-cpu/keys.env"
    keys.write_text("AWS_ACCESS_KEY_ID=local\nAWS_SECRET_ACCESS_KEY=made-for-this-test\n")
    return copy


def render(folder: Path) -> list[Object]:
    """The objects of a kustomization. Raises ValueError with kustomize's message."""
    kubectl = Path(sysconfig.get_path("scripts")) / "kubectl"
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr)
    return list(yaml.safe_load_all(done.stdout))


def find(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def problems(objects: list[Object]) -> list[str]:
    """What is wrong with a kustomization's objects, a line each; empty for none."""
    found = []
    for o in objects:
        where = f"{o['kind']}/{o['metadata']['name']}"
        found += [f"{where}: {line}" for line in _problems_of(o, objects)]
    return found


def _problems_of(o: Object, objects: list[Object]) -> Iterator[str]:
    yield from _names(o)
    group = o["apiVersion"].rpartition("/")[0]
    if group == "ray.io":
        yield from (found := list(schema_problems(o)))
        if found:
            return
    elif group not in FOREIGN:
        try:
            kubernetes_validate.validate(o, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{list(error.path)}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError:
            yield f"no kind {o['kind']} in {o['apiVersion']}"
    claims = {claim["metadata"]["name"] for claim in _spec(o).get("volumeClaimTemplates", [])}
    for template in pod_templates(o):
        yield from _pod_problems(template, claims)
    if o["kind"] in ("RayJob", "RayCluster"):
        yield from _ray_problems(o)
    if o["kind"] == "RayJob":
        yield from _entrypoint_problems(o, find(objects, "ConfigMap", "sepico")["data"])
    if o["kind"] == "Secret" and o["metadata"]["name"] != "store-keys":
        yield "a Secret in a manifest"


def _names(o: Object) -> Iterator[str]:
    name = o["metadata"]["name"]
    limit = NAME_LIMITS.get(o["kind"], 63)
    if len(name) > limit or not DNS_LABEL.fullmatch(name):
        yield f"the name is no DNS label of at most {limit} characters"
    for key, value in _labels(o):
        if len(value) > 63 or not LABEL_VALUE.fullmatch(value):
            yield f"label {key}: {value!r} is no label value of at most 63 characters"


def _labels(node: Any) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key in ("labels", "matchLabels"):
            if isinstance(node.get(key), dict):
                yield from ((k, str(v)) for k, v in node[key].items())
        for value in node.values():
            yield from _labels(value)
    elif isinstance(node, list):
        for item in node:
            yield from _labels(item)


def _spec(o: Object) -> Object:
    return o.get("spec") or {}


def pod_templates(o: Object) -> list[Object]:
    """The pod templates of an object of any kind used here."""
    spec = _spec(o)
    found = [spec.get("template"), spec.get("submitterPodTemplate")]
    cluster = spec.get("rayClusterSpec", spec)
    found += [
        group.get("template")
        for group in (cluster.get("headGroupSpec"), *(cluster.get("workerGroupSpecs") or []))
        if group
    ]
    return [template for template in found if template]


def _pod_problems(template: Object, claims: set[str]) -> Iterator[str]:
    pod = template["spec"]
    containers = [*pod.get("initContainers", []), *pod["containers"]]
    security = pod.get("securityContext", {})
    if not security.get("runAsNonRoot") or not security.get("runAsUser"):
        yield "the pod may run as root"
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "the pod has no RuntimeDefault seccomp profile"
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield f"the pod has {name}"
    for volume in pod.get("volumes", []):
        if "hostPath" in volume:
            yield f"volume {volume['name']} is a hostPath"
        if "emptyDir" in volume and not (volume["emptyDir"] or {}).get("sizeLimit"):
            yield f"volume {volume['name']} has no sizeLimit"
    volumes = {volume["name"] for volume in pod.get("volumes", [])} | claims
    for container in containers:
        yield from _container_problems(container)
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        if mounted - volumes:
            yield f"{container['name']} mounts {mounted - volumes}, which the pod lacks"


def _container_problems(container: Object) -> Iterator[str]:
    name, image = container["name"], container.get("image", "")
    tag = image.rpartition("/")[2].partition(":")[2]
    if tag in ("", "latest") and "@sha256:" not in image:
        yield f"{name}: image {image!r} has no tag of its own"
    yield from (f"{name}: {line}" for line in restricted(container.get("securityContext", {})))
    resources = container.get("resources", {})
    if not {"cpu", "memory"} <= set(resources.get("limits", {})):
        yield f"{name}: no limits of cpu and memory"
    if resources.get("requests") != resources.get("limits"):
        yield f"{name}: requests are not limits"
    for variable in container.get("env", []):
        if re.search("(?i)secret|password|token|key", variable["name"]) and "value" in variable:
            yield f"{name}: {variable['name']} holds a secret"
    if grace := container.get("lifecycle"):
        yield from _grace_problems(name, grace)


def restricted(security: Object) -> Iterator[str]:
    """What keeps a container from being a restricted one."""
    if security.get("privileged"):
        yield "privileged"
    if security.get("allowPrivilegeEscalation") is not False:
        yield "may escalate its privileges"
    if security.get("capabilities") != {"drop": ["ALL"]}:
        yield "keeps capabilities"
    if not security.get("readOnlyRootFilesystem"):
        yield "has a writable root file system"


def _grace_problems(name: str, lifecycle: Object) -> Iterator[str]:
    script = lifecycle["preStop"]["exec"]["command"][-1]
    if subprocess.run(["bash", "-n", "-c", script], capture_output=True).returncode:
        yield f"{name}: preStop is no shell script"


def _ray_problems(o: Object) -> Iterator[str]:
    spec = o["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "no token authentication"
    head = cluster["headGroupSpec"]
    if head["rayStartParams"].get("num-cpus") != "0":
        yield "the head takes work: num-cpus is not 0"
    if head.get("enableIngress") or head.get("serviceType", "ClusterIP") != "ClusterIP":
        yield "the dashboard is exposed"
    if cluster.get("enableInTreeAutoscaling"):
        options = cluster.get("autoscalerOptions", {})
        if options.get("version") != "v2":
            yield "not the autoscaler v2"
        yield from (
            f"autoscaler: {line}" for line in restricted(options.get("securityContext", {}))
        )
        if not head["template"]["spec"].get("automountServiceAccountToken"):
            yield "the autoscaler can't talk to the Kubernetes API"
    for group in cluster["workerGroupSpecs"]:
        low, count, high = (group[f"{k}eplicas"] for k in ("minR", "r", "maxR"))
        if not low <= count <= high:
            yield f"{group['groupName']}: replicas {count} is not within {low} and {high}"
        pod = group["template"]["spec"]
        if (deadline := _drain_seconds(pod["containers"][0])) is None:
            yield f"{group['groupName']}: leaves without draining its node"
        elif pod.get("terminationGracePeriodSeconds", 30) <= deadline:
            yield f"terminationGracePeriodSeconds is within the {deadline} s that preStop takes"
    if o["kind"] == "RayJob":
        yield from _job_problems(spec)


def _drain_seconds(container: Object) -> int | None:
    """How long preStop may take at most: the call's timeout and the drain's deadline."""
    script = "".join(
        container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    )
    found = re.search(
        r"timeout (\d+) ray drain-node .*deadline-remaining-seconds (\d+)", script, re.S
    )
    return sum(map(int, found.groups())) if found else None


def _job_problems(spec: Object) -> Iterator[str]:
    for field in ("activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"):
        if not spec.get(field):
            yield f"no {field}"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "the cluster outlives its job"
    if spec.get("submissionMode") == "SidecarMode":
        yield "SidecarMode: the submitter's container can't be restricted"


def words(entrypoint: str, environment: dict[str, str]) -> list[str]:
    """The words of an entrypoint, as the submitter's shell expands them."""
    return shlex.split(re.sub(r"\$(\w+)", lambda found: environment[found[1]], entrypoint))


def _entrypoint_problems(o: Object, environment: dict[str, str]) -> Iterator[str]:
    """Whether our own command line takes it: a manifest can't name a flag that does not exist."""
    try:
        python, _, module, *arguments = words(o["spec"]["entrypoint"], environment)
    except (KeyError, ValueError) as error:
        yield f"entrypoint: {error!r}"
        return
    if python != "python" or module not in CONFIGS:
        yield f"entrypoint: {python} -m {module} is no job of ours"
        return
    source, config_class = CONFIGS[module].split(":")
    try:
        parse(getattr(import_module(source), config_class), arguments)
    except SystemExit:
        yield f"entrypoint: {module} refuses {shlex.join(arguments)}"
