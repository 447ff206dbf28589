"""Queries that are learned (DETR), learned with a place (Deformable DETR), or carried along; selected ones: `proposals`.

Legend: B images, Q queries, P slots, N memory tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from queryvision.layers.linear import Linear
from queryvision.model.panel import Panel
from queryvision.structures import FREE, Memory, Queries, QueryGroup


@dataclass
class Carried:
    """Queries brought along from elsewhere, such as the tracks of the frame before; they join the main group."""

    states: Tensor  # (B,M,1+P,D)
    pins: Tensor  # (B,M) int64 on the host: a target's index, FREE, NONE or VOID
    positions: Tensor | None = None  # (B,M,1+P,D)
    anchors: Tensor | None = None  # (B,M,2|4)
    points: Tensor | None = None  # (B,M,P,2)


class LearnedQueries(nn.Module):
    """DETR's object queries: states start at zero, learned positions tell the queries apart.

    Args:
        num_queries: Q.
        width: D.
        num_slots: P; slots start from learned states and positions of their own.
        learned: states are learned, too (Mask2Former).
    """

    def __init__(self, num_queries: int, width: int, num_slots: int = 0, learned: bool = False) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.states = nn.Embedding(num_queries, width) if learned else None
        self.positions = nn.Embedding(num_queries, width)
        self.slot_states = nn.Parameter(torch.randn(num_slots, width)) if num_slots else None
        self.slot_positions = nn.Parameter(torch.randn(num_slots, width)) if num_slots else None

    def forward(self, memory: Memory, panel: Panel, contexts: Mapping[str, Any], norm: nn.Module | None = None) -> Queries:
        """The same questions for every image."""
        batch = memory.tokens.shape[0]
        positions = self.positions.weight[:, None]
        states = torch.zeros_like(positions) if self.states is None else self.states.weight[:, None]
        if self.slot_states is not None and self.slot_positions is not None:
            states = torch.cat((states, self.slot_states.expand(self.num_queries, -1, -1)), 1)
            positions = torch.cat((positions, positions + self.slot_positions), 1)
        group = QueryGroup("main", self.num_queries, sees=("main",))
        return Queries(
            states.expand(batch, *states.shape).to(memory.tokens.dtype), (group,), positions.expand(batch, *positions.shape)
        )


class AnchoredQueries(nn.Module):
    """Learned queries with a learned place to look from (Deformable DETR without proposals, arXiv 2010.04159).

    Args:
        num_queries: Q.
        width: D.
        num_slots: P; slots start from learned states and positions of their own, at the query's place.
    """

    def __init__(self, num_queries: int, width: int, num_slots: int = 0) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.positions = nn.Parameter(torch.randn(num_queries, 1 + num_slots, width))
        self.states = nn.Parameter(torch.randn(num_queries, 1 + num_slots, width))
        self.reference_points = Linear(width, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory: Memory, panel: Panel, contexts: Mapping[str, Any], norm: nn.Module | None = None) -> Queries:
        """The same questions for every image."""
        batch, slots = len(memory.tokens), self.states.shape[1] - 1
        anchors = self.reference_points(self.positions[:, 0]).float().sigmoid().expand(batch, -1, -1)
        return Queries(
            self.states.expand(batch, -1, -1, -1).to(memory.tokens.dtype),
            (QueryGroup("main", self.num_queries, sees=("main",)),),
            self.positions.expand(batch, -1, -1, -1),
            anchors,
            anchors[:, :, None].expand(-1, -1, slots, -1) if slots else None,
        )


def carry(queries: Queries, carried: Carried) -> Queries:
    """Adds carried queries to the end of the main group, which they see and which sees them."""
    main, *others = queries.groups
    free = torch.full((carried.pins.shape[0], main.size), FREE) if main.pins is None else main.pins
    start, grown = main.size, replace(main, size=main.size + carried.pins.shape[1], pins=torch.cat((free, carried.pins), 1))

    def insert(mine: Tensor | None, theirs: Tensor | None, what: str) -> Tensor | None:
        if mine is None:
            return None
        if theirs is None:
            raise ValueError(f"these queries have {what}; carried queries must bring theirs")
        return torch.cat((mine[:, :start], theirs.to(mine.dtype), mine[:, start:]), 1)

    states = insert(queries.states, carried.states, "states")
    assert states is not None
    return replace(
        queries,
        states=states,
        groups=(grown, *others),
        positions=insert(queries.positions, carried.positions, "positions"),
        anchors=insert(queries.anchors, carried.anchors, "anchors"),
        points=insert(queries.points, carried.points, "points"),
        base=insert(queries.base, carried.anchors, "anchors"),
        points_base=insert(queries.points_base, carried.points, "points"),
    )
