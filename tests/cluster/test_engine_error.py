"""A rank whose step raises says so at once, while the others are elsewhere."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.cluster.engine_ranks import build, engine_config, global_batch, method_config
from tests.processes import run_ranks

WAIT = timedelta(seconds=40)


def raise_in_a_step(rank: int, world_size: int, folder: str) -> None:
    """Rank 1 raises after its first loss term; rank 0 waits, in no collective, to hear of it."""
    from cluster.engine import Engine, adopt_process_group
    from sepico.step import AdaptationStep

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    adopt_process_group()
    config = method_config("source_only", start=0)
    network, _, _ = build(config)
    settings = engine_config(1, "source_only")
    engine = Engine(network, settings, config.optimization, projection_start=0)
    news = dist.FileStore(f"{folder}/news", world_size)
    if rank == 0:
        news.wait(["raised"], WAIT)
        return

    def terms():
        step = AdaptationStep(config, network.normalize, None, None)
        yield from step.terms(engine, global_batch(0, range(rank, 4, 2)), 0)
        raise MemoryError("no room for the next term")

    with pytest.raises(MemoryError, match="no room"):
        engine.step(terms(), 0)
    news.set("raised", "yes")


def test_an_error_in_a_step_is_raised_while_other_ranks_are_elsewhere(tmp_path):
    run_ranks(raise_in_a_step, 2, str(tmp_path))
