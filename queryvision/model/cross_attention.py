"""How queries look at the memory: at all of it, or at a few places around their anchors.

Legend: B images, Q queries, P slots, L levels, N memory tokens, D width. True in a mask means: do not look.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from queryvision.layers.attention import Attention
from queryvision.layers.deformable import DeformableAttention
from queryvision.ops.sampling import gathers_rows
from queryvision.structures import Memory


@dataclass(frozen=True)
class Look:
    """Where a layer's queries may look, and from where."""

    memory: Memory
    anchors: Tensor | None = None  # (B,Q,2|4) 0..1; detached, unless learned queries brought them
    points: Tensor | None = None  # (B,Q,P,2)
    base: Tensor | None = None  # anchors with their gradient
    points_base: Tensor | None = None
    hidden: Tensor | None = None  # (B,Q,N)
    unseen: Tensor | None = None  # (B or 1,Q,Q) which queries cannot see which


class DenseCrossAttention(nn.Module):
    """Every query and slot looks at every token of the memory.

    Args:
        width: D.
        num_heads: attention heads.
        dropout: of the attention weights.
        level: the only level it looks at; None: all.
    """

    def __init__(self, width: int, num_heads: int, dropout: float, level: int | None = None) -> None:
        super().__init__()
        self.attention = Attention(width, num_heads, dropout)
        self.level = level

    def forward(self, states: Tensor, positions: Tensor, look: Look) -> Tensor:
        """(B,Q,1+P,D) -> (B,Q,1+P,D)."""
        queries = (states + positions).flatten(1, 2)
        part = slice(None) if self.level is None else look.memory.span(self.level)
        keys, values = look.memory.placed[:, part], look.memory.tokens[:, part]
        out: Tensor = self.attention(queries, keys, values, self._hidden(look, part, states.shape[2]))
        return out.view_as(states)

    @staticmethod
    def _hidden(look: Look, part: slice, slots: int) -> Tensor | None:
        """Padding and what a head hides, (B,1 or Q*(1+P),N); who has everything hidden may look at all that is no padding."""
        padding = None if look.memory.padding is None else look.memory.padding[:, None, part]
        if look.hidden is None:
            return padding
        hidden = look.hidden if padding is None else look.hidden | padding
        everything = hidden.all(-1, keepdim=True)
        hidden = hidden & ~everything if padding is None else (hidden & ~everything) | padding
        return hidden.repeat_interleave(slots, 1)


class DeformableCrossAttention(nn.Module):
    """Every query samples around its anchor, every slot around its point, on all levels (arXiv 2010.04159).

    Args:
        attention: of the width of the states.
    """

    def __init__(self, attention: DeformableAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, states: Tensor, positions: Tensor, look: Look) -> Tensor:
        """(B,Q,1+P,D) -> (B,Q,1+P,D)."""
        assert look.anchors is not None, "deformable attention needs queries with anchors"
        queries = states + positions
        found = [self._around(queries[:, :, 0], look.anchors, look)]
        if states.shape[2] > 1:
            assert look.points is not None, "slots need points to look around"
            found.append(self._around(queries[:, :, 1:].flatten(1, 2), look.points.flatten(1, 2), look))
        parts = [f.view(*states.shape[:2], -1, states.shape[-1]) for f in found]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _around(self, queries: Tensor, places: Tensor, look: Look) -> Tensor:
        """Queries (B,Q,D) around places (B,Q,2|4) of the unpadded image -> (B,Q,D)."""
        memory = look.memory
        ratios = memory.valid_ratios.repeat(1, 1, places.shape[-1] // 2)
        reference = places[:, :, None] * ratios[:, None]
        shared = self.attention.value_proj is None and gathers_rows(memory.tokens)  # by all layers and slots
        canvas = memory.canvas if shared else None
        out: Tensor = self.attention(queries, reference, memory.tokens, memory.shapes, memory.padding, canvas)
        return out
