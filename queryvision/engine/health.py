"""Steps whose losses or gradients are not finite: left out without the host waiting, and told of with the next losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from queryvision.engine.optimisation import Running
from queryvision.errors import QueryVisionError


@dataclass
class _Step:
    number: int  # from 1
    names: list[str]  # of losses
    image_ids: list[int]  # of this process
    finite: Tensor  # (losses + 1,) bool; the last: the step was taken


class Health:
    """Watches the steps of one process.

    The decision stays on the device: the optimiser gets it as `found_inf`, running statistics of norms are put back by it.

    Args:
        model: that is trained.
        accelerator: of the run.
        limit: steps in a row that may go wrong.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, limit: int) -> None:
        self.accelerator, self.limit = accelerator, limit
        self.norms = [module for module in model.modules() if isinstance(module, Running)]
        self.before: list[tuple[Tensor, Tensor]] = []
        self.steps: list[_Step] = []

    def begin(self) -> None:
        """Before the forward pass: keeps the statistics that it will move."""
        moving = [norm for norm in self.norms if norm.training]
        self.before = [(buffer, buffer.clone()) for norm in moving for buffer in norm.buffers()]

    def undo(self) -> None:
        """Instead of `end`, where a step was broken off: puts the statistics back."""
        for buffer, old in self.before:
            buffer.copy_(old)
        self.before = []

    def end(self, number: int, norm: Tensor, losses: Mapping[str, Tensor], image_ids: Sequence[int]) -> Tensor:
        """After the backward pass.

        Args:
            number: of the step, from 1.
            norm: () of all gradients, the same in every process.
            losses: of the step, by `head.term`.
            image_ids: of its images in this process.

        Returns:
            () 1 where the step is to be left out, in every process, else 0.
        """
        finite = torch.stack(list(losses.values())).isfinite()
        fine = norm.isfinite()
        if self.accelerator.scaler is not None:  # gradients that overflow are its own affair, while it has room to scale less
            fine = fine | (self.accelerator.scaler._get_scale_async() > 1)  # without the host waiting
        bad = (~(finite.all() & fine)).float()
        if self.accelerator.num_processes > 1:
            bad = self.accelerator.reduce(bad, "sum").clamp(max=1)
        skip = bad > 0
        for buffer, old in self.before:
            buffer.copy_(torch.where(skip, old, buffer))
        self.before = []
        self.steps.append(_Step(number, list(losses), list(image_ids), torch.cat([finite, (bad == 0)[None]])))
        return bad

    def read(self, in_row: int) -> tuple[list[str], int]:
        """What went wrong since the last time; here the host waits.

        Args:
            in_row: steps that were left out just before.

        Returns:
            A line for each step that was left out, and how many of them were the last ones.

        Raises:
            QueryVisionError: there were `limit` in a row.
        """
        steps, self.steps = self.steps, []
        flags = torch.cat([step.finite for step in steps]).tolist() if steps else []
        lines: list[str] = []
        row: list[str] = []
        for step in steps:
            own, flags = flags[: len(step.names) + 1], flags[len(step.names) + 1 :]
            if own[-1]:
                in_row, row = 0, []
                continue
            in_row += 1
            mine = [([name for name, good in zip(step.names, own, strict=False) if not good], step.image_ids)]
            every = gather_object(mine) if self.accelerator.num_processes > 1 else mine
            text = f"step {step.number}: {_what(every)}"
            row.append(text)
            if in_row >= self.limit:
                raise QueryVisionError(
                    f"{row[0]}, one of {in_row} bad steps in a row, {step.number - in_row + 1} to {step.number}; the last "
                    "checkpoint is kept. Try a lower --lr or --precision fp32"
                )
            lines.append(f"{text}: the step is left out")
        return lines, in_row


def _what(processes: Sequence[tuple[list[str], list[int]]]) -> str:
    """Which terms are not finite, for which images; where all losses are fine it was the gradient, of any image."""
    guilty = [(names, ids) for names, ids in processes if names] or list(processes)
    names = list(dict.fromkeys(name for terms, _ in guilty for name in terms if name != "loss")) or ["the gradient"]
    ids = ", ".join(str(image) for _, images in guilty for image in images)
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not finite (images {ids})"
