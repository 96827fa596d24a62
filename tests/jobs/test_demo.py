"""The demo on machines of any size."""

import pytest

from jobs import demo


@pytest.mark.parametrize("fit, workers, taken", [(1, 2, 1), (2, 2, 2), (3, 8, 2), (16, 6, 4)])
def test_workers_fit_the_machine_and_share_the_batch_evenly(fit, workers, taken, monkeypatch):
    """A batch of 8, on a machine with room for so many workers: one GPU has room for one."""
    monkeypatch.setattr(demo, "room", lambda cpus: fit)
    assert demo._workers(demo.DemoConfig(workers=workers)) == taken
