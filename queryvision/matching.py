"""One assignment for all rounds, stages and images: costs cross to the host once, pairs come back once.

The published code (detr:models/matcher.py) builds one matrix over all images of the batch for every layer and waits for the
device each time. Here targets are padded, so each image meets only its own, and all layers travel together.

Legend: S stages, B images, Q queries, T targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from queryvision.head import Head
from queryvision.ops.transfer import uploaded
from queryvision.structures import FREE, Match, Round, Targets

Pairs = NDArray[np.int64]  # (pairs,4) int64: stage, image, query, target


def match(
    rounds: Sequence[Round],
    heads: Mapping[str, Head],
    targets: Targets,
    generators: Sequence[torch.Generator] | None = None,
) -> tuple[list[Match], list[Match]]:
    """Gives every target to a query, in each stage of each round.

    Args:
        rounds: what was predicted.
        heads: {name: head}; the costs of those that answered are added.
        targets: on the same device.
        generators: one an image, for costs that sample.

    Returns:
        The pairs of each round by stage, and the union of the pairs over all stages of the same queries.
    """
    costs = [None if all_pinned(r) else total_cost(r, heads, targets, generators) for r in rounds]
    pairs = assign(costs, rounds, targets.counts)
    if any(head.matched_by == "union" for head in heads.values()):
        matches = _upload([*pairs, *unite(pairs, rounds)], [*rounds, *rounds])
    else:
        matches = _upload(pairs, rounds)
    return matches[: len(rounds)], matches[-len(rounds) :]


def all_pinned(round: Round) -> bool:
    """Whether no query of the round is free, so that nothing has to be assigned."""
    return round.pins is not None and not bool((round.pins == FREE).any())


def total_cost(
    round: Round, heads: Mapping[str, Head], targets: Targets, generators: Sequence[torch.Generator] | None = None
) -> Tensor:
    """Sum of the costs of all heads that take part, (S,B,Q,T) float32 without a gradient."""
    with torch.no_grad():
        costs = [heads[name].cost(round, targets, generators) for name in round.answers]
    given = [cost.float() for cost in costs if cost is not None]
    shape = (*round.shape, targets.valid.shape[1])
    return sum(given[1:], given[0]) if given else torch.zeros(shape, device=round.device)


def assign(costs: Sequence[Tensor | None], rounds: Sequence[Round], counts: Sequence[int]) -> list[Pairs]:
    """Optimal assignment (SciPy) of every stage and image, with one transfer from the device.

    Args:
        costs: (S,B,Q,T) of each round; None where all queries are pinned.
        rounds: their shapes, pins and repeats.
        counts: number of targets of each image.

    Returns:
        For each round the pairs (pairs,4) of stage, image, query, target, ordered by stage and image.
    """
    waiting = [c.reshape(-1) for c in costs if c is not None]
    flat = torch.cat(waiting).cpu().numpy() if waiting else np.empty(0, np.float32)
    finite = bool(np.isfinite(flat).all())
    result, start = [], 0
    for cost, round in zip(costs, rounds, strict=True):
        block = None
        if cost is not None:
            block = flat[start : start + cost.numel()].reshape(cost.shape)
            start += cost.numel()
        result.append(_assign_round(block, round, counts, finite))
    return result


def _assign_round(block: NDArray[Any] | None, round: Round, counts: Sequence[int], finite: bool) -> Pairs:
    num_stages, _, _ = round.shape
    pins = None if round.pins is None else round.pins.numpy()
    found: list[NDArray[Any]] = []
    problems = [_Problem(count, None if pins is None else pins[i], round.repeats) for i, count in enumerate(counts)]
    for stage in range(num_stages):
        for image, problem in enumerate(problems):
            query, target = problem.solve(None if block is None else block[stage, image], finite)
            if len(query):
                pairs = np.empty((len(query), 4), np.int64)
                pairs[:, 0], pairs[:, 1], pairs[:, 2], pairs[:, 3] = stage, image, query, target
                found.append(pairs)
    return np.concatenate(found) if found else np.empty((0, 4), np.int64)


class _Problem:
    """The assignment of one image: which queries are free and which targets are left, the same at every stage."""

    def __init__(self, count: int, pins: NDArray[Any] | None, repeats: int) -> None:
        self.count = count
        self.simple = pins is None and repeats == 1
        if self.simple:
            return
        self.targets = np.tile(np.arange(count), repeats)
        if pins is None:
            self.free: NDArray[Any] | slice = slice(None)
            self.pinned = np.empty(0, np.int64)
            self.given = self.pinned
        else:
            self.free = np.flatnonzero(pins == FREE)
            self.pinned = np.flatnonzero(pins >= 0)
            self.given = pins[self.pinned]
            self.targets = self.targets[~np.isin(self.targets, self.given)]

    def solve(self, cost: NDArray[Any] | None, finite: bool) -> tuple[NDArray[Any], NDArray[Any]]:
        """Query and target of every pair, from the cost (Q,T)."""
        if self.simple:
            assert cost is not None
            return _solve(cost[:, : self.count], finite)
        if cost is None or not len(self.targets):
            return self.pinned, self.given
        rows, columns = _solve(cost[self.free][:, self.targets], finite)
        queries = rows if isinstance(self.free, slice) else self.free[rows]
        return np.concatenate((self.pinned, queries)), np.concatenate((self.given, self.targets[columns]))


def _solve(cost: NDArray[Any], finite: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    """SciPy's assignment; a cost that is not finite is dearer than any set of finite ones."""
    if not finite:
        cost = cost.astype(np.float64)
        good = np.isfinite(cost)
        top, low = (cost[good].max(), cost[good].min()) if good.any() else (0.0, 0.0)
        cost[~good] = top + (top - low + 1) * (min(cost.shape) + 1)
    return linear_sum_assignment(cost)  # type: ignore[no-any-return]


