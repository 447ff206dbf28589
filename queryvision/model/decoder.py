"""The decoder: queries talk to each other, then look at the memory, layer after layer (arXiv 2005.12872).

Legend: B images, Q queries, P slots, N memory tokens, D width. True in a mask means: do not look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from queryvision.head import Feedback
from queryvision.layers.attention import Attention, FeedForward
from queryvision.layers.linear import Linear
from queryvision.layers.positions import AnchorPositions, BoxPositions
from queryvision.model.cross_attention import Look
from queryvision.ops.dropout import dropout
from queryvision.structures import Memory, Queries, Stage


class Ask(Protocol):
    """How the heads are asked."""

    def __call__(self, stage: Stage, normed: Tensor, raw: Tensor, look: Look, once: Tensor | None = None) -> Feedback:
        """States (B,Q,1+P,D) normed, raw, and normed once if `normed` are so twice -> what the heads tell the next layer."""


class Gate(nn.Module):
    """Weighs two states against each other, channel by channel (D-FINE's gateway, arXiv 2410.13842); at first by half each.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = Linear(2 * width, 2 * width)
        self.norm = nn.LayerNorm(width)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """(...,D) and (...,D) -> (...,D)."""
        one, other = self.gate(torch.cat((first, second), -1)).sigmoid().chunk(2, -1)
        return self.norm(one * first + other * second)  # type: ignore[no-any-return]


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
        gated: a gate takes the place of add and norm behind the attention to the memory (D-FINE).
        looks_first: the memory comes before the other queries (Mask2Former).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        cross_attention: nn.Module,
        ffn_width: int,
        dropout: float,
        slots: bool = False,
        gated: bool = False,
        looks_first: bool = False,
    ) -> None:
        super().__init__()
        self.looks_first = looks_first
        self.self_attn = Attention(width, num_heads, dropout)
        self.cross_attn = cross_attention
        self.ffn = FeedForward(width, ffn_width, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = Gate(width) if gated else nn.LayerNorm(width)
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
        if self.looks_first:
            states = self._look(states, positions, look)
        states = self.norm1(states + self._drop(self._across(states, positions, look.unseen)))
        if not self.looks_first:
            states = self._look(states, positions, look)
        return self.norm3(states + self._drop(self.ffn(states)))  # type: ignore[no-any-return]

    def _look(self, states: Tensor, positions: Tensor, look: Look) -> Tensor:
        """At the memory."""
        found = self._drop(self.cross_attn(states, positions, look))
        out: Tensor = self.norm2(states, found) if isinstance(self.norm2, Gate) else self.norm2(states + found)
        return out

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
        positions: makes positions of anchors and points before every layer, where queries do not bring their own.
        initial: whether heads are asked once more: before the first layer (Mask2Former), or after it, for a first guess that
            the first layer's own answer already starts from (D-FINE).
        twice: at layers the heads see states that went through the norm twice, boxes such that did once: published Mask DINO
            norms in the decoder and again before classes and masks (maskdino:maskdino_decoder.py, forward_prediction_heads).
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        positions: AnchorPositions | BoxPositions | None = None,
        initial: Literal["before", "after"] | None = None,
        twice: bool = False,
    ) -> None:
        super().__init__()
        self.initial, self.twice = initial, twice
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
        look = start(queries, memory, unseen)
        states = normed = queries.states
        if self.initial == "before":
            look = steer(look, ask(Stage("initial", looks_at=self._level(0)), self.norm(states), states, look))
        for index, layer in enumerate(self.layers):
            states = layer(states, self._positions(queries, look), look)
            normed = self.norm(states)
            if self.initial == "after" and index == 0:
                look = steer(look, ask(Stage("initial"), normed, states, look))
            stage = Stage("layer", index, index == len(self.layers) - 1, self._level(index + 1))
            seen, once = (self.norm(normed), normed) if self.twice else (normed, None)
            look = steer(look, ask(stage, seen, states, look, once))
        return normed

    def _level(self, index: int) -> int | None:
        """The level of the memory that a layer looks at; None: all, or there is no such layer."""
        return getattr(cast(DecoderLayer, self.layers[index]).cross_attn, "level", None) if index < len(self.layers) else None

    def _positions(self, queries: Queries, look: Look) -> Tensor:
        """(B,Q,1+P,D)."""
        if self.positions is not None:
            assert look.anchors is not None, "positions are made of anchors, and these queries have none"
            return self.positions(look.anchors, look.points, look.memory.valid_ratios[:, 0])  # type: ignore[no-any-return]
        assert queries.positions is not None, "queries without positions need a decoder that makes them"
        return queries.positions


def start(queries: Queries, memory: Memory, unseen: Tensor | None) -> Look:
    """The first layer's look: anchors and points as the queries bring them, learned ones with their gradient."""
    return Look(
        memory,
        anchors=queries.anchors,
        points=queries.points,
        base=queries.anchors if queries.base is None else queries.base,
        points_base=queries.points if queries.points_base is None else queries.points_base,
        unseen=unseen,
    )


def steer(look: Look, feedback: Feedback) -> Look:
    """The next layer's look: new anchors and points are detached here, and kept with their gradient as `base`."""
    look = replace(look, hidden=feedback.hidden)
    if feedback.anchors is not None:
        look = replace(look, anchors=feedback.anchors.detach(), base=feedback.anchors)
    if feedback.points is not None:
        look = replace(look, points=feedback.points.detach(), points_base=feedback.points)
    return look
