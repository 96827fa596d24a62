"""MiT with our layers beside the one of segmentation-models-pytorch."""

import copy
from functools import partial

import pytest
import segmentation_models_pytorch as smp
import torch

from sepico.mix_transformer import Attention, _DepthwiseConv, keep_less


@pytest.fixture(scope="module")
def encoders():
    """Theirs, ours, and ours with the attention and the Mix-FFN of other devices than CPUs."""
    torch.manual_seed(0)
    theirs = smp.encoders.get_encoder("mit_b0", weights=None).eval()  # drop-path draws otherwise
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):  # it begins at zero, where it is not missed
            parameter.data.normal_(0, 0.02)
    ours = copy.deepcopy(theirs)
    keep_less(ours)
    fused = copy.deepcopy(ours)
    for module in fused.modules():
        if isinstance(module, Attention):
            module.forward = module.fused
        elif isinstance(module, _DepthwiseConv):
            module.forward = partial(_without_source, module.forward)
    return theirs, ours, fused


def _without_source(convolve, x):
    return convolve(x)[:1]


def run(encoder, images, dtype=torch.float32):
    """The last stages, gradients by parameter name, and the bytes kept for the backward."""
    kept: dict[int, int] = {}
    weights = {weight.data_ptr() for weight in encoder.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    encoder.zero_grad()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        stages = encoder(images)[-4:]
    # Stages are layer-normed: their mean or square would have no gradient.
    sum((stage.float() ** 3).mean() for stage in stages).backward()
    gradients = {name: value.grad for name, value in encoder.named_parameters()}
    return stages, gradients, sum(kept.values())


@pytest.mark.parametrize("which", [1, 2], ids=["ours", "fused"])
# bf16 is itself off by 4e-2 of the largest value; attention of another kernel rounds otherwise.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=["fp32", "bf16"]
)
def test_stages_and_gradients_are_those_of_the_original(dtype, tolerance, which, encoders):
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected, gradients, _ = run(encoders[0], images, dtype)
    stages, ours, _ = run(encoders[which], images, dtype)
    for stage, want in zip(stages, expected, strict=True):
        assert stage.dtype == want.dtype
        assert (stage - want).abs().max() <= tolerance * want.abs().max()
    for name, want in gradients.items():
        assert (ours[name] - want).abs().max() <= tolerance * want.abs().max(), name


def test_less_is_kept_for_the_backward(encoders):
    images = torch.rand(1, 3, 256, 256)
    theirs, ours, fused = (run(encoder, images)[2] for encoder in encoders)
    assert ours < 0.7 * theirs
    assert fused < 0.8 * theirs
