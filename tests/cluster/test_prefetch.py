"""Reading ahead: in order, merged where samples are neighbours, within a budget of bytes."""

import threading

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import prefetch
from cluster.prefetch import Prefetcher, Work, merge_neighbours
from cluster.reader import ShardReader, open_reader
from cluster.storage import StorageConfig, open_storage

CONFIG = StorageConfig()


@pytest.fixture(scope="module")
def reader(folder, write_dataset, tmp_path_factory):
    """12 samples in shards of 5, 5 and 2."""
    root = tmp_path_factory.mktemp("prefetch")
    write_dataset(folder, open_storage(str(root), CONFIG))
    return open_reader(str(root), CONFIG)


def groups(reader, wanted):
    return [indices for _, indices in merge_neighbours((reader, i) for i in wanted)]


def test_neighbours_of_a_shard_are_one_request(reader):
    assert groups(reader, range(12)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]


def test_requests_come_in_the_order_of_what_is_wanted_first(reader):
    assert groups(reader, [11, 3, 10, 7]) == [[10, 11], [3], [7]]


def test_a_sample_wanted_twice_is_read_once(reader):
    assert groups(reader, [2, 8, 2]) == [[2], [8]]


def test_two_data_sets_are_not_mixed_up(reader):
    other = ShardReader(reader._ranges._storage, reader.manifest)
    merged = merge_neighbours([(reader, 0), (other, 1), (reader, 1)])
    assert merged == [(reader, [0, 1]), (other, [1])]


def test_a_gap_is_read_over_if_it_is_small(reader, monkeypatch):
    length = int(reader.manifest.lengths[1])
    monkeypatch.setattr(prefetch, "MERGE_GAP", length)
    assert groups(reader, [0, 2]) == [[0, 2]]
    monkeypatch.setattr(prefetch, "MERGE_GAP", length - 1)
    assert groups(reader, [0, 2]) == [[0], [2]]


def test_a_request_has_a_largest_size(reader, monkeypatch):
    monkeypatch.setattr(prefetch, "MERGE_BYTES", int(reader.manifest.lengths[:3].sum()))
    assert groups(reader, range(5)) == [[0, 1, 2], [3, 4]]


@settings(max_examples=50, deadline=None)
@given(wanted=st.lists(st.integers(0, 11), max_size=40))
def test_everything_wanted_is_in_one_request(reader, wanted):
    found = groups(reader, wanted)
    assert sorted(i for group in found for i in group) == sorted(set(wanted))
    assert all(group == sorted(group) for group in found)


@settings(max_examples=20, deadline=None)
@given(wanted=st.lists(st.integers(0, 11), max_size=40), threads=st.integers(1, 4))
def test_results_come_in_order_and_are_those_wanted(reader, wanted, threads):
    works = (Work([(reader, i)], lambda payload, i=i: (i, payload)) for i in wanted)
    stream = Prefetcher(works, threads=threads, ahead=3)
    results = list(stream)
    stream.close()
    assert [i for i, _ in results] == wanted
    assert all(payload.equals(reader.fetch([i])[0]) for i, payload in results)


class StandIn:
    """A reader whose every answer waits until `together` requests are there."""

    def __init__(self, manifest, together=1):
        self.manifest = manifest
        self._barrier = threading.Barrier(together)

    def fetch(self, indices):
        self._barrier.wait(timeout=30)
        return [pa.py_buffer(bytes(int(self.manifest.lengths[i]))) for i in indices]


def test_bytes_ahead_stay_within_the_budget(reader, monkeypatch):
    largest = int(reader.manifest.lengths.max())
    monkeypatch.setattr(prefetch, "BUDGET_BYTES", 6 * largest)
    monkeypatch.setattr(prefetch, "MERGE_BYTES", 0)
    stand_in = StandIn(reader.manifest)
    taken = []

    def works():
        for turn in range(200):
            taken.append(turn)
            yield Work([(stand_in, turn % 12)], len)

    stream = Prefetcher(works(), threads=2, ahead=2)
    lengths = reader.manifest.lengths
    for turn, length in enumerate(stream):
        assert length == lengths[turn % 12]
        ahead = sum(int(lengths[i % 12]) for i in taken[turn:])
        assert ahead <= 9 * largest  # two results, the budget and the sample that filled it
    assert len(taken) == 200
    stream.close()


