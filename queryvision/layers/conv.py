"""Convolutions with batch norm, the bricks of the hybrid encoder (RT-DETR, arXiv 2304.08069; RepVGG, arXiv 2101.03697).

A norm in evaluation mode is a constant scale and shift, so it is folded into the weights: exact, also for gradients, and a pass
over the map is saved. Folding happens at each call; nothing is stored.

Legend: B images, C channels. `real` (B,1,H,W) is 1 on the image and 0 in padding, or None where nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from queryvision.ops.norm_silu import norm_silu

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

    def forward(self, x: Tensor | Sequence[Tensor], real: Tensor | None = None) -> Tensor:
        """(B,C,H,W), or parts as `pointwise` takes them -> (B,out,ceil(H / stride),ceil(W / stride))."""
        if self.norm.training and self.activation == "silu":
            return norm_silu([self.before_norm(x, real)], [self.norm])
        if self.norm.training:
            return activate(self.norm(self.before_norm(x, real)), self.activation)
        return activate(self._convolve(x, real, *self.folded()), self.activation)

    def before_norm(self, x: Tensor | Sequence[Tensor], real: Tensor | None = None) -> Tensor:
        """The convolution alone."""
        return self._convolve(x, real, self.conv.weight, None)

    def _convolve(self, x: Tensor | Sequence[Tensor], real: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not isinstance(x, Tensor):
            assert (self.conv.kernel_size, self.conv.stride, self.conv.groups) == ((1, 1), (1, 1), 1)
            return pointwise(x, weight, bias)
        if real is not None and self.conv.kernel_size[0] > 1:
            x = x * real
        return F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding, groups=self.conv.groups)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of one convolution that does the same, with the norm's running statistics."""
        norm = self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self.conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


class ConvGroupNorm(nn.Module):
    """Convolution without bias, group norm, activation; padding counts as zero, as in `ConvNorm`.

    Args:
        channels: C in.
        out: C out.
        size: of the kernel.
        activation: after the norm.
        groups: of the norm; fewer where a group would hold one channel.
    """

    def __init__(self, channels: int, out: int, size: int = 1, activation: Activation = "none", groups: int = 32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, size, padding=size // 2, bias=False)
        self.norm = nn.GroupNorm(min(groups, out // 2), out)
        self.activation = activation
        nn.init.kaiming_uniform_(self.conv.weight, a=1)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """(B,C,H,W) -> (B,out,H,W)."""
        if real is not None and self.conv.kernel_size[0] > 1:
            x = x * real
        return activate(self.norm(self.conv(x)), self.activation)


def pointwise(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution of maps that lie behind each other along the channels, without putting them there.

    A coarser part is enlarged after its share of the convolution, which is the same at a quarter of the work.

    Args:
        parts: (B,C_i,H,W), or (B,C_i,ceil(H / 2),ceil(W / 2)) to be enlarged by the nearest cell; the last has the full size.
        weight: (out,C,1,1), C the sum of all C_i.
        bias: (out,).

    Returns:
        (B,out,H,W).
    """
    height, width = parts[-1].shape[-2:]
    shares = torch.split(weight, [part.shape[1] for part in parts], 1)
    total = F.conv2d(parts[-1], shares[-1], bias)
    for part, share in zip(parts[:-1], shares[:-1], strict=True):
        out = F.conv2d(part, share)
        if out.shape[-2:] != total.shape[-2:]:
            out = F.interpolate(out, scale_factor=2.0, mode="nearest")[..., :height, :width]
        total = total.add_(out)
    return total


def start_small(parts: nn.Module, deviation: float = 0.01) -> None:
    """Draws the weights of every `ConvNorm` from N(0, deviation), a few times smaller than PyTorch's default.

    Behind a batch norm only their direction counts, and Adam's steps are of the same size whatever the weights are: smaller
    ones turn faster. That helps a run of minutes; in a long one they grow by themselves.
    """
    for module in parts.modules():
        if isinstance(module, ConvNorm):
            nn.init.normal_(module.conv.weight, std=deviation)


class RepVgg(nn.Module):
    """SiLU of a 3x3 and a 1x1 convolution side by side, summed; one convolution in evaluation (RepVGG, arXiv 2101.03697).

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3)
        self.conv2 = ConvNorm(channels, channels, 1)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """(B,C,H,W) -> (B,C,H,W)."""
        if self.conv1.norm.training:
            return norm_silu([self.conv1.before_norm(x, real), self.conv2.before_norm(x)], [self.conv1.norm, self.conv2.norm])
        (wide, first), (narrow, second) = self.conv1.folded(), self.conv2.folded()
        x = x if real is None else x * real
        return F.silu(F.conv2d(x, wide + F.pad(narrow, (1, 1, 1, 1)), first + second, padding=1))


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation of that name; in place where its gradient can do without the input."""
    if activation == "relu":
        return F.relu(x, inplace=True)
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x) if activation == "gelu" else x
