"""Which part of every parameter's state this rank holds, whatever the ZeRO stage.

All parameters, flattened and joined in the order of `named_parameters()`, are one vector of P
numbers; so are their Adam moments and the teacher's weights. A rank holds runs of these vectors.
A checkpoint that says which runs it stores can be read by any number of workers and any stage,
without conversion: see `cluster.checkpoints`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
Run = tuple[int, int]  # start and number of elements in a vector of all parameters
Read = Callable[[str, list[Run]], list[Tensor]]  # vector and runs -> their values


@dataclass(frozen=True)
class Piece:
    """A run of the vectors, and this rank's 1-D float32 views of it by vector name."""

    start: int
    views: dict[str, Tensor]

    @property
    def run(self) -> Run:
        return self.start, next(iter(self.views.values())).numel()


def numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, also where ZeRO-3 left a part of it here."""
    return getattr(parameter, "ds_numel", parameter.numel())


def parameter_shapes(network: nn.Module) -> dict[str, list[int]]:
    """Whole shapes by name, in the order of the vectors."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in network.named_parameters()
    }


def held_weights(network: nn.Module) -> list[Tensor]:
    """1-D views of what this rank holds of each parameter: all of it, or its ZeRO-3 shard."""
    views = []
    for parameter in network.parameters():
        if hasattr(parameter, "ds_tensor"):
            views.append(parameter.ds_tensor.detach().view(-1)[: _shard(parameter)[1]])
        else:
            views.append(parameter.detach().view(-1))
    return views


def weights_to_store(network: nn.Module, name: str) -> list[Piece]:
    """This rank's share of a network's weights, as the vector `name`."""
    pieces = _weights(network, name)
    sharded = any(hasattr(parameter, "ds_tensor") for parameter in network.parameters())
    return pieces if sharded else _share(pieces)


def load_weights(network: nn.Module, name: str, read: Read) -> None:
    """Fill what this rank holds of a network's weights from the vector `name`."""
    _fill(_weights(network, name), read)


class OptimizerPartition:
    """The master weights and Adam moments that this rank's optimiser steps."""

    def __init__(self, engine: Any, stage: int) -> None:
        self._network: nn.Module = engine.module
        self._zero, self._stage = engine.optimizer, stage
        self._optimizer = self._zero.optimizer if stage else self._zero

    def moments_to_store(self) -> list[Piece]:
        """This rank's share of the moments."""
        pieces = [
            Piece(start, self._moments(flat, offset, count))
            for start, flat, offset, count, _ in self._held()
        ]
        return pieces if self._stage else _share(pieces)

    def steps(self) -> dict[str, int]:
        """Adam's step count by group name."""
        counts = {group["name"]: 0 for group in self._optimizer.param_groups}
        for _, flat, _, _, group in self._held():
            counts[group["name"]] = max(counts[group["name"]], int(self._state(flat)["step"]))
        return counts

    def load(self, steps: dict[str, int], read: Read) -> None:
        """Fill moments, step counts and, where they lie apart from the weights, masters."""
        pieces = []
        for start, flat, offset, count, group in self._held():
            self._state(flat)["step"].fill_(steps[group["name"]])
            views = self._moments(flat, offset, count)
            if self._stage:
                views["student"] = flat.detach().narrow(0, offset, count)
            pieces.append(Piece(start, views))
        _fill(pieces, read)

    def _held(self) -> Iterator[tuple[int, Tensor, int, int, dict[str, Any]]]:
        """(start, flat, offset, count, group): a run lies at `offset` of a stepped tensor."""
        groups = self._optimizer.param_groups
        group_of = {id(p): group for group in groups for p in group["params"]}
        base = 0
        for parameter in self._network.parameters():
            if self._stage == 0:
                yield base, parameter, 0, parameter.numel(), group_of[id(parameter)]
            elif self._stage == 3:
                index, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
                begin, count = _shard(parameter)
                flat = self._zero.fp32_partitioned_groups_flat[index]
                group = groups[self._zero.sub_group_to_group_id[index]]
                yield base + begin, flat, offset, count, group
            elif (mapping := parameter._hp_mapping) is not None:
                place, begin = mapping.hp_fragment_address, mapping.lp_fragment_address.start
                flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
                group = groups[mapping.param_group_index]
                yield base + begin, flat, place.start, place.numel, group
            base += numel(parameter)

    def _moments(self, flat: Tensor, offset: int, count: int) -> dict[str, Tensor]:
        state = self._state(flat)
        return {name: state[name].view(-1).narrow(0, offset, count) for name in MOMENTS}

    def _state(self, flat: Tensor) -> dict[str, Tensor]:
        """Adam's state of a tensor, made as Adam makes it where it has not stepped yet."""
        state = self._optimizer.state[flat]
        if not state:
            state["step"] = torch.zeros((), device=flat.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        return state


def _weights(network: nn.Module, name: str) -> list[Piece]:
    pieces, base = [], 0
    for parameter, view in zip(network.parameters(), held_weights(network), strict=True):
        begin = _shard(parameter)[0] if hasattr(parameter, "ds_tensor") else 0
        pieces.append(Piece(base + begin, {name: view}))
        base += numel(parameter)
    return pieces


def _shard(parameter: nn.Parameter) -> Run:
    """Begin and number of elements of this rank's ZeRO-3 shard, without the padding at the end."""
    size = parameter.partition_numel()
    begin = min(dist.get_rank() * size, parameter.ds_numel)
    return begin, min(size, parameter.ds_numel - begin)


def _share(pieces: list[Piece]) -> list[Piece]:
    """The n-th part of what every rank has whole."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    total = sum(piece.run[1] for piece in pieces)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    shares = []
    for piece in pieces:
        start, count = piece.run
        begin, end = max(first, start), min(last, start + count)
        if begin < end:
            cut = slice(begin - start, end - start)
            shares.append(Piece(begin, {name: view[cut] for name, view in piece.views.items()}))
    return shares


def _fill(pieces: list[Piece], read: Read) -> None:
    for name in sorted({name for piece in pieces for name in piece.views}):
        holding = [piece for piece in pieces if name in piece.views]
        values = read(name, [piece.run for piece in holding])
        for piece, value in zip(holding, values, strict=True):
            piece.views[name].copy_(value)
