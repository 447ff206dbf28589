"""What changes from step to step, and travels in `last.pt`: weights, their average, the optimiser, where the run stands."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from queryvision.config import TrainSettings
from queryvision.engine.checkpoint import load_resumable, load_weights, save_checkpoint
from queryvision.engine.compilation import compile_parts
from queryvision.engine.optimisation import AveragedWeights, backbone_body, freeze, parameter_groups, part_of
from queryvision.engine.progress import LOGGED, Progress
from queryvision.engine.randomness import random_state
from queryvision.engine.recomputation import blocks, recompute
from queryvision.engine.sharding import (
    everywhere,
    gathered,
    is_sharded,
    like,
    meet_after_backward,
    optimizer_state_like,
    shard,
    share_statistics,
    whole,
)
from queryvision.errors import CheckpointError, ConfigError
from queryvision.model.query_model import QueryModel


class RunState:
    """The state of a training run in one process.

    Args:
        model: to be trained; moved to the accelerator's device.
        settings: what is trained, and how fast.
        accelerator: devices and precision.

    Attributes:
        plain: the model itself.
        model: what a step runs, perhaps wrapped for several processes.
        optimizer: Accelerate's, around AdamW.
        average: of the weights, or None.
        progress: where the run stands.
        reading: ids of the parameters of readouts, whose gradients are clipped apart.
        uncalled: parts to be compiled that nothing has called yet.
        rng: generators of all ranks of the checkpoint it was loaded from.
    """

    def __init__(self, model: QueryModel, settings: TrainSettings, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        model.to(accelerator.device)
        untrained = [*settings.freeze, *([backbone_body(model)] if settings.backbone_lr == 0 else [])]
        self.held = freeze(model, untrained)  # norms that must not go on counting
        self.plain = model
        self.average = AveragedWeights(model, settings.ema, settings.ema_warmup) if settings.ema else None
        recompute(model, settings.recompute, self.held)  # not in the average, which is only evaluated
        self.uncalled = compile_parts(model, settings.compile)
        if settings.shard:
            inner = [block for block in blocks(model.backbone) if block is not model.backbone]
            shard(model, inner, averaged=self.average is not None)
        groups = parameter_groups(
            model,
            settings.lr,
            weight_decay=settings.weight_decay,
            backbone_lr=settings.backbone_lr,
            offsets_lr=settings.offsets_lr,
            norm_decay=settings.norm_decay,
        )
        heads = model.heads.heads().items()
        parts = [part_of(head, each, f"head '{name}': readouts") for name, head in heads for each in head.readouts]
        self.reading = {id(parameter) for part in parts for parameter in part.parameters()}
        self.own_groups = [{key: group[key] for key in ("lr", "weight_decay", "names")} for group in groups]
        # A 1x1 convolution's gradients may have other strides, which mean the same.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
        self.model: nn.Module = model if settings.shard else accelerator.prepare(model)
        self.optimizer = accelerator.prepare(torch.optim.AdamW(groups, fused=True))
        # Accelerate puts autocast around `forward`; here it stands around the training step, so that evaluation is float32.
        model.__dict__.pop("forward", None)
        self.progress, self.rng = Progress(), cast(list[dict[str, Any]], [])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that are trained."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def evaluated(self) -> QueryModel:
        """The averaged weights, or the model itself where there is no average."""
        return self.plain if self.average is None else cast(QueryModel, self.average.model)

    def gathering(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Stands around a micro-batch: gradients of all processes meet after the last one of a step."""
        if is_sharded(self.plain):
            meet_after_backward(self.plain, last)
            return contextlib.nullcontext()
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def begin_step(self, factor: float) -> None:
        """Training mode, and learning rates: their share `factor`."""
        self.model.train()
        for norm in self.held:
            norm.eval()
        for group, own in zip(self.optimizer.param_groups, self.own_groups, strict=True):
            group["lr"] = own["lr"] * factor

    def clipped(self, limit: float) -> Tensor:
        """Shortens the gradient to `limit` at most, that of readouts apart; returns a norm () of all, in all processes."""
        shaping = [p for p in self.parameters if id(p) not in self.reading]
        norm: Tensor = whole(self.accelerator.clip_grad_norm_(shaping, limit))  # of several, this one unscales all
        if len(shaping) < len(self.parameters):
            reading = [p for p in self.parameters if id(p) in self.reading]
            norm = norm + whole(torch.nn.utils.clip_grad_norm_(reading, limit))
        return norm

    def step(self, bad: Tensor) -> None:
        """The optimiser's step, unless `bad` () is 1."""
        if self.accelerator.scaler is None:
            self.optimizer.optimizer.found_inf = everywhere(bad, self.parameters[0])
        else:  # it knows of gradients, not of losses
            for found in self.accelerator.scaler._found_inf_per_device(self.optimizer.optimizer).values():
                found.add_(bad).clamp_(max=1)  # a kernel asks whether it is 1
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def follow(self) -> None:
        """The average takes in the new weights."""
        if self.accelerator.num_processes > 1:  # each would be measured by its own; DDP shares them only before the next step
            share_statistics(self.plain)
        if self.average is not None:
            self.average.update(self.plain)

    def save(self, path: Path, header: dict[str, Any]) -> None:
        """Writes `last.pt`; every process calls it, the first one writes.

        Args:
            path: of the file.
            header: what every checkpoint says beside the weights.

        Raises:
            CheckpointError: it cannot be written; the file before it is untouched.
        """
        p = self.progress
        sums, rng = p.shared(self.accelerator), [random_state(self.accelerator.device)]
        rng = gather_object(rng) if self.accelerator.num_processes > 1 else rng
        weights, moments = gathered(self.plain.state_dict()), gathered(self.optimizer.state_dict())
        if not self.accelerator.is_main_process:
            return
        content = {
            **header,
            "model": weights,
            "optimizer": moments,
            "step": p.step,
            "metrics": p.best_metrics,
            "rng": rng,
            "log": {**{key: getattr(p, key) for key in LOGGED}, "sums": sums},
        }
        if self.accelerator.scaler is not None:
            content["scaler"] = self.accelerator.scaler.state_dict()
        if self.average is not None:
            content |= {"ema": self.average.model.state_dict(), "ema_updates": self.average.updates}
        save_checkpoint(path, content)

    def load(self, path: Path, classes: dict[str, Any], steps: int, epochs: list[float] | None = None) -> int:
        """Takes over a `last.pt`.

        Args:
            path: of the file.
            classes: of the data, as a checkpoint has them.
            steps: of the whole run, by the settings.
            epochs: from which they follow, and the floor of steps. Where the checkpoint has the same, its steps count: with
                other devices an epoch has another number of them.

        Returns:
            Steps of the whole run.

        Raises:
            CheckpointError: it is damaged, or was made with other classes, another model or another optimiser.
            ConfigError: it is further than the run is to go.
        """
        state = load_resumable(path, classes)
        own = self.plain.state_dict()
        load_weights(self.plain, {k: like(v, own[k]) if k in own else v for k, v in state["model"].items()}, str(path))
        try:
            trained = [group.get("names") for group in state["optimizer"]["param_groups"]]
            if trained != [group["names"] for group in self.own_groups]:
                raise ValueError("the groups hold other parameters")
            self.optimizer.load_state_dict(optimizer_state_like(state["optimizer"], self.parameters))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: its optimiser trained other parts; keep the settings as they were") from error
        if self.average is not None:
            self.average.load(state.get("ema", state["model"]), state.get("ema_updates", 0))
        for group, own in zip(self.optimizer.param_groups, self.own_groups, strict=True):
            group["weight_decay"] = own["weight_decay"]
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if epochs and state.get("epochs") == epochs:
            steps = state["steps"]
        if state["step"] > steps:
            raise ConfigError(f"{path}: the run is already at step {state['step']}; --steps {steps} must be at least that")
        rng = state["rng"]
        self.rng = rng if isinstance(rng, list) else [rng]  # before, only the first rank's was kept
        try:
            self.progress = Progress(step=state["step"], best_metrics=state["metrics"], **state["log"])
        except (LookupError, TypeError) as error:
            raise CheckpointError(f"{path}: lacks where its run stood; resume it with the version that wrote it") from error
        share = float(self.accelerator.is_main_process)  # they are those of all processes
        self.progress.sums = {key: share * value.to(self.accelerator.device) for key, value in self.progress.sums.items()}
        return steps
