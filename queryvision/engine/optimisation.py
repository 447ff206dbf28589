"""Frozen parts, parameter groups, the learning rate as a function of the step, and averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from queryvision.engine.sharding import is_sharded, whole
from queryvision.errors import ConfigError, nearest
from queryvision.model.query_model import QueryModel

OFFSETS = ("sampling_offsets", "reference_points")
"""Modules that say where deformable attention looks; they learn at a rate of their own (Deformable-DETR:main.py)."""

Running = nn.modules.batchnorm._NormBase
"""Norms that keep statistics of what they saw: batch and instance norm."""

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, Running)


def freeze(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Parts that are not trained: their parameters get no gradient.

    Dropout inside them stays as it is; norms with running statistics must keep them.

    Args:
        model: whose parts they are.
        names: modules or parameters from the top of the model: `backbone`, `heads.labels`, `decoder.layers.0`.

    Returns:
        The norms to hold in evaluation mode.

    Raises:
        ConfigError: there is no such part; the valid names are listed.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    held: list[nn.Module] = []
    for name in names:
        if name in modules and name:
            modules[name].requires_grad_(False)
            held += [module for module in modules[name].modules() if isinstance(module, Running)]
        elif name in parameters:
            parameters[name].requires_grad_(False)
        else:
            raise ConfigError(_no_part(modules, name, "train.freeze"))
    return held


def part_of(model: nn.Module, name: str, setting: str) -> nn.Module:
    """A module by its path from the top of the model.

    Raises:
        ConfigError: there is none; the setting and the valid names are told.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if not name or name not in modules:
        raise ConfigError(_no_part(modules, name, setting))
    return modules[name]


def _no_part(modules: Mapping[str, nn.Module], name: str, setting: str) -> str:
    """Says where a dotted name goes wrong and what there is instead."""
    known, parts = "", name.split(".")
    while len(parts) > 1 and ".".join((*([known] if known else []), parts[0])) in modules:
        known = ".".join((*([known] if known else []), parts.pop(0)))
    inside = modules[known]
    below = [key for key, _ in (*inside.named_children(), *inside.named_parameters(recurse=False))]
    text = f"{setting}: the model has no part '{name}'; {nearest(parts[0], below)}"
    top = ", ".join(key for key, _ in modules[""].named_children())
    return f"{text} in '{known}'; parts of the model: {top}" if known else text


def backbone_body(model: QueryModel) -> str:
    """Path of what pretrained weights fill: a backbone's `body`; a pyramid beside it starts from random weights."""
    return "backbone.body" if hasattr(model.backbone, "body") else "backbone"


def parameter_groups(
    model: QueryModel,
    lr: float,
    *,
    weight_decay: float,
    backbone_lr: float = 1.0,
    offsets_lr: float = 1.0,
    norm_decay: bool = False,
) -> list[dict[str, Any]]:
    """Parameters that share a learning rate and a weight decay; each group knows the names of its own.

    Args:
        model: parameters that need no gradient are left out.
        lr: learning rate.
        weight_decay: of all, norms perhaps apart.
        backbone_lr: share of `lr` for the backbone's body.
        offsets_lr: share of `lr` for modules named as in `OFFSETS`, outside the backbone.
        norm_decay: whether weights and biases of norms decay, too.

    Returns:
        Groups for an optimiser; the first is never the backbone's unless nothing else is trained.

    Raises:
        ConfigError: nothing is left to train.
    """
    pretrained = backbone_body(model)
    norms = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    shares = {"rest": 1.0, "offsets": offsets_lr, "backbone": backbone_lr}
    groups: dict[tuple[str, bool], dict[str, Any]] = {
        (part, bare): {"params": [], "lr": lr * share, "weight_decay": 0.0 if bare else weight_decay, "names": []}
        for part, share in shares.items()
        for bare in (False, True)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            offsets = set(name.split(".")) & set(OFFSETS)
            part = "backbone" if name.startswith(f"{pretrained}.") else "offsets" if offsets else "rest"
            group = groups[part, not norm_decay and id(parameter) in norms]
            group["params"].append(parameter)
            group["names"].append(name)
    found = [group for group in groups.values() if group["params"]]
    if not found:
        raise ConfigError("every parameter is frozen: there is nothing to train")
    return found


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
        mine = [*self.model.parameters(), *self.model.buffers()]  # what two modules share counts once
        theirs = [*model.parameters(), *model.buffers()]
        pairs = list(zip(mine, theirs, strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        if is_sharded(model):
            for own, value in averaged:  # one by one, so that no second whole model is held
                own.lerp_(whole(value.detach()), share)
        else:
            torch._foreach_lerp_([own for own, _ in averaged], [value.detach() for _, value in averaged], share)
        for own, value in pairs:
            if not own.is_floating_point():
                own.copy_(value)

    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Goes on from a checkpoint."""
        self.model.load_state_dict(state)
        self.updates = updates
