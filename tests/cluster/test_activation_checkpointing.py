"""Recomputing the encoder's blocks changes the memory of a step and none of its numbers."""

import copy

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from cluster.activation_checkpointing import checkpoint_activations
from sepico.mix_transformer import keep_less

# One of each family: transformer with drop-path, bottlenecks, timm's with squeeze-excite, and
# blocks that hold a parameter themselves.
ENCODERS = ("mit_b0", "resnet18", "tu-test_efficientnet", "tu-test_convnext")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    encoder = smp.encoders.get_encoder(name, weights=None).train()
    keep_less(encoder)
    return encoder


def step(encoder: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients and buffers after two forwards and backwards, and the bytes kept between each."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    torch.manual_seed(1)
    for _ in range(2):
        kept.clear()  # freed memory is used again: an address tells tensors apart in one pass only
        images = torch.randn(2, 3, 64, 64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = encoder(images)
        sum(feature.square().mean() for feature in features[-4:]).backward()
    found = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    return found | dict(encoder.named_buffers()), sum(kept.values())


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_buffers_and_random_numbers_are_those_of_the_plain_encoder(name):
    plain = build(name)
    recomputed = copy.deepcopy(plain)
    checkpoint_activations(recomputed)
    expected, whole = step(plain)
    after = torch.rand(1)
    found, kept = step(recomputed)
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert torch.equal(torch.rand(1), after)
    assert kept < 0.6 * whole  # the stem, which is no block, holds half of what resnet18 keeps


def test_without_gradients_nothing_is_kept_or_repeated():
    encoder = build("resnet18")
    checkpoint_activations(encoder)
    calls = []
    encoder.layer1[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        encoder(torch.randn(1, 3, 64, 64))
    assert len(calls) == 1


def test_an_encoder_without_blocks_is_refused():
    encoder = smp.encoders.get_encoder("vgg11_bn", weights=None)
    with pytest.raises(ValueError, match=r"engine.activation_checkpointing: VGGEncoder"):
        checkpoint_activations(encoder)
