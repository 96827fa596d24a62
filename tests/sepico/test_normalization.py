"""Batch-norm of a process that is alone is PyTorch's own."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F

from sepico.normalization import _GlobalBatchNorm, set_batch_norm


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


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_gradients_of_batch_norm_over_ranks_are_exact_in_both_precisions(dtype, tolerance):
    """Of a rank that is alone, against PyTorch's own in float64."""
    torch.manual_seed(0)
    x = (torch.randn(3, 6, 15, 15) + 2).to(dtype).contiguous(memory_format=torch.channels_last)
    affine, upstream = torch.randn(2, 6), torch.randn(x.shape).to(dtype)
    answers = []
    for number, function in (
        (torch.float64, lambda x, w, b: F.batch_norm(x, None, None, w, b, True)),
        (dtype, lambda x, w, b: _GlobalBatchNorm.apply(x, w, b, 1e-5, lambda sums: sums)[0]),
    ):
        images = x.to(number).requires_grad_()
        parameters = affine.to(number if number == torch.float64 else torch.float32).unbind()
        inputs = [images, *(p.clone().requires_grad_() for p in parameters)]
        y = function(*inputs)
        answers.append([y, *torch.autograd.grad(y, inputs, upstream.to(number))])
    for exact, found in zip(*answers, strict=True):
        assert (exact - found).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize("side", [15, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_statistics_over_ranks_are_exact_in_every_precision_and_size(dtype, side):
    torch.manual_seed(0)
    # Numbers of a spread that is small beside them, of which a long sum in float32 loses most.
    x = (torch.randn(2, 6, side, side) * 0.003 + 1.7).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    affine = torch.ones(6), torch.zeros(6)
    _, mean, variance, _ = _GlobalBatchNorm.apply(x, *affine, 1e-5, lambda sums: sums)
    exact_variance, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert ((mean - exact_mean) / exact_variance.sqrt()).abs().max() < 1e-3
    assert (variance / exact_variance - 1).abs().max() < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("statistics", ["local", "of all ranks"])
def test_scale_and_shift_may_lie_anywhere_in_a_flat_buffer(statistics, dtype):
    """As those of ZeRO do, after a bias of 19 classes."""
    expected = nn.Sequential(nn.BatchNorm2d(32)).cuda().double()
    nn.init.normal_(expected[0].weight)
    network = copy.deepcopy(expected).float()
    flat = torch.cat([torch.zeros(1, device="cuda"), *(p.data for p in network.parameters())])
    network[0].weight.data, network[0].bias.data = flat[1:33], flat[33:]
    set_batch_norm(network, "local")
    x = torch.randn(3, 32, 15, 15, device="cuda", dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(x.shape, device="cuda")
    for training in (True, False) if statistics == "local" else (True,):
        answers = []
        for own, images in ((expected, x.double()), (network, x)):
            images = images.detach().clone().requires_grad_()
            if training and own is network and statistics == "of all ranks":
                affine = own[0].weight, own[0].bias, own[0].eps
                y, *_ = _GlobalBatchNorm.apply(images, *affine, lambda sums: sums)
            else:
                y = own.train(training)(images)
            (y * weight).sum().backward()
            answers.append([y, images.grad, own[0].weight.grad, own[0].bias.grad])
        for exact, found in zip(*answers, strict=True):
            assert (exact - found).abs().max() < 0.02 * exact.abs().max()
