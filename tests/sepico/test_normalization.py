"""Batch-norm of a process that is alone is PyTorch's own."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from sepico.normalization import set_batch_norm


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layer", [nn.BatchNorm2d, BatchNormAct2d])
def test_local_batch_norm_is_pytorch_s_own(layer, momentum):
    torch.manual_seed(0)
    expected = nn.Sequential(layer(6))
    expected[0].momentum = momentum
    nn.init.normal_(expected[0].weight)
    ours = copy.deepcopy(expected)
    set_batch_norm(ours, "local")
    for mode in (True, True, False):
        answers = []
        for network in (expected, ours):
            x = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(1))
            x.requires_grad_()
            y = network.train(mode)(x)
            y.square().sum().backward()
            answers.append([y, x.grad, *network.state_dict().values(), network[0].weight.grad])
        assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_shift_may_lie_anywhere_in_a_flat_buffer(dtype):
    """As those of ZeRO do, after a bias of 19 classes."""
    network = nn.Sequential(nn.BatchNorm2d(32).cuda())
    flat = torch.randn(2 * 32 + 1, device="cuda")
    network[0].weight.data, network[0].bias.data = flat[1:33], flat[33:]
    x = torch.randn(3, 32, 15, 15, device="cuda", dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = torch.batch_norm(
        x.float(), network[0].weight, network[0].bias, None, None, True, 0.1, 1e-5, False
    )
    set_batch_norm(network, "local")
    y = network(x)
    y.sum().backward()
    torch.cuda.synchronize()
    assert (y.float() - expected).abs().max() < 0.05 * expected.abs().max()
