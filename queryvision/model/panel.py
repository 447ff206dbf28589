"""The panel: all heads of a model, asked in order, and whose word steers.

Legend: B images, Q queries, P slots, N memory tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from queryvision.errors import ConfigError
from queryvision.head import Feedback, Head, Scene, Steering, View
from queryvision.model.cross_attention import Look
from queryvision.structures import Answer, Stage


class Panel(nn.ModuleDict):
    """Heads by name, in the order in which they answer.

    Args:
        heads: with distinct names.
        steering: who steers.

    Raises:
        ConfigError: two heads share a name, or the steering names a head that is not there.
    """

    def __init__(self, heads: Sequence[Head], steering: Steering) -> None:
        names = [head.name for head in heads]
        if len(set(names)) < len(names):
            raise ConfigError(f"heads need distinct names, got {names}")
        if not names:
            raise ConfigError("a model needs at least one head")
        missing = steering.names() - set(names)
        if missing:
            raise ConfigError(f"steering names the heads {sorted(missing)}, but the model has {names}")
        super().__init__({head.name: head for head in heads})
        self.steering = steering
        self.num_slots = sum(head.slots for head in heads)
        self._spans: dict[str, slice] = {}
        start = 0
        for head in heads:
            self._spans[head.name] = slice(start, start + head.slots)
            start += head.slots

    def heads(self) -> dict[str, Head]:
        """{name: head}, typed."""
        return {name: cast(Head, head) for name, head in self.items()}

    def prepare(self, scene: Scene) -> dict[str, Any]:
        """What each head shares over the stages of a batch."""
        return {name: head.prepare(scene) for name, head in self.heads().items()}

    def answer(
        self,
        stage: Stage,
        normed: Tensor,
        raw: Tensor,
        look: Look | None,
        previous: Mapping[str, Answer],
        contexts: Mapping[str, Any],
        earlier: Tensor | None = None,
        only_rank: bool = False,
        once: Tensor | None = None,
    ) -> tuple[dict[str, Answer], Feedback]:
        """Asks the heads at one stage.

        Before the last layer only those are asked that steer, unless the model is in training mode. What the last layer's
        heads would tell a next one is not asked for.

        Args:
            stage: where in the model.
            normed: (B,Q,1+P,D) after the decoder's norm.
            raw: (B,Q,1+P,D) before it.
            look: what the layer looked around; None: nothing.
            previous: answers of the stage before.
            contexts: of `prepare`.
            earlier: (B,Q,1+P,D) `normed` of the layer before; None: there was none.
            only_rank: ask only the head that ranks.
            once: (B,Q,1+P,D) after the norm once, where `normed` went through it twice.

        Returns:
            {head: answer} and the feedback of those who steer.
        """
        answers: dict[str, Answer] = {}
        feedback = Feedback()
        points: dict[str, Tensor] = {}
        for name, head in self._asked(stage, only_rank).items():
            view = self._view(name, stage, normed, raw, look)
            view.previous, view.answers, view.context = previous.get(name), dict(answers), contexts.get(name)
            view.earlier = None if earlier is None else earlier[:, :, 0].detach()
            view.once = None if once is None else once[:, :, 0]
            said = head(view)
            if said is None:
                continue
            answers[name] = said
            if self._steers(name, stage) and not (stage.last or only_rank):
                told = head.feedback(said, view)
                self._take(feedback, name, told, stage)
                if head.slots and told.points is not None:
                    points[name] = told.points
        feedback.points = self.side_by_side(points, None if look is None else look.points_base)
        return answers, feedback

    def _asked(self, stage: Stage, only_rank: bool) -> dict[str, Head]:
        heads = self.heads()
        if only_rank:
            if self.steering.rank is None:
                raise ConfigError("queries chosen among proposals need a head that ranks them: name it in the steering")
            return {self.steering.rank: heads[self.steering.rank]}
        return {n: head for n, head in heads.items() if self.training or stage.last or self._steers(n, stage)}

    def rank(self, answers: Mapping[str, Answer]) -> Tensor:
        """How promising each proposal is (B,N), as the head says that ranks."""
        assert self.steering.rank is not None, "nobody ranks"
        return self.heads()[self.steering.rank].rank(answers[self.steering.rank])

    def side_by_side(self, said: Mapping[str, Tensor], before: Tensor | None = None) -> Tensor | None:
        """Points of all slots (B,Q,P,2), each head's in its own span.

        Args:
            said: {head: (B,Q,slots,2)} of those who say anything; nobody: None is returned.
            before: (B,Q,P,2) what the others keep; None: the middle of the image.
        """
        if not said:
            return None
        like = next(iter(said.values()))
        points = like.new_full((*like.shape[:2], self.num_slots, 2), 0.5) if before is None else before
        parts = [said.get(name, points[:, :, span]) for name, span in self._spans.items()]
        return torch.cat(parts, 2)

    def _steers(self, name: str, stage: Stage) -> bool:
        s = self.steering
        named = (s.rank, s.first) if stage.kind == "proposal" else (s.later, s.hidden)
        return name in named or self.heads()[name].slots > 0

    def _take(self, feedback: Feedback, name: str, said: Feedback, stage: Stage) -> None:
        """Keeps of what a head says only the part it steers."""
        s = self.steering
        if name == (s.first if stage.kind == "proposal" else s.later):
            feedback.anchors = said.anchors
        if name == s.hidden:
            feedback.hidden = said.hidden

    def _view(
        self,
        name: str,
        stage: Stage,
        normed: Tensor,
        raw: Tensor,
        look: Look | None,
    ) -> View:
        span = self._spans[name]
        own = slice(1 + span.start, 1 + span.stop)
        has_slots = span.stop > span.start
        view = View(normed[:, :, 0], raw[:, :, 0], stage=stage)
        if has_slots:
            view.slots = normed[:, :, own]
        if look is not None:
            view.anchors, view.base = look.anchors, look.base
            if has_slots and look.points is not None:
                view.points = look.points[:, :, span]
                view.points_base = None if look.points_base is None else look.points_base[:, :, span]
        return view
