"""The perceptron used by heads and positions."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from queryvision.layers.linear import Linear


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        width: input channels.
        hidden: channels of the hidden layers.
        out: output channels.
        num_layers: linear layers, at least 1.
    """

    def __init__(self, width: int, hidden: int, out: int, num_layers: int) -> None:
        super().__init__()
        sizes = [width, *[hidden] * (num_layers - 1), out]
        self.layers = nn.ModuleList(Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True))

    @property
    def last(self) -> nn.Linear:
        """Its last layer."""
        return cast(nn.Linear, self.layers[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(...,width) -> (...,out)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x), inplace=True)
        return self.layers[-1](x)  # type: ignore[no-any-return]
