"""One writer a run, whatever the store, whoever dies and however many try at once."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster import lease as leases
from cluster.lease import Lease, LeaseError, hold_lease
from cluster.storage import Storage, StorageConfig, StorageError, open_storage


@pytest.fixture(autouse=True)
def quick_heartbeat(monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.2)


@pytest.fixture(params=["file", "s3"])
def run(request, tmp_path) -> Storage:
    if request.param == "file":
        return open_storage(str(tmp_path / "run"), StorageConfig())
    server = request.getfixturevalue("s3")
    bucket = server.make_bucket(f"lease-{time.time_ns()}")
    return open_storage(f"{bucket}/run", StorageConfig(endpoint=server.endpoint))


def plant(run: Storage, expires: float, generation: int = 1, owner: str = "node-7 process 42"):
    lease = Lease(generation, owner, "token")
    run.put(lease.key, lease.document(expires))
    return lease


def expiry(run: Storage) -> float:
    return json.loads(run.get(run.list("lease")[-1]))["expires"]


def test_a_live_lease_is_refused_with_its_owner_and_expiry(run):
    with hold_lease(run) as held:
        other = open_storage(run.url, run._config)
        refusal = rf"{held.owner}, whose lease lasts to 20\d\d-"
        with pytest.raises(LeaseError, match=refusal), hold_lease(other):
            pass


def test_a_lease_far_in_the_future_is_refused_at_once(run):
    plant(run, time.time() + 3600)
    with pytest.raises(LeaseError, match="node-7 process 42"), hold_lease(run):
        pass


def test_an_expired_lease_is_taken_over_and_its_owner_is_fenced(run):
    old = plant(run, time.time() - 1)
    with hold_lease(run) as held:
        assert held.generation == 2
        with pytest.raises(LeaseError, match=f"taken over by {held.owner}"):
            old.renew(run)
        held.renew(run)


def test_a_run_whose_folder_vanished_is_not_said_to_have_another_writer(tmp_path):
    run = open_storage(str(tmp_path / "run"), StorageConfig())
    lease = plant(run, time.time() + 20)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(LeaseError, match="has lost its lease, or the folder is gone"):
        lease.renew(run)


def test_a_live_lease_that_looks_expired_to_a_clock_ahead_is_refused(run):
    old = plant(run, time.time() - 25)
    stopped = threading.Event()

    def live() -> None:
        while not stopped.wait(0.02):
            run.put(old.key, old.document(time.time() - 25))

    heartbeat = threading.Thread(target=live)
    heartbeat.start()
    try:
        other = open_storage(run.url, run._config)
        with pytest.raises(LeaseError, match="node-7 process 42"), hold_lease(other):
            pass
    finally:
        stopped.set()
        heartbeat.join()


def test_a_damaged_lease_is_named(run):
    run.put("lease/00000001.json", b'{"generation": 1,')
    with pytest.raises(StorageError, match=r"lease/00000001.json is damaged"), hold_lease(run):
        pass


def test_a_later_start_of_the_workers_fences_the_one_before_it(run):
    with hold_lease(run) as held:
        first = held.advance(run)
        second = held.advance(run)
        assert held.generation < first.generation < second.generation
        with pytest.raises(LeaseError, match="a later start of its workers"):
            first.renew(run)
        second.renew(run)
    # Released in its newest generation, so it is free at once.
    with hold_lease(run), pytest.raises(LeaseError, match="taken over by"):
        held.advance(run)


def test_the_heartbeat_extends_the_generation_of_the_newest_start(run):
    with hold_lease(run) as held:
        newest = held.advance(run)
        first = expiry(run)
        deadline = time.monotonic() + 20
        while expiry(run) == first and time.monotonic() < deadline:
            pass
        assert run.list("lease")[-1] == newest.key and expiry(run) > first


def test_a_dead_writers_lease_is_awaited(run):
    plant(run, expires := time.time() + 1.5)
    with hold_lease(run) as held:
        assert time.time() >= expires
        assert held.generation == 2


def test_a_released_lease_is_free_and_generations_go_on(run):
    with hold_lease(run):
        pass
    with hold_lease(run) as again:
        assert again.generation == 2
    assert run.list("lease") == [again.key]


def test_the_heartbeat_extends_the_lease(run):
    with hold_lease(run):
        first = expiry(run)
        deadline = time.monotonic() + 20
        while expiry(run) == first and time.monotonic() < deadline:
            pass
        assert expiry(run) > first


def test_of_many_writers_at_once_one_holds_the_run(run):
    plant(run, time.time() - 1)
    writers = 8
    tried = threading.Barrier(writers)

    def write(_) -> bool:
        mine = open_storage(run.url, run._config)
        tried.wait()
        try:
            with hold_lease(mine):
                tried.wait(timeout=60)
                return True
        except LeaseError:
            tried.wait(timeout=60)
            return False

    with ThreadPoolExecutor(writers) as pool:
        assert sum(pool.map(write, range(writers))) == 1
