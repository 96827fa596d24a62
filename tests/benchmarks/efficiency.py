"""Bytes a step and the efficiency that docs/scaling.md's formula gives for clusters of GPUs.

    python tests/benchmarks/efficiency.py [--config gta2cityscapes_daformer_distcl] [--seconds 0.1]

Arithmetic only. `--seconds` is what one GPU needs for its share of a step.
"""

import argparse
import math

from torch import nn

from cluster.config import TrainConfig
from cluster.dry_run import all_reduced_bytes
from jobs.command_line import parse
from sepico.network import build_segmentor

NODE = 8  # GPUs that share a network card
NVLINK = 450e9  # bytes a second and direction of a GPU inside a node
LATENCY = 20e-6  # of a call inside a node
HOP = 5e-6  # of each further level of the tree between nodes
GPUS, GBIT = (8, 16, 32, 64, 128, 256, 512, 1024), (100, 400)


def communication(volume: float, calls: int, gpus: int, bandwidth: float) -> float:
    """Seconds for an all-reduce of `volume` bytes and `calls` small ones, none of it overlapped."""
    nodes = gpus // NODE
    inside = 2 * volume * (NODE - 1) / NODE / NVLINK
    between = 2 * volume * (nodes - 1) / nodes / bandwidth
    return inside + between + calls * (LATENCY + 2 * HOP * math.log2(nodes))


def small_calls(config: TrainConfig, network: nn.Module) -> int:
    """Blocking calls of a step: batch-norm's, the regulariser's two domains, the gradient norm."""
    layers = {
        part: sum(isinstance(m, nn.BatchNorm2d) for m in getattr(network, part).modules())
        for part in ("encoder", "head", "projection")
    }
    # Student's passes forward and backward, the teacher's forward: see cluster.dry_run.
    passes = {"encoder": 2 * 3 + 3, "head": 2 * 2 + 2, "projection": 2 * 2 + 1}
    normalised = sum(layers[part] * passes[part] for part in layers)
    return (normalised if config.engine.batch_norm == "sync" else 0) + 4 + 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", default="gta2cityscapes_daformer_distcl")
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.1, 0.4])
    arguments = parser.parse_args()
    config = parse(TrainConfig, ["--config", arguments.config, "--model.encoder_weights", "null"])
    network = build_segmentor(config.model)
    sizes, calls = all_reduced_bytes(config, network), small_calls(config, network)
    for name, size in sizes.items():
        print(f"{name:<12}{size:>14,} bytes")
    gradients = sizes["gradients"]
    print(f"{calls} small calls\n")
    print("ZeRO  s/step  Gbit/s " + "".join(f"{gpus:>7}" for gpus in GPUS))
    # Stage 3 gathers the weights in nine passes and reduces once: ten halves of an all-reduce.
    for stage, volume in (("0-2", gradients), ("3", 5 * gradients)):
        for seconds in arguments.seconds:
            for gbit in GBIT:
                rows = [communication(volume, calls, gpus, gbit * 1e9 / 8) for gpus in GPUS]
                shares = "".join(f"{seconds / (seconds + row):7.1%}" for row in rows)
                print(f"{stage:<6}{seconds:<8}{gbit:<7}{shares}")


if __name__ == "__main__":
    main()
