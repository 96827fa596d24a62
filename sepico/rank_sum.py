"""Sums of short vectors over ranks, without the threads between a caller and gloo's sockets.

A network has tens of batch-norm layers, each of which sums a few hundred numbers over all workers
in every pass, and no worker goes on before it has them. gloo hands such a sum from thread to
thread: 0.5 to 3 ms between two busy CPUs, where a socket that the caller itself reads takes 0.1.
"""

import os
import secrets
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

# All ranks send before they read, so a piece has to fit into the buffers of a socket.
PIECE_BYTES = 32768
CONNECT_TIMEOUT_S = 120
HELLO_TIMEOUT_S = 10  # a rank says who it is as soon as it is connected


class RankSum:
    """Sums a short vector over all ranks of the default process group. A collective.

    The ranks add in the same order, so all get the same bits. CPU tensors go through a socket to
    each other rank, connected at the first sum; others through the process group.
    """

    def __init__(self) -> None:
        self._sockets: RankSockets | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The sum (n,) over all ranks of x (n,), which may be overwritten.

        Raises:
            ConnectionError: A rank is gone; the message says which.
        """
        if x.device.type != "cpu":
            dist.all_reduce(x)
            return x
        if self._sockets is None:
            self._sockets = RankSockets(dist.get_rank(), _local_address(), _all_gather)
        return self._sockets.exchange(x).sum(0)


class RankSockets:
    """A socket to each other rank.

    Args:
        rank: This rank.
        address: Its own address, which the other ranks reach.
        all_gather: A collective: takes an object, returns those of all ranks.
    """

    def __init__(self, rank: int, address: str, all_gather: Callable[[Any], Sequence[Any]]) -> None:
        self._rank = rank
        token = secrets.token_bytes(16)  # whoever else finds the port does not know it
        family = socket.getaddrinfo(address, None)[0][0]
        with socket.create_server((address, 0), family=family, backlog=1024) as server:
            ends = all_gather((*server.getsockname()[:2], token))
            self._peers: list[socket.socket | None] = [None] * len(ends)
            for peer, (host, port, key) in enumerate(ends[:rank]):
                connection = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S)
                connection.sendall(key + rank.to_bytes(4, "big"))
                self._keep(peer, connection)
            server.settimeout(CONNECT_TIMEOUT_S)
            while None in self._peers[rank + 1 :]:
                connection, _ = server.accept()
                connection.settimeout(HELLO_TIMEOUT_S)
                try:
                    hello = connection.recv(20, socket.MSG_WAITALL)
                except OSError:  # a stranger that says nothing, or left
                    hello = b""
                if len(hello) == 20 and secrets.compare_digest(hello[:16], token):
                    self._keep(int.from_bytes(hello[16:], "big"), connection)
                else:
                    connection.close()

    def _keep(self, peer: int, connection: socket.socket) -> None:
        connection.settimeout(None)  # the watchdog ends a rank that waits for ever
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers[peer] = connection

    def exchange(self, x: Tensor) -> Tensor:
        """The vectors (ranks, n) of all ranks; x (n,) on the CPU is this rank's. A collective."""
        rows = x.new_empty(len(self._peers), len(x))
        rows[self._rank] = x
        views = [memoryview(row.numpy()).cast("B") for row in rows]
        others = [(i, peer) for i, peer in enumerate(self._peers) if peer is not None]
        for start in range(0, x.nbytes, PIECE_BYTES):
            piece = slice(start, start + PIECE_BYTES)
            for rank, peer in others:
                try:
                    peer.sendall(views[self._rank][piece])
                except OSError as error:
                    raise ConnectionError(f"rank {rank} is gone: {error}") from error
            for rank, peer in others:
                _receive(rank, peer, views[rank][piece])
        return rows


def _receive(rank: int, peer: socket.socket, into: memoryview) -> None:
    while into:
        try:
            count = peer.recv_into(into, 0, socket.MSG_WAITALL)
        except OSError as error:
            raise ConnectionError(f"rank {rank} is gone: {error}") from error
        if not count:
            raise ConnectionError(f"rank {rank} is gone: it closed the connection")
        into = into[count:]


def _all_gather(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _local_address() -> str:
    """The address by which this machine reaches the rendezvous; where there is none, loopback."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    family = socket.getaddrinfo(master, None)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 9))  # sends nothing, only chooses the route
        return probe.getsockname()[0]
