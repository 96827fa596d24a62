"""MiT's blocks with less to keep for the backward; the same numbers and parameter names.

Of 18 values a channel and token that a block keeps, 4 are the GELU's output, which costs little to
compute again, and attention's probabilities, one for each pair of tokens and head, come on top.

Xie et al.: SegFormer (NeurIPS 2021), sections 3.1 (attention) and eq. 3 (Mix-FFN).
"""

import torch
from segmentation_models_pytorch.encoders import mix_transformer
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(mix_transformer.Attention):
    """Fused, without the matrix of probabilities; not on CPUs, whose fused backward is slower."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B, h w, C) -> (B, h w, C)."""
        if x.device.type == "cpu":
            return super().forward(x, height, width)
        return self.fused(x, height, width)

    def fused(self, x: Tensor, height: int, width: int) -> Tensor:
        """The same by PyTorch's kernels for the device."""
        reduced = x
        if self.sr_ratio > 1:
            grid = x.transpose(1, 2).unflatten(2, (height, width))
            reduced = self.norm(self.sr(grid).flatten(2).transpose(1, 2))
        query = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        keys_values = self.kv(reduced).unflatten(2, (2, self.num_heads, -1))
        key, value = keys_values.permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=self.scale
        )
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))


class _GeluLinear(nn.Linear):
    """GELU and the linear layer behind it, as one that keeps only the GELU's input."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C_in) -> (B, N, C_out)."""
        # Under autocast x comes from a convolution, in the dtype that this product has there too.
        return _GeluLinearFunction.apply(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class _GeluLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        # Not `F.linear`: DeepSpeed puts its own in its place under ZeRO 3, which rounds otherwise.
        return torch.ops.aten.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_weight = rows.t() @ F.gelu(x).flatten(0, -2)
        grad_x = torch.ops.aten.gelu_backward(grad @ weight, x)
        return grad_x, grad_weight, rows.sum(0)


def keep_less(encoder: nn.Module) -> None:
    """Put these layers in the place of a MiT encoder's own; others are left as they are."""
    for module in encoder.modules():
        if type(module) is mix_transformer.Attention:
            module.__class__ = Attention
        elif type(module) is mix_transformer.Mlp and module.drop.p == 0:
            module.act = nn.Identity()
            module.fc2.__class__ = _GeluLinear
