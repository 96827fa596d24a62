"""What is known of a sweep's trials and warm-ups: SWEEP/records/NAME.json."""

import json
import math
import time
from dataclasses import asdict, dataclass, field

import xxhash

from cluster.storage import Storage
from cluster.sweep_space import Point

RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"
WARM_UP = "warm-up"
REPLACED = "replaced"  # a member of a population that took over another's state
RECORDS = "records"
OWN = "default"  # name of the trial of the configuration that a sweep begins with


@dataclass
class Record:
    """What is known of a trial."""

    name: str
    run: str
    point: Point
    seed: int
    status: str = RUNNING
    reason: str = ""
    fork: str = ""  # checkpoint that a member of a population began from; empty: the warm-up's
    warm_up: str = ""  # record of the warm-up that it forked from
    member: str = ""  # of a population
    measured: dict[str, dict[str, float]] = field(default_factory=dict)  # by step
    worker_seconds: float = 0.0  # from asking for workers to their end, times their number
    updated: float = 0.0  # seconds since the epoch

    @property
    def is_trial(self) -> bool:
        return self.status != WARM_UP

    def last(self, objective: str) -> float:
        """The objective at the last stop, NaN if there is none."""
        if self.status == FAILED or not self.measured:
            return math.nan
        return self.measured[max(self.measured, key=int)].get(objective, math.nan)

    def write(self, sweep: Storage) -> None:
        self.updated = time.time()
        sweep.put(f"{RECORDS}/{self.name}.json", json.dumps(asdict(self), indent=1).encode())


def read_records(sweep: Storage) -> list[Record]:
    """All records, oldest change first; those of warm-ups too."""
    records = (_read(sweep, key) for key in sweep.list(RECORDS))
    return sorted(records, key=lambda record: record.updated)


def read_record(sweep: Storage, name: str) -> Record:
    """A trial's record. Raises MissingObjectError if there is none."""
    return _read(sweep, f"{RECORDS}/{name}.json")


def _read(sweep: Storage, key: str) -> Record:
    record = Record(**json.loads(sweep.get(key)))
    folder, name = record.run.split("/")[-2:]
    record.run = f"{sweep.url}/{folder}/{name}"  # the sweep may have been moved
    return record


def finish_record(sweep: Storage, name: str, status: str, reason: str) -> None:
    """Note how a trial ended that did not end by itself."""
    record = read_record(sweep, name)
    if record.status == RUNNING:
        record.status, record.reason = status, reason
        record.write(sweep)


def trial_name(point: Point, seed: int, fork: str = "") -> str:
    digest = xxhash.xxh3_64_hexdigest(json.dumps([point, fork], sort_keys=True).encode())
    return f"{digest[:8] if point or fork else OWN}-seed{seed}"
