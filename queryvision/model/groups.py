"""Query groups along Q: who sees whom, and the one place where the query axis is split.

Legend: B images, Q queries, S stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from queryvision.ops.transfer import uploaded
from queryvision.structures import VOID, Answer, QueryGroup, Round, Stage

Entry = tuple[Stage, dict[str, Answer]]
"""A stage and what each head said there, {head: {field: (B,Q,...)}}."""


def unseen(groups: Sequence[QueryGroup], batch: int, device: torch.device) -> Tensor | None:
    """Which queries cannot see which, (B or 1,Q,Q) bool, True = cannot see; None: all see all.

    `sees` is directed. The blocks of a group cannot see each other. VOID queries are seen by nobody but themselves.
    """
    void = any(g.pins is not None and bool((g.pins == VOID).any()) for g in groups)
    if len(groups) == 1 and groups[0].blocks == 1 and not void:
        return None
    # What stands where is sent over, and compared there: the mask itself may have megabytes, for which the host would wait.
    group = torch.repeat_interleave(torch.tensor([g.size for g in groups]))
    block = torch.cat([torch.arange(g.size) // max(g.size // g.blocks, 1) for g in groups])
    sees = torch.tensor([[other.name in g.sees for other in groups] for g in groups])
    group, block = uploaded(torch.stack((group, block)), device)
    hidden: Tensor = ~uploaded(sees, device)[group[:, None], group]
    hidden = (hidden & ((group[:, None] != group) | (block[:, None] != block)))[None]
    if void:
        nobody = uploaded(torch.cat([_void(g, batch) for g in groups], 1), device)
        hidden = (hidden | nobody[:, None]) & ~torch.eye(len(group), dtype=torch.bool, device=device)
    return hidden


def _void(group: QueryGroup, batch: int) -> Tensor:
    return torch.zeros(batch, group.size, dtype=torch.bool) if group.pins is None else group.pins == VOID


def _spans(groups: Sequence[QueryGroup]) -> list[tuple[QueryGroup, slice]]:
    spans, start = [], 0
    for group in groups:
        spans.append((group, slice(start, start + group.size)))
        start += group.size
    return spans


def make_rounds(entries: Sequence[Entry], groups: Sequence[QueryGroup], contexts: Mapping[str, Any]) -> list[Round]:
    """Splits the answers of all stages into query groups and stacks stages whose answers have the same fields."""
    rounds = []
    for group, span in _spans(groups):
        mine = [(stage, _cut(answers, span)) for stage, answers in entries]
        final = mine[-1][1]
        for same in _alike(mine):
            rounds.append(_stack(same, group, contexts, final))
    return rounds


def _cut(answers: Mapping[str, Answer], span: slice) -> dict[str, Answer]:
    return {head: {name: value[:, span] for name, value in answer.items()} for head, answer in answers.items()}


def _alike(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Runs of stages that have the same heads, fields and shapes."""
    runs: dict[tuple[Any, ...], list[Entry]] = {}
    for stage, answers in entries:
        form = tuple((head, name, value.shape[1:]) for head, answer in answers.items() for name, value in answer.items())
        if answers:
            runs.setdefault((stage.kind == "proposal", *form), []).append((stage, answers))
    return list(runs.values())


def _stack(entries: Sequence[Entry], group: QueryGroup, contexts: Mapping[str, Any], final: dict[str, Answer]) -> Round:
    first = entries[0][1]
    answers = {
        head: {name: torch.stack([said[head][name] for _, said in entries]) for name in answer}
        for head, answer in first.items()
    }
    round = Round(
        queries=group.name,
        stages=tuple(stage for stage, _ in entries),
        answers=answers,
        contexts={head: contexts.get(head) for head in answers},
        final=final,
        pins=group.pins,
        repeats=group.repeats,
        proposals=entries[0][0].kind == "proposal",
    )
    if group.pins is not None and bool((group.pins == VOID).any()):
        round.real = (group.pins != VOID).to(round.device, non_blocking=True)
    return round
