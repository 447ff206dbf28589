"""Contrastive denoising (arXiv 2203.03605): targets, disturbed, enter as queries whose answer is known.

The plan (which target, positive or not, which group) is made here; what the disturbance is, the heads say.

Legend: B images, Q denoising queries, T targets, P slots, D width, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from queryvision.head import DenoisingPlan, Noise
from queryvision.model.panel import Panel
from queryvision.structures import NONE, VOID, Queries, QueryGroup, Targets


class Denoising(nn.Module):
    """Adds a group of denoising queries in training.

    Args:
        num_queries: positive queries wanted over all groups; the number of groups follows from the fullest image.
        width: D.
        num_slots: P.
        negatives: also add a query to each positive one that must learn to say no.
    """

    def __init__(self, num_queries: int, width: int, num_slots: int = 0, negatives: bool = True) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.negatives = negatives
        self.width = width
        self.slots = nn.Parameter(torch.randn(num_slots, width)) if num_slots else None

    def num_groups(self, counts: Sequence[int]) -> int:
        """G for a batch: known from the number of targets alone."""
        fullest = max(counts, default=0)
        return max(1, self.num_queries // fullest) if fullest else 1

    def size(self, counts: Sequence[int]) -> int:
        """Q for a batch."""
        return self.num_groups(counts) * max(1, max(counts, default=0)) * (1 + self.negatives)

    def plan(self, counts: Sequence[int]) -> DenoisingPlan:
        """Which query starts from which target; a batch without objects still gets a VOID query, so no rank waits."""
        fullest, groups = max(1, max(counts, default=0)), self.num_groups(counts)
        signs = (True, False) if self.negatives else (True,)
        target = torch.arange(fullest)[None] * torch.ones(len(counts), 1, dtype=torch.long)
        target = torch.where(target < torch.tensor(list(counts))[:, None], target, VOID).repeat(1, groups * len(signs))
        positive = torch.tensor(signs).repeat_interleave(fullest).repeat(groups).expand_as(target)
        group = torch.arange(groups).repeat_interleave(fullest * len(signs))
        return DenoisingPlan(target, positive, group, groups)

    def forward(
        self, queries: Queries, targets: Targets, panel: Panel, generators: Sequence[torch.Generator] | None
    ) -> Queries:
        """Appends the denoising group; it sees itself and the main group, which does not see it."""
        plan = self.plan(targets.counts)
        batch, size = plan.target.shape
        noise = _gather(panel, targets, plan.to(targets.valid.device), generators)
        nothing = queries.states.new_zeros(batch, size, 1, self.width)
        states = nothing if noise.content is None else noise.content[:, :, None]
        if self.slots is not None:
            states = torch.cat((states, self.slots.expand(batch, size, -1, -1)), 2)
        pins = torch.where(plan.positive | (plan.target == VOID), plan.target, NONE)
        group = QueryGroup("denoising", size, pins, ("main",), plan.num_groups, plan.num_groups)
        return replace(
            queries,
            states=torch.cat((queries.states, states.to(queries.states.dtype)), 1),
            groups=(*queries.groups, group),
            positions=_append(queries.positions, None, (batch, size), 0.0),
            anchors=_append(queries.anchors, noise.anchors, (batch, size), 0.5),
            points=_append(queries.points, noise.points, (batch, size), 0.5),
            base=_append(queries.base, noise.anchors, (batch, size), 0.5),
            points_base=_append(queries.points_base, noise.points, (batch, size), 0.5),
        )


def _gather(panel: Panel, targets: Targets, plan: DenoisingPlan, generators: Sequence[torch.Generator] | None) -> Noise:
    """Contents of all heads add up; anchors come from the first head that gives them; points stand side by side."""
    told = {name: head.noise(targets, plan, generators) for name, head in panel.heads().items()}
    said = {name: noise for name, noise in told.items() if noise is not None}
    contents = [noise.content for noise in said.values() if noise.content is not None]
    return Noise(
        torch.stack(contents).sum(0) if contents else None,
        next((noise.anchors for noise in said.values() if noise.anchors is not None), None),
        panel.side_by_side({name: noise.points for name, noise in said.items() if noise.points is not None}),
    )


def _append(mine: Tensor | None, noise: Tensor | None, shape: tuple[int, int], fill: float) -> Tensor | None:
    """Adds rows for the denoising queries; `fill` stands in where no head gives any."""
    if mine is None:
        return None
    if noise is None:
        noise = mine.new_full((*shape, *mine.shape[2:]), fill)
    return torch.cat((mine, noise.to(mine.dtype)), 1)