def test_what_is_read_over_counts_as_bytes_ahead(reader, monkeypatch):
    """Of the first shard's 5 samples the outer two are wanted, the others come with them."""
    span = int(reader.manifest.lengths[:5].sum())
    monkeypatch.setattr(prefetch, "MERGE_GAP", span)
    monkeypatch.setattr(prefetch, "BUDGET_BYTES", span)
    monkeypatch.setattr(prefetch, "REFILL", 0.9)
    stand_in = StandIn(reader.manifest)
    taken = []

    def works():
        for turn in range(40):
            taken.append(turn)
            yield Work([(stand_in, 0), (stand_in, 4)], lambda *payloads: None)

    stream = Prefetcher(works(), threads=1, ahead=1)
    ahead = [len(taken) - turn for turn, _ in enumerate(stream)]
    # By their lengths three works fill the budget; with the gap one does, so until the last of them
    # is being prepared nothing is asked for.
    assert ahead[:8] == [4, 3, 2, 4, 3, 2, 4, 3]
    stream.close()


def test_what_is_due_first_is_asked_for_by_itself(reader):
    stand_in = StandIn(reader.manifest)
    asked, fetch = [], stand_in.fetch
    stand_in.fetch = lambda indices: asked.append(indices) or fetch(indices)
    stream = Prefetcher((Work([(stand_in, i)], len) for i in range(12)), threads=1, ahead=2)
    next(stream)
    stream.close()
    assert [0, 1] in asked


def test_results_are_prepared_ahead_however_large_they_are(reader, monkeypatch):
    monkeypatch.setattr(prefetch, "BUDGET_BYTES", 1)
    prepared = threading.Semaphore(0)
    works = (Work([(reader, i)], lambda payload: prepared.release()) for i in range(12))
    stream = Prefetcher(works, threads=2, ahead=5)
    next(stream)
    # Nobody takes another one meanwhile.
    assert all(prepared.acquire(timeout=10) for _ in range(5))
    stream.close()


def test_neighbours_are_merged_while_windows_move(reader, monkeypatch):
    monkeypatch.setattr(prefetch, "BUDGET_BYTES", 8 * int(reader.manifest.lengths.max()))
    stand_in = StandIn(reader.manifest)
    counts, fetch = [], stand_in.fetch
    stand_in.fetch = lambda indices: counts.append(len(indices)) or fetch(indices)
    works = (Work([(stand_in, turn % 12)], len) for turn in range(240))
    stream = Prefetcher(works, threads=2, ahead=2)
    assert len(list(stream)) == 240
    stream.close()
    assert sum(counts) == 240 and len(counts) < 120


def test_many_requests_are_in_flight_at_once(reader, monkeypatch):
    monkeypatch.setattr(prefetch, "MERGE_BYTES", 0)
    stand_in = StandIn(reader.manifest, together=12)
    stream = Prefetcher((Work([(stand_in, i)], len) for i in range(12)), threads=1, ahead=1)
    assert list(stream) == reader.manifest.lengths.tolist()
    stream.close()


def test_an_error_comes_when_its_result_is_due(reader):
    def fail(payload):
        raise ValueError("broken")

    works = [Work([(reader, 0)], len), Work([(reader, 1)], fail), Work([(reader, 2)], len)]
    stream = Prefetcher(works, threads=2, ahead=3)
    assert next(stream) == reader.manifest.lengths[0]
    with pytest.raises(ValueError, match="broken"):
        next(stream)
    stream.close()
