"""The workers of a trial, under a controller in the trial's own process.

Ray ends a placement group with its job, and a trial is an actor of its sweep's job: the group of a
trial that is killed would keep its cores from the trial that takes its place. So each trial notes
its group where the cluster keeps its names, and its sweep removes those of the dead.
"""

import asyncio
from typing import Any

import ray
import ray.train
from ray._private.state import actors
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.util.placement_group import PlacementGroup, remove_placement_group

NOTES = "placement-groups-of/"  # an actor's id and the group's


class _NotedGroup(WorkerGroup):
    def _create_placement_group(self, *arguments: Any) -> Any:
        handle = super()._create_placement_group(*arguments)
        group = handle.placement_group.id
        owner = ray.get_runtime_context().get_actor_id()
        # For a moment a driver has two: its last trial's, which ends, and the next one's.
        _internal_kv_put(f"{NOTES}{owner}/{group.hex()}", group.binary())
        return handle


class _Controller(TrainController):
    worker_group_cls = _NotedGroup


def run_in_actor(**settings: Any) -> ray.train.Result:
    """Train with a controller in this process, which must be an actor's."""
    controller = _Controller(**settings)
    asyncio.run(controller.run())
    return controller.get_result()


def remove_lost_groups() -> None:
    """Remove the placement groups of actors that are dead, and their workers with them."""
    for key in _internal_kv_list(NOTES):
        owner = key.decode().removeprefix(NOTES).partition("/")[0]
        if actors(owner).get("State", "DEAD") != "DEAD":
            continue
        if noted := _internal_kv_get(key):  # another sweep of the cluster may have been first
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(noted)))
            _internal_kv_del(key)
