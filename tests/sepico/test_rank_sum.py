"""Sums over ranks by sockets; a rank is a thread here, the engine's tests use processes."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from sepico.rank_sum import RankSockets


class Ranks:
    """`RankSockets` of n threads. `addresses` are the ends they told each other."""

    def __init__(self, n: int) -> None:
        self.pool = ThreadPoolExecutor(n)
        self.ends: list[Any] = [None] * n
        self.barrier = threading.Barrier(n)
        self.before_connecting = lambda ends: None
        self.n = n

    def connect(self) -> list[RankSockets]:
        def of_rank(rank: int) -> RankSockets:
            def all_gather(end: Any) -> list[Any]:
                self.ends[rank] = end
                if self.barrier.wait(10) == 0:
                    self.before_connecting(self.ends)
                self.barrier.wait(10)
                return list(self.ends)

            return RankSockets(rank, "127.0.0.1", all_gather)

        return list(self.pool.map(of_rank, range(self.n)))


@pytest.fixture
def ranks(request):
    made = Ranks(request.param)
    yield made
    made.pool.shutdown()


@pytest.mark.parametrize("ranks", [2, 3, 5], indirect=True)
@pytest.mark.parametrize("length", [1, 129, 300_000])
def test_every_rank_gets_the_vectors_of_all(ranks, length):
    vectors = torch.randn(ranks.n, length, dtype=torch.float64)
    sockets = ranks.connect()
    for _ in range(2):
        got = list(
            ranks.pool.map(lambda i: sockets[i].exchange(vectors[i].clone()), range(ranks.n))
        )
        assert all(torch.equal(rows, vectors) for rows in got)


@pytest.mark.parametrize("hello", [bytes(16) + (1).to_bytes(4, "big"), b""])
@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_who_does_not_know_the_token_is_turned_away(ranks, hello, monkeypatch):
    monkeypatch.setattr("sepico.rank_sum.HELLO_TIMEOUT_S", 0.2)
    strangers = []

    def knock(ends: list[Any]) -> None:
        stranger = socket.create_connection(ends[0][:2])
        stranger.sendall(hello)
        strangers.append(stranger)

    ranks.before_connecting = knock
    sockets = ranks.connect()
    vectors = torch.arange(2.0)
    got = list(ranks.pool.map(lambda i: sockets[i].exchange(vectors[i : i + 1]), range(2)))
    assert got[0].flatten().tolist() == [0.0, 1.0]
    assert strangers[0].recv(1) == b""


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_a_rank_that_is_gone_is_named(ranks):
    first, second = ranks.connect()
    del second
    with pytest.raises(ConnectionError, match="rank 1 is gone"):
        first.exchange(torch.zeros(3))
