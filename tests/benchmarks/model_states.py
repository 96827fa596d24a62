"""Model states of a worker under ZeRO-3, counted at 1, 2 and 4 workers, against the formula.

    python tests/benchmarks/model_states.py --config camvid_day2dusk

Counts the storages of every tensor that is alive in a worker after a training step. P parameters
take 4 bytes each in student and teacher, 12 in the optimiser (float32 master and two moments), all
of it divided by the number of workers n: 20 P / n. What else is alive is printed beside it.
"""

import argparse
import gc
from collections.abc import Iterable

import torch
import workers
from workers import Group, configuration, machine

MIB = 1024**2


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages, one that several tensors share counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Training(workers.Training):
    def count(self) -> dict[str, int]:
        """Bytes of this worker by what holds them, and P."""
        gc.collect()
        zero = self.engine.module.optimizer
        masters = zero.fp32_partitioned_groups_flat
        moments = [v for state in zero.optimizer.state.values() for v in state.values()]
        shards = {
            "student": [p.ds_tensor for p in self.network.parameters()],
            "teacher": [p.ds_tensor for p in self.teacher.network.parameters()],
            "optimiser": [*masters, *moments],
        }
        alive = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
        return {
            **{name: size(tensors) for name, tensors in shards.items()},
            "all that is alive": size(alive),
            "parameters": sum(p.ds_numel for p in self.network.parameters()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    arguments, config = configuration(parser)
    config.engine.zero_stage = 3
    print(machine())
    for n in (1, 2, 4):
        with Group(config, arguments.images, [i % 2 for i in range(n)], Training) as group:
            group.call("steps", 1)
            of_ranks = group.call("count")
        found = {name: max(counts[name] for counts in of_ranks) for name in of_ranks[0]}
        parameters = found.pop("parameters")
        parts = [found[name] for name in ("student", "teacher", "optimiser")]
        formula = 20 * parameters / n
        if n == 1:
            print(f"{config.model.encoder}, {parameters:,} parameters; MiB of the fullest worker\n")
            print("workers " + "".join(f"{name:>20}" for name in [*found, "sum", "20 P / n"]))
        values = [*found.values(), sum(parts), formula]
        print(f"{n:<8}" + "".join(f"{value / MIB:20.2f}" for value in values), flush=True)
        print(f"{'':8}sum / formula {sum(parts) / formula:.4f}")


if __name__ == "__main__":
    main()
