"""How neighbouring levels are fused: RT-DETR's CSP block (arXiv 2304.08069) and D-FINE's ELAN block (arXiv 2410.13842).

Legend: B images, C channels, D width. `real` is 1 on the image and 0 in padding, or None; see `layers.conv`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from queryvision.layers.conv import ConvNorm, RepVgg


class CSPRep(nn.Module):
    """Two 1x1 branches, one through RepVGG blocks, summed (cross stage partial, arXiv 1911.11929).

    Args:
        channels: C in.
        out: C out.
        num_blocks: RepVGG blocks.
        expansion: channels of the branches as a share of `out`.
    """

    def __init__(self, channels: int, out: int, num_blocks: int = 3, expansion: float = 1.0) -> None:
        super().__init__()
        hidden = int(out * expansion)
        self.conv1 = ConvNorm(channels, hidden, activation="silu")
        self.conv2 = ConvNorm(channels, hidden, activation="silu")
        self.bottlenecks = nn.ModuleList(RepVgg(hidden) for _ in range(num_blocks))
        self.conv3 = ConvNorm(hidden, out, activation="silu") if hidden != out else None

    def forward(self, x: Tensor | Sequence[Tensor], real: Tensor | None = None) -> Tensor:
        """(B,C,H,W), or parts of it (`layers.conv.pointwise`) -> (B,out,H,W)."""
        first = self.conv1(x)
        for block in self.bottlenecks:
            first = block(first, real)
        first = first + self.conv2(x)
        return first if self.conv3 is None else self.conv3(first)  # type: ignore[no-any-return]


class Elan(nn.Module):
    """Branches of growing depth side by side (RepNCSPELAN4, GELAN of arXiv 2402.13616, as in D-FINE).

    Args:
        channels: C in.
        out: C out.
        num_blocks: RepVGG blocks in each of its two CSP parts.
        expansion: channels of the two deeper branches as a share of `out` / 2.
    """

    def __init__(self, channels: int, out: int, num_blocks: int = 3, expansion: float = 1.0) -> None:
        super().__init__()
        deep = round(expansion * out // 2)
        self.conv1 = ConvNorm(channels, 2 * out, activation="silu")
        self.csp_rep1 = CSPRep(out, deep, num_blocks)
        self.conv2 = ConvNorm(deep, deep, 3, activation="silu")
        self.csp_rep2 = CSPRep(deep, deep, num_blocks)
        self.conv3 = ConvNorm(deep, deep, 3, activation="silu")
        self.conv4 = ConvNorm(2 * out + 2 * deep, out, activation="silu")

    def forward(self, x: Tensor | Sequence[Tensor], real: Tensor | None = None) -> Tensor:
        """(B,C,H,W), or parts of it (`layers.conv.pointwise`) -> (B,out,H,W)."""
        both = self.conv1(x)
        first = self.conv2(self.csp_rep1(both.chunk(2, 1)[1], real), real)
        second = self.conv3(self.csp_rep2(first, real), real)
        return self.conv4((both, first, second))  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Half the size: a 1x1 convolution for channels, a 3x3 depthwise one of stride 2 for cells (SCDown, arXiv 2405.14458).

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, width)
        self.conv2 = ConvNorm(width, width, 3, 2, groups=width)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """(B,D,H,W) -> (B,D,ceil(H / 2),ceil(W / 2))."""
        return self.conv2(self.conv1(x), real)  # type: ignore[no-any-return]
