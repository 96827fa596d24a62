"""MiT's blocks with less to keep for the backward; the same numbers and parameter names.

Of 18 values a channel and token that a block keeps, 8 are what the depthwise convolution and the
GELU answer. The GELU's cost little to compute again, on CPUs the convolution's too. Attention's
probabilities, one for each pair of tokens and head, come on top.

Xie et al.: SegFormer (NeurIPS 2021), sections 3.1 (attention) and eq. 3 (Mix-FFN).
"""

import torch
from segmentation_models_pytorch.encoders import mix_transformer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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


class Mlp(mix_transformer.Mlp):
    """Mix-FFN without dropout that keeps less of what it computes in its widest layers."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B, h w, C) -> (B, h w, C)."""
        # No name for what lies between: it would live for longer than it is needed.
        return self.fc2(
            *self.dwconv.dwconv(self.fc1(x).transpose(1, 2).unflatten(2, (height, width)))
        )


class _DepthwiseConv(nn.Conv2d):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, C, h, w) -> (B, C, h, w), and on CPUs what it can be computed from again."""
        y = super().forward(x)
        if x.device.type != "cpu" or not y.requires_grad:
            return (y,)
        # Copies: under ZeRO 3 the parameters are elsewhere when fc2 runs, in either direction.
        kernel = (parameter.detach().to(x.dtype, copy=True) for parameter in self.parameters())
        return y, x.detach(), *kernel


class _GeluLinear(nn.Linear):
    """GELU of a depthwise convolution, and the linear layer behind it."""

    def forward(self, grid: Tensor, *source: Tensor) -> Tensor:
        """What `_DepthwiseConv` answers -> (B, h w, C_out)."""
        # Under autocast a convolution's dtype is the one that this product has there too.
        parameters = self.weight.to(grid.dtype), self.bias.to(grid.dtype)
        return _GeluLinearFunction.apply(grid, *parameters, *source)


class _GeluLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grid, weight, bias, *source):
        ctx.save_for_backward(weight, *(source or (grid,)))
        # Not `F.linear`: DeepSpeed puts its own in its place under ZeRO 3, which rounds otherwise.
        return torch.ops.aten.linear(F.gelu(_tokens(grid)), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, grid, *kernel = ctx.saved_tensors
        if kernel:
            grid = F.conv2d(grid, *kernel, padding=1, groups=grid.shape[1])
        x = _tokens(grid)
        rows = grad.flatten(0, -2)
        grad_weight = rows.t() @ F.gelu(x).flatten(0, -2)
        grad_x = torch.ops.aten.gelu_backward(grad @ weight, x)
        grad_grid = grad_x.transpose(1, 2).unflatten(2, grid.shape[2:])
        return grad_grid, grad_weight, rows.sum(0), None, None, None


def _tokens(grid: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w, C)."""
    return grid.flatten(2).transpose(1, 2)


def keep_less(encoder: nn.Module) -> None:
    """Put these layers in the place of a MiT encoder's own; others are left as they are."""
    for module in encoder.modules():
        if type(module) is mix_transformer.Attention:
            module.__class__ = Attention
        elif type(module) is mix_transformer.Mlp and module.drop.p == 0:
            module.__class__ = Mlp
            module.dwconv.dwconv.__class__ = _DepthwiseConv
            module.fc2.__class__ = _GeluLinear
