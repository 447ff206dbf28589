"""The decoder: queries talk to each other, then look at the memory, layer after layer (arXiv 2005.12872).

Legend: B images, Q queries, P slots, N memory tokens, D width. True in a mask means: do not look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from queryvision.head import Feedback
from queryvision.layers.attention import Attention, FeedForward
from queryvision.ops.dropout import dropout
from queryvision.structures import Memory, Queries, Stage


@dataclass(frozen=True)
class Look:
    """Where a layer's queries may look, and from where."""

    memory: Memory
    keys: Tensor  # (B,N,D) memory tokens with their positions
    anchors: Tensor | None = None  # (B,Q,2|4) 0..1, detached
    points: Tensor | None = None  # (B,Q,P,2)
    base: Tensor | None = None  # anchors with their gradient
    points_base: Tensor | None = None
    hidden: Tensor | None = None  # (B,Q,N)
    unseen: Tensor | None = None  # (B or 1,Q,Q) which queries cannot see which


Ask = Callable[[Stage, Tensor, Tensor, Look], Feedback]
"""(stage, normed states (B,Q,1+P,D), raw states, look) -> what the heads tell the next layer."""


class DenseCrossAttention(nn.Module):
    """Every query and slot looks at every token of the memory.

    Args:
        width: D.
        num_heads: attention heads.
        dropout: of the attention weights.
    """

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, num_heads, dropout)

    def forward(self, states: Tensor, positions: Tensor, look: Look) -> Tensor:
        """(B,Q,1+P,D) -> (B,Q,1+P,D)."""
        queries = (states + positions).flatten(1, 2)
        out: Tensor = self.attention(queries, look.keys, look.memory.tokens, self._hidden(look, states.shape[2]))
        return out.view_as(states)

    @staticmethod
    def _hidden(look: Look, slots: int) -> Tensor | None:
        """Padding and what a head hides, (B,1 or Q*(1+P),N); who has everything hidden may look at all that is no padding."""
        padding = None if look.memory.padding is None else look.memory.padding[:, None]
        if look.hidden is None:
            return padding
        hidden = look.hidden if padding is None else look.hidden | padding
        everything = hidden.all(-1, keepdim=True)
        hidden = hidden & ~everything if padding is None else (hidden & ~everything) | padding
        return hidden.repeat_interleave(slots, 1)


class DecoderLayer(nn.Module):
    """Attention within the query (where it has slots), across queries slot by slot, to the memory; then feed-forward.

    Post-norm: each part is followed by add and norm.

    Args:
        width: D.
        num_heads: attention heads.
        cross_attention: (states, positions, look) -> states.
        ffn_width: channels inside the feed-forward part.
        dropout: everywhere, in training.
        slots: whether queries have slots that must talk to each other.
    """

    def __init__(
        self, width: int, num_heads: int, cross_attention: nn.Module, ffn_width: int, dropout: float, slots: bool = False
    ) -> None:
        super().__init__()
        self.self_attn = Attention(width, num_heads, dropout)
        self.cross_attn = cross_attention
        self.ffn = FeedForward(width, ffn_width, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.slot_attn = Attention(width, num_heads, dropout) if slots else None
        self.slot_norm = nn.LayerNorm(width) if slots else None
        self.dropout = dropout

    def forward(self, states: Tensor, positions: Tensor, look: Look) -> Tensor:
        """(B,Q,1+P,D) -> (B,Q,1+P,D)."""
        if self.slot_attn is not None and self.slot_norm is not None:
            within, placed = states.flatten(0, 1), (states + positions).flatten(0, 1)
            within = self.slot_norm(within + self._drop(self.slot_attn(placed, placed, within)))
            states = within.view_as(states)
        states = self.norm1(states + self._drop(self._across(states, positions, look.unseen)))
        states = self.norm2(states + self._drop(self.cross_attn(states, positions, look)))
        return self.norm3(states + self._drop(self.ffn(states)))  # type: ignore[no-any-return]

    def _across(self, states: Tensor, positions: Tensor, unseen: Tensor | None) -> Tensor:
        """Self-attention over Q, slot by slot."""
        batch, queries, slots, width = states.shape
        values = states.transpose(1, 2).reshape(batch * slots, queries, width)
        placed = (states + positions).transpose(1, 2).reshape(batch * slots, queries, width)
        if unseen is not None and unseen.shape[0] > 1:
            unseen = unseen.repeat_interleave(slots, 0)
        out: Tensor = self.self_attn(placed, placed, values, unseen)
        return out.view(batch, slots, queries, width).transpose(1, 2)

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)


class Decoder(nn.Module):
    """Layers with one norm for the outputs of all of them.

    Args:
        layers: in order.
        norm: applied to what the heads see; the next layer takes the states before it.
        positions: anchors and points -> positions (B,Q,1+P,D), where queries do not bring their own.
        initial: whether heads are also asked before the first layer (Mask2Former).
    """

    def __init__(
        self, layers: Sequence[nn.Module], norm: nn.Module, positions: nn.Module | None = None, initial: bool = False
    ) -> None:
        super().__init__()
        self.initial = initial
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.positions = positions

    def forward(self, queries: Queries, memory: Memory, unseen: Tensor | None, ask: Ask) -> Tensor:
        """Runs all layers and asks the heads after each.

        Args:
            queries: states and where they start.
            memory: of the encoder.
            unseen: (B or 1,Q,Q) True = cannot see; None: all see all.
            ask: gets the states of each layer, gives feedback.

        Returns:
            The last layer's states (B,Q,1+P,D), normed.
        """
        look = Look(memory, memory.tokens + memory.positions, unseen=unseen)
        look = _around(look, queries.anchors, queries.points, queries.base, queries.points_base)
        states = normed = queries.states
        if self.initial:
            look = steer(look, ask(Stage("initial"), self.norm(states), states, look))
        for index, layer in enumerate(self.layers):
            positions = queries.positions if self.positions is None else self.positions(look, states.shape[2])
            assert positions is not None, "queries without positions need a decoder that makes them"
            states = layer(states, positions, look)
            normed = self.norm(states)
            feedback = ask(Stage("layer", index, last=index == len(self.layers) - 1), normed, states, look)
            look = steer(look, feedback)
        return normed


def steer(look: Look, feedback: Feedback) -> Look:
    """The next layer's look: new anchors and points are detached here, and kept with their gradient as `base`."""
    anchors = look.anchors if feedback.anchors is None else feedback.anchors
    points = look.points if feedback.points is None else feedback.points
    base = look.base if feedback.anchors is None else feedback.anchors
    points_base = look.points_base if feedback.points is None else feedback.points
    return _around(replace(look, hidden=feedback.hidden), anchors, points, base, points_base)


def _around(look: Look, anchors: Tensor | None, points: Tensor | None, base: Tensor | None, points_base: Tensor | None) -> Look:
    return replace(
        look,
        anchors=None if anchors is None else anchors.detach(),
        points=None if points is None else points.detach(),
        base=anchors if base is None else base,
        points_base=points if points_base is None else points_base,
    )
