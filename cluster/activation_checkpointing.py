"""Activation checkpointing: the blocks of an encoder keep their inputs and are recomputed in the
backward, which trades one more forward of the encoder for the memory of its activations.

Invariant: gradients and buffers are those of the network without it. Dropout and drop-path draw
again what they drew; batch-norm's running buffers count a batch once.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


class _Recomputed:
    """Mixed into a block's class. A call, and not `forward`: ZeRO-3's hooks, which gather the
    parameters that the block itself holds, have to run in the recompute too."""

    def __call__(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().__call__(*args)
        # An early stop would leave the block by an exception, past ZeRO-3's hooks.
        with set_checkpoint_early_stop(False):
            return checkpoint(
                super().__call__, *args, use_reentrant=False, context_fn=self._contexts
            )

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _unchanged_buffers(self)


@contextmanager
def _unchanged_buffers(block: nn.Module) -> Iterator[None]:
    before = [buffer.clone() for buffer in block.buffers()]
    yield
    for buffer, value in zip(block.buffers(), before, strict=True):
        buffer.copy_(value)


def checkpoint_activations(encoder: nn.Module) -> None:
    """Recompute every block of `encoder` in the backward, in place; parameter names stay.

    A block is an element of a Sequential or ModuleList that is made of several modules. Raises
    ValueError if there is none.
    """
    blocks = list(_blocks(encoder))
    if not blocks:
        raise ValueError(
            f"engine.activation_checkpointing: {type(encoder).__name__} is not built of blocks: "
            "switch it off or take another model.encoder"
        )
    for block in blocks:
        cls = type(block)
        block.__class__ = type(f"Recomputed{cls.__name__}", (_Recomputed, cls), {})


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    listed = isinstance(module, (nn.Sequential, nn.ModuleList))
    for child in module.children():
        leaves = [leaf for leaf in child.modules() if not any(leaf.children())]
        if listed and len(leaves) > 1 and not isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield child
        else:
            yield from _blocks(child)
