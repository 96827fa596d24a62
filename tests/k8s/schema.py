"""Strict validation of KubeRay's objects: their schema, without room for typos, and CEL rules."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import celpy
import jsonschema

from tests.k8s.crds import EXTRACT


def schema_problems(o: dict[str, Any]) -> Iterator[str]:
    """What the API server would refuse or, worse, drop in silence."""
    if o["apiVersion"] != "ray.io/v1" or o["kind"] not in schema()["$defs"]:
        yield f"no kind {o['kind']} in {o['apiVersion']}"
        return
    validator = jsonschema.Draft202012Validator({**schema(), "$ref": f"#/$defs/{o['kind']}"})
    for error in validator.iter_errors(o):
        yield f"{error.json_path}: {error.message}"
    yield from _cel_problems(schema()["$defs"][o["kind"]], o, "$")


@cache
def schema() -> dict[str, Any]:
    """The extract with every object closed against fields that it does not name."""
    return _closed(json.loads(EXTRACT.read_text()))


def _closed(node: Any) -> Any:
    if isinstance(node, list):
        return [_closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    closed = {key: _closed(value) for key, value in node.items()}
    described = isinstance(node.get("properties"), dict) and node.get("type") == "object"
    if described and not node.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def _cel_problems(node: dict[str, Any], value: Any, path: str) -> Iterator[str]:
    if "$ref" in node:
        node = schema()["$defs"][node["$ref"].rpartition("/")[2]]
    for rule in node.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], value):  # no update, no old
            yield f"{path}: {rule['message']}"
    if isinstance(value, dict):
        for key, inner in node.get("properties", {}).items():
            if key in value:
                yield from _cel_problems(inner, value[key], f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _cel_problems(node.get("items", {}), item, f"{path}[{index}]")


def _holds(rule: str, value: Any) -> bool:
    environment = celpy.Environment()
    program = environment.program(environment.compile(rule))
    return bool(program.evaluate({"self": celpy.json_to_cel(value)}))