def unite(pairs: Sequence[Pairs], rounds: Sequence[Round]) -> list[Pairs]:
    """The union of the pairs that any stage of the same queries found (D-FINE, arXiv 2410.13842), for each of its stages.

    A query that was given different targets keeps the one it was given most often (the lowest index where equal). Selected
    proposals are the first of the main queries; proposals of all tokens are queries of their own.
    """
    names = [(r.queries, r.proposals and r.proposal_index is None) for r in rounds]
    united: dict[tuple[str, bool], Pairs] = {}
    for name in set(names):
        mine = np.concatenate([p[:, 1:] for p, other in zip(pairs, names, strict=True) if other == name])
        distinct, votes = np.unique(mine, axis=0, return_counts=True)
        order = np.lexsort((distinct[:, 2], -votes, distinct[:, 1], distinct[:, 0]))
        distinct = distinct[order]
        first = np.ones(len(distinct), bool)
        first[1:] = (distinct[1:, :2] != distinct[:-1, :2]).any(1)
        united[name] = distinct[first]
    result = []
    for round, name in zip(rounds, names, strict=True):
        num_stages, _, num_queries = round.shape
        chosen = united[name][united[name][:, 1] < num_queries]  # carried queries joined after the proposals
        stages = np.repeat(np.arange(num_stages), len(chosen))[:, None]
        result.append(np.concatenate((stages, np.tile(chosen, (num_stages, 1))), 1))
    return result


def _upload(pairs: Sequence[Pairs], rounds: Sequence[Round]) -> list[Match]:
    """All pairs to the device in one copy."""
    index = torch.from_numpy(np.ascontiguousarray(np.concatenate(list(pairs)).T))
    parts = torch.split(uploaded(index, rounds[0].device), [len(p) for p in pairs], 1)
    counts = [np.bincount(p[:, 1], minlength=r.shape[1]).tolist() for p, r in zip(pairs, rounds, strict=True)]
    return [
        Match(p[0], p[1], p[2], p[3], round.shape[0], tuple(per_image))
        for p, round, per_image in zip(parts, rounds, counts, strict=True)
    ]
