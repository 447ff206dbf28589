"""Convolutions with batch norm, the bricks of the hybrid encoder (RT-DETR, arXiv 2304.08069; RepVGG, arXiv 2101.03697).

A norm in evaluation mode is a constant scale and shift, so it is folded into the weights: exact, also for gradients, and a pass
over the map is saved. Folding happens at each call; nothing is stored.

Legend: B images, C channels. `real` (B,1,H,W) is 1 on the image and 0 in padding, or None where nothing is padded.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["none", "relu", "silu", "gelu"]


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, activation.

    Padding counts as zero wherever a cell looks at its neighbours, as what lies beyond the image does.

    Args:
        channels: C in.
        out: C out.
        size: of the kernel.
        stride: of the convolution.
        groups: of the convolution.
        activation: after the norm.
    """

    def __init__(
        self, channels: int, out: int, size: int = 1, stride: int = 1, groups: int = 1, activation: Activation = "none"
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, size, stride, size // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.activation = activation

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """(B,C,H,W) -> (B,out,ceil(H / stride),ceil(W / stride))."""
        if real is not None and self.conv.kernel_size[0] > 1:
            x = x * real
        if self.norm.training:
            x = self.norm(self.conv(x))
        else:
            weight, bias = self.folded()
            x = F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding, groups=self.conv.groups)
        return activate(x, self.activation)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of one convolution that does the same, with the norm's running statistics."""
        norm = self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self.conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


def start_small(parts: nn.Module, deviation: float = 0.01) -> None:
    """Draws the weights of every `ConvNorm` from N(0, deviation), a few times smaller than PyTorch's default.

    Behind a batch norm only their direction counts, and Adam's steps are of the same size whatever the weights are: smaller
    ones turn faster. That helps a run of minutes; in a long one they grow by themselves.
    """
    for module in parts.modules():
        if isinstance(module, ConvNorm):
            nn.init.normal_(module.conv.weight, std=deviation)


class RepVgg(nn.Module):
    """A 3x3 and a 1x1 convolution side by side, summed; one convolution in evaluation (RepVGG, arXiv 2101.03697).

    Args:
        channels: C.
        activation: after the sum.
    """

    def __init__(self, channels: int, activation: Activation = "silu") -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3)
        self.conv2 = ConvNorm(channels, channels, 1)
        self.activation = activation

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """(B,C,H,W) -> (B,C,H,W)."""
        if self.conv1.norm.training:
            return activate(self.conv1(x, real) + self.conv2(x), self.activation)
        (wide, first), (narrow, second) = self.conv1.folded(), self.conv2.folded()
        x = x if real is None else x * real
        return activate(F.conv2d(x, wide + F.pad(narrow, (1, 1, 1, 1)), first + second, padding=1), self.activation)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation of that name; in place where its gradient can do without the input."""
    if activation == "relu":
        return F.relu(x, inplace=True)
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x) if activation == "gelu" else x
