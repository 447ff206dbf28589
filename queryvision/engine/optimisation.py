"""Parameter groups, the learning rate as a function of the step, and averaged weights."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn

from queryvision.errors import ConfigError
from queryvision.model.query_model import QueryModel


def parameter_groups(model: QueryModel, lr: float, backbone_lr: float, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: the backbone at a share of the rate, everything else.

    Args:
        model: parameters that need no gradient are left out.
        lr: learning rate.
        backbone_lr: share of it for the backbone; 0 freezes the backbone.
        weight_decay: of both.

    Raises:
        ConfigError: nothing is left to train.
    """
    if backbone_lr == 0:
        model.backbone.requires_grad_(False)
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    own = {id(p) for p in model.backbone.parameters()}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    groups = [
        {"params": rest, "lr": lr, "weight_decay": weight_decay},
        {"params": backbone, "lr": lr * backbone_lr, "weight_decay": weight_decay},
    ]
    groups = [g for g in groups if g["params"]]
    if not groups:
        raise ConfigError("every parameter is frozen: there is nothing to train")
    return groups


def lr_factor(
    step: int,
    steps: int,
    schedule: Literal["cosine", "step", "flat"],
    warmup: int,
    flat: float,
    final: float,
    drop_at: float,
) -> float:
    """Share of the learning rate at an optimiser step (from 0).

    Args:
        step: counted from 0.
        steps: of the whole run.
        schedule: `cosine`: flat for `flat` of all steps, then down to `final` of the rate; `step`: a tenth after `drop_at`
            of all steps (DETR); `flat`.
        warmup: steps over which it rises linearly.
        flat: see `schedule`.
        final: see `schedule`.
        drop_at: see `schedule`.
    """
    rise = min(1.0, (step + 1) / (warmup + 1))
    if schedule == "cosine":
        start = max(flat * steps, warmup)
        progress = min(1.0, max(0.0, (step - start) / max(1.0, steps - 1 - start)))
        return rise * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))
    if schedule == "step":
        return rise * (0.1 if step >= drop_at * steps else 1.0)
    return rise


class AveragedWeights:
    """Exponential moving average of a model's weights and buffers, kept as a model of its own.

    Args:
        model: whose weights to follow.
        decay: of the average; it rises towards this as decay * (1 - exp(-updates / warmup)).
        warmup: see `decay`.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: int) -> None:
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the weights after an optimiser step; one fused operation over all of them."""
        self.updates += 1
        share = 1 - self.decay * (1 - math.exp(-self.updates / self.warmup))
        mine, theirs, own = [], [], self.model.state_dict()
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                mine.append(own[key])
                theirs.append(value.detach())
            else:
                own[key].copy_(value)
        torch._foreach_lerp_(mine, theirs, share)

    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Goes on from a checkpoint."""
        self.model.load_state_dict(state)
        self.updates = updates
