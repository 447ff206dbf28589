"""Queries from the most promising places of the memory (two-stage, arXiv 2010.04159; mixed selection, arXiv 2203.03605).

Legend: B images, Q queries, P slots, N memory tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from queryvision.errors import ConfigError
from queryvision.layers.linear import Linear
from queryvision.layers.positions import sine_embedding
from queryvision.model.cross_attention import Look
from queryvision.model.deformable_encoder import cell_centres
from queryvision.model.groups import make_rounds
from queryvision.model.panel import Panel
from queryvision.structures import Memory, Queries, QueryGroup, Stage

PROPOSAL = Stage("proposal")


class LearnedStart(nn.Module):
    """Mixed selection: states are learned, only the anchors come from the proposals (DINO). The decoder makes the positions.

    Args:
        num_queries: most queries.
        width: D.
        num_slots: P.
    """

    def __init__(self, num_queries: int, width: int, num_slots: int = 0) -> None:
        super().__init__()
        self.states = nn.Parameter(torch.empty(num_queries, 1 + num_slots, width))
        for slot in self.states.unbind(1):  # as published, where it comes after a normal draw
            nn.init.xavier_uniform_(slot)

    @property
    def most(self) -> int:
        """The most queries it has a start for."""
        return len(self.states)

    def forward(self, anchors: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Anchors (B,Q,4) -> states (B,Q,1+P,D), no positions; what was proposed (B,Q,D) does not matter."""
        return self.states[: anchors.shape[1]].expand(len(anchors), -1, -1, -1), None


