"""KubeRay's CRD schemas, small enough to ship. `python -m tests.k8s.crds FOLDER` writes them.

FOLDER holds the CRDs of a KubeRay release. Kept is what validates: descriptions go, and a subtree
that occurs again (a pod template is in there several times) becomes a reference.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

EXTRACT = Path(__file__).with_name("kuberay.json")
KINDS = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}
SMALLEST_SHARED = 120  # characters of JSON


def extract(folder: Path) -> dict[str, Any]:
    """One JSON schema with a definition for each kind of version ray.io/v1."""
    schemas = {kind: _without_prose(_schema(folder / name)) for kind, name in KINDS.items()}
    counts: Counter[str] = Counter()
    for schema in schemas.values():
        _count(schema, counts)
    names: dict[str, str] = {}
    shared: dict[str, Any] = {}

    def fold(node: Any) -> Any:
        if isinstance(node, list):
            return [fold(item) for item in node]
        if not isinstance(node, dict):
            return node
        text = json.dumps(node, sort_keys=True)
        if counts[text] < 2 or len(text) < SMALLEST_SHARED or "properties" not in node:
            return {key: fold(value) for key, value in node.items()}
        if text not in names:
            names[text] = f"shared{len(names)}"
            shared[names[text]] = {key: fold(value) for key, value in node.items()}
        return {"$ref": f"#/$defs/{names[text]}"}

    kinds = {kind: fold(schema) for kind, schema in schemas.items()}
    return {"$defs": {**kinds, **shared}}


def _schema(path: Path) -> dict[str, Any]:
    crd = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    return version["schema"]["openAPIV3Schema"]


def _without_prose(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_prose(item) for item in node]
    if isinstance(node, dict):
        return {
            key: _without_prose(value)
            for key, value in node.items()
            if not (key == "description" and isinstance(value, str))
        }
    return node


def _count(node: Any, counts: Counter[str]) -> None:
    if isinstance(node, dict):
        counts[json.dumps(node, sort_keys=True)] += 1
        for value in node.values():
            _count(value, counts)
    elif isinstance(node, list):
        for item in node:
            _count(item, counts)


if __name__ == "__main__":
    EXTRACT.write_text(json.dumps(extract(Path(sys.argv[1])), separators=(",", ":")) + "\n")
