"""What a run leaves of its numbers: when it is started again, and whatever the store does."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.io import encode_png

from cluster import telemetry
from cluster.lease import Lease, LeaseError
from cluster.run_config import METRICS
from cluster.storage import Patience, Storage, StorageConfig, StorageError, open_storage
from cluster.telemetry import RunLog, pause_seconds

PNG = encode_png(torch.zeros(3, 4, 4, dtype=torch.uint8)).numpy().tobytes()


@pytest.fixture
def run(tmp_path) -> Storage:
    return open_storage(str(tmp_path / "run"), StorageConfig())


@pytest.fixture
def begin():
    """`begin(run, start_step)`: a log whose warnings are in `warnings`; closed at the end."""
    logs = []

    def begin(run: Storage, start_step: int = 0) -> RunLog:
        lease, warnings = Lease(1, "test", "token"), []
        run.put(lease.key, lease.document(0))
        log = RunLog(run, lease, start_step, warnings.append)
        log.warnings = warnings
        logs.append(log)
        return log

    yield begin
    for log in logs:
        if not log._closed.is_set():
            log.close()


def logged(run: Storage) -> list[tuple[int, float]]:
    lines = map(json.loads, run.get(METRICS).splitlines())
    return [(line["step"], line["source_ce"]) for line in lines]


def test_a_run_that_failed_before_its_first_numbers_can_be_started_again(run, begin):
    begin(run).close()
    log = begin(run)
    log.log(0, {"source_ce": 1.0})
    log.close()
    assert logged(run) == [(0, 1.0)]


def test_steps_after_the_checkpoint_are_replaced(run, begin):
    for start, loss in ((0, 1.0), (2, 2.0)):
        log = begin(run, start)
        for step in range(start, start + 3):
            log.log(step, {"source_ce": loss})
        log.close()
    assert logged(run) == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]


def test_a_log_that_another_writer_fenced_uploads_nothing_and_says_so(run, begin):
    log = begin(run)
    log.log(0, {"source_ce": 1.0})
    log.upload()
    log.poll()
    successor = Lease(2, "elsewhere process 1", "other token")
    run.put(successor.key, successor.document(0))
    run.put(METRICS, b"the successor's")
    log.log(1, {"source_ce": 1.0})
    log.picture("step", 2, PNG)
    log.upload()
    with pytest.raises(LeaseError, match="taken over by elsewhere process 1"):
        log.poll()
    log.close()
    assert run.get(METRICS) == b"the successor's" and not run.list("panels")


class StalledStorage(Storage):
    """A put of metrics says that it `began` and waits for `answer`."""

    def put(self, key: str, data: bytes) -> None:
        if key == METRICS:
            self.began.set()
            assert self.answer.wait(60)
        super().put(key, data)


def test_training_goes_on_while_the_store_stalls(tmp_path, begin, monkeypatch):
    monkeypatch.setattr(telemetry, "UPLOAD_S", 0.01)
    run = StalledStorage((tmp_path / "run").as_uri(), StorageConfig(), Patience())
    run.began, run.answer = threading.Event(), threading.Event()
    log = begin(run)
    assert run.began.wait(60)
    log.log(0, {"source_ce": 1.0})
    log.picture("step", 1, PNG)
    assert not run.exists(METRICS)
    run.answer.set()
    log.close()
    assert logged(run) == [(0, 1.0)]
    assert run.get("panels/step-00000001.png") == PNG


class SlowLine(str):
    """A line that is `begun` to be written, and waits for `go_on`."""

    begun, go_on = threading.Event(), threading.Event()

    def __format__(self, spec: str) -> str:
        self.begun.set()
        assert self.go_on.wait(20)
        return str(self)


def test_training_goes_on_while_a_long_file_of_metrics_is_put_together(run, begin):
    log = begin(run)
    log._lines.append(SlowLine('{"step": 0, "source_ce": 1.0}'))
    with ThreadPoolExecutor() as pool:
        upload = pool.submit(log.upload)
        assert SlowLine.begun.wait(20)
        log.log(1, {"source_ce": 2.0})
        SlowLine.go_on.set()
        upload.result()
    log.close()
    assert logged(run) == [(0, 1.0), (1, 2.0)]


@pytest.mark.parametrize("size", [0, 1000, 13_000_000, 10**9])
def test_a_large_file_of_metrics_is_uploaded_less_often(size):
    pause = pause_seconds(size)
    assert pause >= 10
    assert size / pause <= 400_000


def test_what_a_store_refuses_is_one_warning_and_uploaded_later(run, begin, tmp_path):
    log = begin(run)
    log.log(0, {"source_ce": 1.0})
    in_the_way = tmp_path / "run" / METRICS / "folder"
    in_the_way.mkdir(parents=True)
    log.upload()
    log.upload()
    (warning,) = log.warnings
    assert METRICS in warning and "uploaded later" in warning
    with pytest.raises(StorageError, match=METRICS):
        log.upload(needed=True)  # as before a checkpoint, whose resume would miss the lines
    in_the_way.rmdir()
    in_the_way.parent.rmdir()
    log.close()
    assert logged(run) == [(0, 1.0)] and len(log.warnings) == 1


def test_events_that_are_uploaded_are_not_uploaded_again(run, begin, tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry, "EVENTS_BYTES", 1000)
    log = begin(run)
    for step in range(6):
        for name in ("source_ce", "mix_ce"):
            log.log(step, {name: float(step), **{f"{name}/class{i}": 1.0 for i in range(19)}})
        log.upload()
        (new,) = run.list("tensorboard")
        # Moved, as if it was seen. Elsewhere the seconds in the names tell their order.
        run.put(f"seen/events.out.tfevents.{step}", run.get(new))
        run.delete(new)
    log.close()
    events = EventAccumulator(str(tmp_path / "run/seen")).Reload()
    assert [scalar.step for scalar in events.Scalars("source_ce")] == list(range(6))
