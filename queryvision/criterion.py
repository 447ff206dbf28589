"""The criterion: rounds -> match -> the heads' losses -> Losses. It knows no head and no task.

Legend: B images, Q queries, S stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from queryvision.head import Head, Steering
from queryvision.matching import match
from queryvision.structures import Answer, Facts, Losses, Match, Outputs, Round, Targets
from queryvision.timing import Timer, untimed

Normalisers = Mapping[tuple[str, str], float]
"""{(query group, head): what the head's losses are divided by}."""


class Criterion:
    """Asks every head for its losses in float32, on pairs that all of them agreed upon.

    Args:
        heads: {name: head}.
        steering: its `quality` is the order in which heads are asked how good a pair is.
        round_weights: {query group: factor} on all losses of its rounds; 1 where nothing is said.
        timer: stands around the part `assignment`.
    """

    def __init__(
        self,
        heads: Mapping[str, Head],
        steering: Steering | None = None,
        round_weights: Mapping[str, float] | None = None,
        timer: Timer = untimed,
    ) -> None:
        self.heads, self.timer = heads, timer
        self.quality = (steering or Steering()).quality
        self.round_weights = dict(round_weights or {})

    def counts(self, targets: Targets, groups: Mapping[str, tuple[int, int]]) -> dict[tuple[str, str], float]:
        """What one batch adds to the normalisers; the engine sums this over micro-batches and ranks.

        Args:
            targets: of the batch; only what stands on the host is read.
            groups: {query group: (number of queries, repeats)}.
        """
        return {
            (group, name): head.count(targets, num_queries, repeats)
            for group, (num_queries, repeats) in groups.items()
            for name, head in self.heads.items()
        }

    def __call__(
        self,
        outputs: Outputs,
        targets: Targets,
        normalisers: Normalisers | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Losses:
        """Losses of a batch.

        Args:
            outputs: of the model.
            targets: on the same device.
            normalisers: of the whole accumulated, all-rank batch; None: of this batch alone.
            generators: one an image, for what samples.
        """
        with torch.autocast(targets.valid.device.type, enabled=False):
            rounds = [_in_float32(r) for r in outputs.rounds]
            with self.timer("assignment"):
                by_stage, united = match(rounds, self.heads, targets, generators)
            details = []
            shares = {"stage": _main_share(rounds, by_stage), "union": _main_share(rounds, united)}
            for round, own, union in zip(rounds, by_stage, united, strict=True):
                facts_of = self._facts(round, {"stage": own, "union": union}, shares, targets, generators)
                details.append(self._round_losses(round, facts_of, targets, normalisers or {}))
            return self._sum_up(rounds, details)

    def _facts(
        self,
        round: Round,
        matches: Mapping[str, Match],
        shares: Mapping[str, float],
        targets: Targets,
        generators: Sequence[torch.Generator] | None,
    ) -> Callable[[str], tuple[Match, Facts]]:
        """What losses may want to know, made once for each way of matching that is asked for."""
        made: dict[str, tuple[Match, Facts]] = {}
        ignored: Tensor | None = None
        if targets.num_ignored:
            for name in round.answers:
                inside = self.heads[name].ignored(round, targets)
                if inside is not None:
                    ignored = inside if ignored is None else ignored | inside

        def facts_of(kind: str) -> tuple[Match, Facts]:
            if kind not in made:
                quality, known = self._quality(round, matches[kind], targets)
                made[kind] = matches[kind], Facts(1.0, quality, known, ignored, shares[kind], generators)
            return made[kind]

        return facts_of

    @torch.no_grad()
    def _quality(self, round: Round, match: Match, targets: Targets) -> tuple[Tensor, Tensor]:
        """The first head of the list that knows a pair says how good it is; otherwise 1."""
        quality = torch.ones(len(match.query), device=match.query.device)
        known = torch.zeros_like(quality, dtype=torch.bool)
        for name in self.quality:
            said = self.heads[name].quality(round, match, targets) if name in round.answers else None
            if said is not None:
                value, knows = said
                fresh = ~known if knows is None else knows & ~known
                quality = torch.where(fresh, value.float(), quality)
                known = known | fresh
                if knows is None:
                    break
        return quality, known

    def _round_losses(
        self,
        round: Round,
        facts_of: Callable[[str], tuple[Match, Facts]],
        targets: Targets,
        normalisers: Normalisers,
    ) -> dict[str, Tensor]:
        """Weighted terms {"head.term": (S,)} of one round."""
        terms: dict[str, Tensor] = {}
        for name in round.answers:
            head = self.heads[name]
            match, facts = facts_of(head.matched_by)
            count = normalisers.get((round.queries, name))
            if count is None:
                count = head.count(targets, round.shape[2], round.repeats)
            losses = head.loss(round, match, targets, replace(facts, normaliser=max(count, 1.0)))
            if losses.keys() != head.weights.keys():
                raise ValueError(
                    f"head '{name}' returned the loss terms {sorted(losses)} but has weights for {sorted(head.weights)}; "
                    "every term needs a weight and every weight a term"
                )
            factor = self.round_weights.get(round.queries, 1.0)
            terms |= {f"{name}.{term}": value * (head.weights[term] * factor) for term, value in losses.items()}
        return terms

    @staticmethod
    def _sum_up(rounds: Sequence[Round], details: list[dict[str, Tensor]]) -> Losses:
        """The total, and for the log the last stage's terms and each other query group's sum."""
        total = torch.stack([value.sum() for terms in details for value in terms.values()]).sum()
        log: dict[str, Tensor] = {}
        for round, terms in zip(rounds, details, strict=True):
            for name, value in terms.items():
                if any(stage.last for stage in round.stages):
                    key = name if round.queries == "main" else f"{round.queries}/{name}"
                    log[key] = value[-1].detach()
        return Losses(total, log, details)


def _main_share(rounds: Sequence[Round], matches: Sequence[Match]) -> float:
    """Share of the main queries that have a pair, over the stages that are no proposals; nothing is read from a device."""
    mine = [(r, m) for r, m in zip(rounds, matches, strict=True) if r.queries == "main" and not r.proposals]
    queries = sum(s * b * q for s, b, q in (r.shape for r, _ in mine))
    return sum(len(m.query) for _, m in mine) / max(queries, 1)


def _in_float32(round: Round) -> Round:
    """The round with all floating answers in float32."""

    def cast(answers: Mapping[str, Answer]) -> dict[str, Answer]:
        return {
            head: {name: value.float() if value.is_floating_point() else value for name, value in answer.items()}
            for head, answer in answers.items()
        }

    return replace(round, answers=cast(round.answers), final=cast(round.final))
