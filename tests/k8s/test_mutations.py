# ruff: noqa: E501 (a mistake a line)
"""Mistakes planted in the manifests, each of which the checks name."""

import copy
from collections.abc import Callable

import pytest

from tests.k8s.manifests import Object, find, problems


def cluster(o: Object) -> Object:
    return o["spec"]["rayClusterSpec"]


def head(o: Object) -> Object:
    return cluster(o)["headGroupSpec"]


def worker(o: Object) -> Object:
    return cluster(o)["workerGroupSpecs"][0]


def container(o: Object) -> Object:
    return worker(o)["template"]["spec"]["containers"][0]


def replace_entrypoint(old: str, new: str) -> Callable[[Object], None]:
    def change(o: Object) -> None:
        assert old in o["spec"]["entrypoint"]
        o["spec"]["entrypoint"] = o["spec"]["entrypoint"].replace(old, new)

    return change


def put(get: Callable[[Object], Object], **values: object) -> Callable[[Object], None]:
    return lambda o: get(o).update(values)


def drop(get: Callable[[Object], Object], *names: str) -> Callable[[Object], None]:
    return lambda o: [get(o).pop(name) for name in names] and None


def security(o: Object) -> Object:
    return container(o)["securityContext"]


def spec(o: Object) -> Object:
    return o["spec"]


TRAIN = ("RayJob", "train")
CASES = {
    "a typo in a field of the job": (TRAIN, put(spec, backofLimit=3), "backofLimit"),
    "a typo in a field of a group": (TRAIN, put(worker, replica=3), "replica"),
    "a typo deep in a pod": (TRAIN, put(container, imagePulPolicy="Always"), "imagePulPolicy"),
    "an old apiVersion": (TRAIN, put(lambda o: o, apiVersion="ray.io/v1beta1"), "no kind"),
    "a number for a string": (TRAIN, put(lambda o: head(o)["rayStartParams"], **{"num-cpus": 0}), "string"),
    "an unknown value of an enumeration": (TRAIN, put(lambda o: cluster(o)["authOptions"], mode="tokens"), "tokens"),
    "a group without a least size": (TRAIN, drop(worker, "minReplicas"), "minReplicas"),
    "a deletion rule against a CEL rule": (TRAIN, put(spec, deletionStrategy={"onSuccess": {"policy": "DeleteSelf"}}), "BOTH"),
    "a manager against a CEL rule": (TRAIN, put(spec, managedBy="me"), "managedBy"),
    "no limits": (TRAIN, drop(lambda o: container(o)["resources"], "limits"), "no limits"),
    "a request below its limit": (TRAIN, put(lambda o: container(o)["resources"]["requests"], cpu="1"), "requests"),
    "the image's latest": (TRAIN, put(container, image="registry.example.com/sepico:latest"), "tag"),
    "an image without a tag": (TRAIN, put(container, image="registry.example.com:5000/sepico"), "tag"),
    "a privileged container": (TRAIN, put(security, privileged=True), "privileged"),
    "an escalating container": (TRAIN, drop(security, "allowPrivilegeEscalation"), "escalate"),
    "a container with capabilities": (TRAIN, put(security, capabilities={"add": ["SYS_PTRACE"]}), "capabilities"),
    "a writable root": (TRAIN, put(security, readOnlyRootFilesystem=False), "writable"),
    "no security context": (TRAIN, drop(container, "securityContext"), "escalate"),
    "a pod as root": (TRAIN, drop(lambda o: worker(o)["template"]["spec"]["securityContext"], "runAsNonRoot"), "root"),
    "a host path": (TRAIN, put(lambda o: worker(o)["template"]["spec"]["volumes"][0], hostPath={"path": "/mnt"}), "hostPath"),
    "a mount without a volume": (TRAIN, drop(lambda o: worker(o)["template"]["spec"], "volumes"), "lacks"),
    "a secret in the open": (TRAIN, put(container, env=[{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]), "secret"),
    "a Secret with its data": (("Namespace", "sepico"), put(lambda o: o, kind="Secret", stringData={"a": "b"}), "Secret"),
    "an unknown preset": (TRAIN, replace_entrypoint("gta2cityscapes_daformer_distcl", "gta2cityscape"), "refuses"),
    "an unknown flag": (TRAIN, replace_entrypoint("--placement_timeout", "--placement-timeout"), "refuses"),
    "a wrong value of a flag": (TRAIN, replace_entrypoint("--workers.max 2", "--workers.max 0"), "refuses"),
    "an unknown job": (TRAIN, replace_entrypoint("jobs.train", "jobs.trian"), "no job"),
    "an unknown variable": (TRAIN, replace_entrypoint("$BUCKET", "$BUKET"), "BUKET"),
    "a name of 48 characters": (TRAIN, put(lambda o: o["metadata"], name="t" * 48), "47"),
    "a name with an underscore": (TRAIN, put(lambda o: o["metadata"], name="my_run"), "DNS"),
    "a label that is too long": (TRAIN, put(lambda o: o["metadata"], labels={"run": "r" * 64}), "label"),
    "no token": (TRAIN, put(lambda o: cluster(o)["authOptions"], mode="disabled"), "token"),
    "an exposed dashboard": (TRAIN, put(head, serviceType="LoadBalancer"), "exposed"),
    "an ingress": (TRAIN, put(head, enableIngress=True), "exposed"),
    "a head that works": (TRAIN, drop(lambda o: head(o)["rayStartParams"], "num-cpus"), "num-cpus"),
    "a grace period within the drain": (TRAIN, put(lambda o: worker(o)["template"]["spec"], terminationGracePeriodSeconds=90), "within"),
    "no drain": (TRAIN, drop(container, "lifecycle"), "draining"),
    "more replicas than the maximum": (TRAIN, put(worker, replicas=9), "replicas 9"),
    "no deadline": (TRAIN, drop(spec, "activeDeadlineSeconds"), "activeDeadlineSeconds"),
    "no retry": (TRAIN, put(spec, backoffLimit=0), "backoffLimit"),
    "a cluster that stays": (TRAIN, put(spec, shutdownAfterJobFinishes=False), "outlives"),
    "a submitter in the head's pod": (TRAIN, put(spec, submissionMode="SidecarMode"), "SidecarMode"),
    "a typo in a policy": (("NetworkPolicy", "ray"), put(spec, podSelectors={}), "podSelectors"),
    "a policy of an old version": (("NetworkPolicy", "ray"), put(lambda o: o, apiVersion="extensions/v1beta1"), "no kind"),
    "a budget for a wrong type": (("PodDisruptionBudget", "head"), put(spec, minAvailable=[1]), "minAvailable"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", CASES)
def test_a_planted_mistake_is_named(rendered, mistake):
    (kind, name), plant, expected = CASES[mistake]
    configmap = find(rendered["gpu"], "ConfigMap", "sepico")
    o = copy.deepcopy(find(rendered["gpu"], kind, name))
    plant(o)
    assert expected in "\n".join(problems([o, configmap]))
