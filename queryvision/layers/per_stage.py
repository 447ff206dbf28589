"""Weights that stages share, or have for themselves."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from queryvision.head import Fit
from queryvision.structures import Stage


class PerStage(nn.Module):
    """One module for all decoder layers or one for each, and perhaps one more for proposals.

    Args:
        make: is called for each module, with False for a decoder layer's and True for that of proposals.
        fit: how many there are.
    """

    def __init__(self, make: Callable[[bool], nn.Module], fit: Fit) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make(False) for _ in range(fit.num_layers if fit.per_layer else 1))
        self.proposals = None if fit.proposals == "none" else make(True)

    def at(self, stage: Stage) -> nn.Module:
        """The module that answers at a stage; before the first layer it is the first layer's."""
        if stage.kind == "proposal" and self.proposals is not None:
            return self.proposals
        return self.layers[stage.index if stage.kind == "layer" and len(self.layers) > 1 else 0]