class AnchorStart(nn.Module):
    """States and positions are made of the anchors (Deformable DETR, two-stage).

    Args:
        width: D.
    """

    most: int | None = None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = Linear(2 * width, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        nn.init.xavier_uniform_(self.project.weight)

    def forward(self, anchors: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Anchors (B,Q,4) -> states and positions (B,Q,1,D); what was proposed (B,Q,D) does not matter."""
        sines = sine_embedding(anchors * 2 * math.pi, self.project.in_features // 4).to(self.project.weight.dtype)
        positions, states = self.norm(self.project(sines))[:, :, None].chunk(2, -1)
        return states, positions


class TokenStart(nn.Module):
    """States are the chosen tokens themselves, detached (RT-DETR, arXiv 2304.08069). The decoder makes the positions.

    Args:
        width: D.
        num_slots: P; slots start from learned states.
    """

    most: int | None = None

    def __init__(self, width: int, num_slots: int = 0) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(num_slots, width)) if num_slots else None

    def forward(self, anchors: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Chosen tokens (B,Q,D), projected and normed -> states (B,Q,1+P,D), no positions."""
        states = tokens.detach()[:, :, None]
        if self.slots is not None:
            states = torch.cat((states, self.slots.to(states.dtype).expand(*tokens.shape[:2], -1, -1)), 2)
        return states, None


Start = LearnedStart | AnchorStart | TokenStart


class SelectedQueries(nn.Module):
    """Every memory token proposes, a head ranks, the best become queries; their anchors are detached.

    Args:
        num_queries: Q; fewer where the memory has fewer tokens.
        width: D.
        start: anchors and chosen tokens -> states and positions.
        teach_all: all tokens are taught as proposals (Deformable DETR), instead of the chosen ones (DINO).
        normed: heads see the chosen ones through the decoder's norm, as they see its layers (Mask DINO).
        large_first: see `grid_anchors`.
    """

    def __init__(
        self,
        num_queries: int,
        width: int,
        start: Start,
        teach_all: bool = False,
        normed: bool = False,
        large_first: bool = False,
    ) -> None:
        super().__init__()
        self.normed = normed
        self.large_first = large_first
        self.num_queries = num_queries
        self.project = Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.start = start
        self.teach_all = teach_all
        nn.init.xavier_uniform_(self.project.weight)

    def set_num_queries(self, count: int) -> None:
        """Another number of queries from now on.

        Raises:
            ConfigError: there are no states for so many, or none is wanted.
        """
        if count < 1 or count > (self.start.most or count):
            limit = f" and at most {self.start.most}" if self.start.most else ""
            raise ConfigError(f"queries = {count}: must be at least 1{limit}")
        self.num_queries = count

    def forward(self, memory: Memory, panel: Panel, contexts: Mapping[str, Any], norm: nn.Module | None = None) -> Queries:
        """The best proposals of each image."""
        grid, valid = grid_anchors(memory, large_first=self.large_first)
        tokens = memory.tokens.masked_fill(~valid[..., None], 0.0)
        everywhere = self.teach_all and self.training
        if everywhere:
            look, states = _look(memory, grid), self.norm(self.project(tokens))
        else:
            best = self._best(self._ranks(tokens, panel, memory, grid, contexts), valid)
            look, states = _look(memory, _rows(grid, best)), self.norm(self.project(_rows(tokens, best)))
        seen = norm(states) if self.normed and norm is not None else states
        answers, feedback = panel.answer(PROPOSAL, seen[:, :, None], states[:, :, None], look, {}, contexts)
        rounds = make_rounds([(PROPOSAL, answers)], (QueryGroup("main", states.shape[1]),), contexts)
        anchors = look.anchors if feedback.anchors is None else feedback.anchors
        assert anchors is not None
        points = feedback.points
        if points is None and panel.num_slots:  # nobody said where the slots look
            points = anchors[..., None, :2].expand(-1, -1, panel.num_slots, -1)
        if everywhere:
            best = self._best(panel.rank(answers), valid)
            anchors, points = _rows(anchors, best), None if points is None else _rows(points, best)
            states = _rows(states, best)
        anchors = anchors.detach()
        begun, positions = self.start(anchors, states)
        return Queries(
            begun.to(memory.tokens.dtype),
            (QueryGroup("main", best.shape[1], sees=("main",)),),
            positions,
            anchors,
            None if points is None else points.detach(),
            rounds=tuple(replace(r, proposal_index=None if everywhere else best) for r in rounds),
        )

    @torch.no_grad()
    def _ranks(self, tokens: Tensor, panel: Panel, memory: Memory, grid: Tensor, contexts: Mapping[str, Any]) -> Tensor:
        """How promising each token is, (B,N); only the heads that are needed for it are asked, and nothing is kept for them."""
        states = self.norm(self.project(tokens))
        answers = panel.answer(PROPOSAL, *_as_queries(states), _look(memory, grid), {}, contexts, only_rank=True)[0]
        ranks = panel.rank(answers)
        torch.clear_autocast_cache()  # torch before 2.10 would use these casts again, which carry no gradient
        return ranks

    def _best(self, ranks: Tensor, valid: Tensor) -> Tensor:
        """Tokens (B,Q), best first; never padding while there is anything else."""
        ranks = ranks.detach().float().masked_fill(~valid, -torch.inf)
        values, best = ranks.topk(min(self.num_queries, ranks.shape[1]), 1)
        return torch.where(values == -torch.inf, best[:, :1], best)  # fewer tokens than queries: the best one again


def _as_queries(states: Tensor) -> tuple[Tensor, Tensor]:
    return states[:, :, None], states[:, :, None]


def _look(memory: Memory, anchors: Tensor) -> Look:
    return Look(memory, anchors=anchors, base=anchors)


def grid_anchors(memory: Memory, size: float = 0.05, large_first: bool = False) -> tuple[Tensor, Tensor]:
    """A box at every token, growing with the level (Deformable-DETR:models/deformable_transformer.py).

    Args:
        memory: of all levels, finest first.
        size: of the smallest boxes.
        large_first: boxes shrink with the level, as in the published Mask DINO, whose levels are in reverse order there.

    Returns:
        Anchors (B,N,4) cx cy w h of the unpadded image, and which tokens are no padding and not at the very edge (B,N) bool;
        the others get (1,1,1,1), as published, which no object is like.
    """
    centres = cell_centres(memory)
    steps = reversed(range(len(memory.shapes))) if large_first else range(len(memory.shapes))
    rows = [centres.new_full((h * w, 2), size * 2**step) for step, (h, w) in zip(steps, memory.shapes, strict=True)]
    boxes = torch.cat((centres, torch.cat(rows).expand(len(centres), -1, -1)), -1)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1)  # false in padding, too, where centres lie beyond 1
    return boxes.masked_fill(~valid[..., None], 1.0), valid


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows (B,k) of (B,N,...) -> (B,k,...); unlike `gather`, it does not keep the values for the backward pass."""
    return values[torch.arange(index.shape[0], device=index.device)[:, None], index]
