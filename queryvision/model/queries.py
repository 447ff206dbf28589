"""Where queries come from: learned ones (DETR), or the most promising places of the memory (two-stage).

Legend: B images, Q queries, P slots, N memory tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from queryvision.model.decoder import Look
from queryvision.model.groups import make_rounds
from queryvision.model.panel import Panel
from queryvision.structures import FREE, Memory, Queries, QueryGroup, Stage


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
    """

    def __init__(self, num_queries: int, width: int, num_slots: int = 0) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.positions = nn.Embedding(num_queries, width)
        self.slot_states = nn.Parameter(torch.randn(num_slots, width)) if num_slots else None
        self.slot_positions = nn.Parameter(torch.randn(num_slots, width)) if num_slots else None

    def forward(self, memory: Memory, panel: Panel, contexts: Mapping[str, Any]) -> Queries:
        """The same questions for every image."""
        batch = memory.tokens.shape[0]
        positions = self.positions.weight[:, None]
        states = torch.zeros_like(positions)
        if self.slot_states is not None and self.slot_positions is not None:
            states = torch.cat((states, self.slot_states.expand(self.num_queries, -1, -1)), 1)
            positions = torch.cat((positions, positions + self.slot_positions), 1)
        group = QueryGroup("main", self.num_queries, sees=("main",))
        return Queries(
            states.expand(batch, *states.shape).to(memory.tokens.dtype), (group,), positions.expand(batch, *positions.shape)
        )


class SelectedQueries(nn.Module):
    """Two-stage queries (arXiv 2010.04159): every memory token proposes, a head ranks, the best become queries.

    Their anchors are what the first-anchor head proposed, detached; their states are learned (mixed selection,
    arXiv 2203.03605).

    Args:
        num_queries: Q, at most the number of memory tokens is used.
        width: D.
        num_slots: P.
    """

    def __init__(self, num_queries: int, width: int, num_slots: int = 0) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.project = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.states = nn.Parameter(torch.randn(num_queries, 1 + num_slots, width))

    def forward(self, memory: Memory, panel: Panel, contexts: Mapping[str, Any]) -> Queries:
        """The best proposals of each image."""
        anchors, valid = grid_anchors(memory)
        tokens = self.norm(self.project(memory.tokens.masked_fill(~valid[..., None], 0.0)))[:, :, None]
        look = Look(memory, memory.tokens, anchors=anchors, base=anchors)
        answers, feedback = panel.answer(Stage("proposal", last=False), tokens, tokens, look, {}, contexts)
        steering = panel.steering
        assert steering.rank is not None, "selected queries need a head that ranks"
        rank = panel.heads()[steering.rank].rank(answers[steering.rank]).detach().masked_fill(~valid, -torch.inf)
        count = min(self.num_queries, rank.shape[1])
        values, best = rank.topk(count, 1)
        best = torch.where(values == -torch.inf, best[:, :1], best)  # fewer tokens than queries: the best one again
        chosen = {head: {name: _rows(value, best) for name, value in said.items()} for head, said in answers.items()}
        group = QueryGroup("main", count, sees=("main",))
        rounds = make_rounds([(Stage("proposal"), chosen)], (group,), contexts)
        first = anchors if feedback.anchors is None else feedback.anchors
        return Queries(
            self.states[:count].expand(len(best), -1, -1, -1).to(memory.tokens.dtype),
            (group,),
            anchors=_rows(first, best).detach(),
            points=None if feedback.points is None else _rows(feedback.points, best).detach(),
            rounds=tuple(replace(r, proposal_index=best) for r in rounds),
        )


def grid_anchors(memory: Memory, size: float = 0.05) -> tuple[Tensor, Tensor]:
    """A box at every token, growing with the level (Deformable-DETR:models/deformable_transformer.py).

    Returns:
        Anchors (B,N,4) cx cy w h of the unpadded image, and which tokens are no padding and not at the very edge (B,N) bool.
    """
    anchors = []
    for level, (height, width) in enumerate(memory.shapes):
        device = memory.tokens.device
        y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
        centre = torch.stack((x, y), -1).flatten(0, 1).float() + 0.5
        extent = memory.valid_ratios[:, level] * torch.tensor((width, height), device=device)
        centres = centre[None] / extent[:, None]
        anchors.append(torch.cat((centres, torch.full_like(centres, size * 2**level)), -1))
    boxes = torch.cat(anchors, 1)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1)
    return boxes, valid if memory.padding is None else valid & ~memory.padding


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


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows (B,k) of (B,N,...) -> (B,k,...)."""
    view = index.view(*index.shape, *[1] * (values.ndim - 2))
    return values.gather(1, view.expand(*index.shape, *values.shape[2:]))
