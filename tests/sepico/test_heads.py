"""The heads' faster formulations against the convolutions they stand for."""

import pytest
import torch
from torch.nn import functional as F

from sepico.heads import winograd
from sepico.heads.deeplab import DeepLabV2Head
from sepico.heads.layers import Conv1x1, Conv3x3, DilatedDepthwiseConv


def assert_equal_with_gradients(ours, theirs, leaves):
    """Both outputs, and the gradients that a random cotangent gives the leaves."""
    assert torch.allclose(ours, theirs)
    cotangent = torch.randn_like(ours)
    pairs = zip(
        torch.autograd.grad(ours, leaves, cotangent),
        torch.autograd.grad(theirs, leaves, cotangent),
        strict=True,
    )
    assert all(torch.allclose(mine, other) for mine, other in pairs)


@pytest.mark.parametrize(("dilation", "size"), [(2, (6, 8)), (3, (7, 11)), (6, (5, 9))])
def test_a_dilated_depthwise_convolution_by_phases_is_the_dilated_one(dilation, size):
    torch.manual_seed(0)
    layer = DilatedDepthwiseConv(4, dilation).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    plain = F.conv2d(x, layer.weight, padding=dilation, dilation=dilation, groups=4)
    assert_equal_with_gradients(layer(x), plain, [x, layer.weight])


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 4), (3, 17)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_3x3_convolution_has_the_gradients_of_the_plain_one(size, layout, monkeypatch):
    monkeypatch.setattr(winograd, "TILES", 6)  # less than an image, and than a row of the widest
    torch.manual_seed(0)
    layer = Conv3x3(4, 3).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    plain = F.conv2d(x, layer.weight, padding=1)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert_equal_with_gradients(layer(x), plain, [x, layer.weight])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_1x1_convolution_as_a_product_is_the_plain_one(layout):
    torch.manual_seed(0)
    layer = Conv1x1(4, 3).double()
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    ours = layer(x)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert_equal_with_gradients(ours, F.conv2d(x, layer.weight), [x, layer.weight])


@pytest.mark.parametrize("size", [(5, 7), (9, 4)])
def test_the_deeplab_head_is_the_sum_of_its_dilated_convolutions(size):
    torch.manual_seed(0)
    head = DeepLabV2Head(6, 3, (1, 2, 6)).double()
    for branch in head.branches:
        torch.nn.init.normal_(branch.bias)
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    plain = sum(branch(x) for branch in head.branches)
    assert_equal_with_gradients(head([x]), plain, [x, *head.parameters()])
