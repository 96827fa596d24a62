"""What a run leaves of its numbers, when it is started again."""

import json

from cluster.run_config import METRICS
from cluster.storage import StorageConfig, open_storage
from cluster.telemetry import RunLog


def test_a_run_that_failed_before_its_first_numbers_can_be_started_again(tmp_path):
    run = open_storage(str(tmp_path), StorageConfig())
    RunLog(run, 0).close()
    log = RunLog(run, 0)
    log.log(0, {"source_ce": 1.0})
    log.close()
    (line,) = map(json.loads, run.get(METRICS).splitlines())
    assert line["step"] == 0 and line["source_ce"] == 1.0


def test_steps_after_the_checkpoint_are_replaced(tmp_path):
    run = open_storage(str(tmp_path), StorageConfig())
    for start, loss in ((0, 1.0), (2, 2.0)):
        log = RunLog(run, start)
        for step in range(start, start + 3):
            log.log(step, {"source_ce": loss})
        log.close()
    lines = map(json.loads, run.get(METRICS).splitlines())
    assert [(line["step"], line["source_ce"]) for line in lines] == [
        (0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)
    ]  # fmt: skip
