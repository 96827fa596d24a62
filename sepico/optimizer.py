"""AdamW with the learning rates of encoder and heads, and with groups that wait."""

from typing import Any

import torch
from torch import nn

from sepico.config import OptimizationConfig


class PausableAdamW(torch.optim.AdamW):
    """AdamW whose groups can wait: a group with `paused` neither moves nor counts the step.

    Plain torch skips a parameter without a gradient; ZeRO's flat partitions hand it zeros
    instead, which would decay it and advance its bias correction. Whoever pauses a group gives it
    rate 0; its step count is put back to 0 here, so that it starts as if the run began there.
    """

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            if group["paused"]:
                for parameter in group["params"]:
                    if parameter in self.state:
                        self.state[parameter]["step"].zero_()
        return loss


def parameter_groups(network: nn.Module, config: OptimizationConfig) -> list[dict[str, Any]]:
    """AdamW groups: {encoder, head, projection} x {decayed, not decayed}, empty ones left out."""
    norm_types = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    undecayed = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, norm_types)
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        part = name.split(".")[0]
        decayed = id(parameter) not in undecayed and not any(
            part in name for part in ("pos_block", "pos_embed")
        )
        group = groups.setdefault(
            (part, decayed),
            {
                "name": f"{part}{'' if decayed else ' (no decay)'}",
                "params": [],
                "multiplier": 1.0 if part == "encoder" else config.head_lr_multiplier,
                "weight_decay": config.weight_decay if decayed else 0.0,
                "paused": False,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
