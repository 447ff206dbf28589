"""The trainer: steps, evaluation, checkpoints. It knows the contract of heads and tasks, never a task.

Devices, precision and processes are Accelerate's matter. Losses are divided by counts of the whole accumulated, all-rank batch;
so accumulation is done here (Accelerate would divide again) and the loss is multiplied by the ranks DDP averages over.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from queryvision.config import TrainSettings
from queryvision.criterion import Criterion
from queryvision.engine.checkpoint import load_resumable, load_weights, save_checkpoint
from queryvision.engine.optimisation import AveragedWeights, lr_factor, parameter_groups
from queryvision.engine.processes import make_accelerator
from queryvision.engine.run_log import RunLog
from queryvision.errors import CheckpointError, QueryVisionError
from queryvision.model.query_model import QueryModel
from queryvision.structures import Batch

Metrics = dict[str, float]


@dataclass
class Progress:
    """Where a run stands; all of it travels in `last.pt`."""

    step: int = 0
    seconds: float = 0.0  # of training, evaluation apart
    best: float | None = None
    best_metrics: Metrics = field(default_factory=dict)
    skipped: int = 0  # unreadable images met
    sums: dict[str, Tensor] = field(default_factory=dict)  # losses since the last line of the log


class Trainer:
    """Trains a model.

    Args:
        model: to be trained.
        criterion: of its heads.
        settings: how.
        steps: optimiser steps of the whole run.
        batches: step (counted in batches, from 0) -> endless iterator of batches of this rank.
        evaluate: model -> metrics.
        main_metric: of the metrics; more is better.
        folder: of the run.
        header: what every checkpoint says beside the weights: task, config, classes.
        accelerator: devices and precision; None: made from the settings.
    """

    def __init__(
        self,
        model: QueryModel,
        criterion: Criterion,
        settings: TrainSettings,
        steps: int,
        batches: Callable[[int], Iterator[Batch]],
        evaluate: Callable[[QueryModel], Metrics],
        main_metric: str,
        folder: Path,
        header: dict[str, Any],
        accelerator: Accelerator | None = None,
    ) -> None:
        self.accelerator = accelerator or make_accelerator(settings)
        self.settings, self.steps, self.folder, self.header = settings, steps, folder, header
        self.criterion, self.batches, self.evaluate, self.main_metric = criterion, batches, evaluate, main_metric
        model.to(self.accelerator.device)
        groups = parameter_groups(model, settings.lr, settings.backbone_lr, settings.weight_decay)
        self.base_lrs = [float(group["lr"]) for group in groups]  # type: ignore[arg-type]
        self.plain = model
        self.average = AveragedWeights(model, settings.ema, settings.ema_warmup) if settings.ema else None
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(groups, fused=True))
        self.progress = Progress()
        self.rng: dict[str, Any] | None = None  # of a checkpoint
        self.log: RunLog

    # ------------------------------------------------------------------------------------------------ the run
    def fit(self) -> Progress:
        """Runs to the last step, from the first or from where `load` left off.

        Raises:
            QueryVisionError: the loss is no longer finite, or validation data cannot be read.
        """
        start = self.progress.step
        self.log = RunLog(self.folder, self.steps, start, self.accelerator.is_main_process)
        batches = self.batches(start * self.settings.accumulate)
        self._set_rng()  # after the loader, which draws from the global generator when it starts
        try:
            for step in range(start, self.steps):
                self._step(step, batches)
                self._after(step + 1)
        finally:
            self.log.close()
        return self.progress

    def _step(self, step: int, batches: Iterator[Batch]) -> None:
        began = time.perf_counter()
        s = self.settings
        self.model.train()
        factor = lr_factor(step, self.steps, s.schedule, s.warmup, s.flat, s.final, s.drop_at)
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor
        waiting = [next(batches) for _ in range(s.accumulate)]
        normalisers = self._normalisers(waiting)
        for index, batch in enumerate(waiting):
            self._report_skipped(batch)
            last = index == len(waiting) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                self._accumulate(batch, step, normalisers)
        if s.clip:
            self.accelerator.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], s.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.plain)
        self.progress.step = step + 1
        self.log.advance(step + 1, sum(len(b.images.pixels) for b in waiting) * self.accelerator.num_processes)
        self.progress.seconds += time.perf_counter() - began

    def _accumulate(self, batch: Batch, step: int, normalisers: dict[tuple[str, str], float]) -> None:
        """Forward, losses and backward of one micro-batch."""
        device = self.accelerator.device
        generators = image_generators(self.settings.seed, step, batch.targets.image_ids, device)
        batch = batch.to(device)
        with self.accelerator.autocast():
            outputs = self.model(batch.images, batch.targets, generators=generators)
        losses = self.criterion(outputs, batch.targets, normalisers, generators)
        self.accelerator.backward(losses.total * self.accelerator.num_processes)
        for key, value in {"loss": losses.total.detach(), **losses.terms}.items():
            known = self.progress.sums.get(key)
            self.progress.sums[key] = value if known is None else known + value

    def _normalisers(self, batches: list[Batch]) -> dict[tuple[str, str], float]:
        """Counts of all micro-batches and ranks, known before the first forward pass."""
        total: dict[tuple[str, str], float] = {}
        for batch in batches:
            counts = self.criterion.counts(batch.targets, self.plain.group_sizes(batch.targets.counts))
            for key, value in counts.items():
                total[key] = total.get(key, 0.0) + value
        if self.accelerator.num_processes > 1:
            summed = self.accelerator.reduce(torch.tensor(list(total.values()), device=self.accelerator.device), "sum")
            total = dict(zip(total, summed.tolist(), strict=True))
        return total

    def _report_skipped(self, batch: Batch) -> None:
        for path in batch.skipped:
            self.progress.skipped += 1
            self.log.say(f"skipped unreadable image: {path}")

    # ------------------------------------------------------------------------------------------------ after a step
    def _after(self, step: int) -> None:
        """Log, evaluate, save; in this order, so that what a checkpoint follows is already written."""
        s, final = self.settings, step == self.steps
        values: Metrics = {}
        if step % s.log_every == 0 or final:
            values = self._read_losses(step)
        if step % s.eval_every == 0 or final:
            try:
                values |= self._evaluate(step)
            except QueryVisionError:
                self._save()  # the steps so far are not lost
                raise
        if values:
            self.log.row(step, {"epoch": step / max(1, self.header["steps_per_epoch"]), **values})
        if step % s.save_every == 0 or final:
            self._save()

    def _read_losses(self, step: int) -> Metrics:
        """Means since the last line; the only place where the host waits for losses."""
        since = (step - 1) % self.settings.log_every + 1
        names = list(self.progress.sums)
        means = (torch.stack([self.progress.sums[n] for n in names]) / since).tolist()
        self.progress.sums = {}
        values = {name if name == "loss" else f"loss/{name}": value for name, value in zip(names, means, strict=True)}
        lr = self.optimizer.param_groups[0]["lr"]
        self.log.status(step, values["loss"], lr)
        if not all(torch.isfinite(torch.tensor(v)) for v in values.values()):
            bad = next(name for name, value in values.items() if not torch.isfinite(torch.tensor(value)) and name != "loss")
            raise QueryVisionError(
                f"step {step}: {bad} is not finite; the last checkpoint is kept. Try a lower --lr or --precision fp32"
            )
        return {"lr": lr, **values}

    def _evaluate(self, step: int) -> Metrics:
        """Metrics of the averaged weights; the best so far are kept in `best.pt`."""
        began = time.perf_counter()
        model = self.plain if self.average is None else cast(QueryModel, self.average.model)
        with torch.random.fork_rng():
            metrics = self.evaluate(model)
        value = metrics.get(self.main_metric, 0.0)
        if self.progress.best is None or value > self.progress.best:
            self.progress.best, self.progress.best_metrics = value, metrics
            if self.accelerator.is_main_process:
                save_checkpoint(
                    self.folder / "best.pt", {**self.header, "model": model.state_dict(), "step": step, "metrics": metrics}
                )
        shown = "  ".join(f"{key} {value:.3f}" for key, value in list(metrics.items())[:6] if value >= 0)
        self.log.pause(time.perf_counter() - began)
        self.log.say(f"step {step}: {shown}")
        return {f"val/{key}": value for key, value in metrics.items()}

    # ------------------------------------------------------------------------------------------------ checkpoints
    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        p = self.progress
        content = {
            **self.header,
            "model": self.plain.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": p.step,
            "metrics": p.best_metrics,
            "rng": {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
            "log": {"seconds": p.seconds, "best": p.best, "skipped": p.skipped, "sums": p.sums},
        }
        if self.average is not None:
            content |= {"ema": self.average.model.state_dict(), "ema_updates": self.average.updates}
        save_checkpoint(self.folder / "last.pt", content)

    def load(self) -> None:
        """Takes over `last.pt`, from which `fit` then goes on.

        Raises:
            CheckpointError: it is damaged, or was made with other classes, another model or another optimiser.
        """
        path = self.folder / "last.pt"
        state = load_resumable(path, self.header["classes"])
        load_weights(self.plain, state["model"], str(path))
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise CheckpointError(f"{path}: its optimiser trained other parts; keep the settings as they were") from error
        if self.average is not None:
            self.average.load(state.get("ema", state["model"]), state.get("ema_updates", 0))
        log, device = state["log"], self.accelerator.device
        sums = {key: value.to(device) for key, value in log["sums"].items()}
        self.progress = Progress(state["step"], log["seconds"], log["best"], state["metrics"], log["skipped"], sums)
        self.rng = state["rng"]

    def _set_rng(self) -> None:
        """The generators of a checkpoint, or fresh ones that differ from rank to rank."""
        if self.rng is None:
            torch.manual_seed(self.settings.seed + self.accelerator.process_index)
        else:
            torch.set_rng_state(self.rng["torch"])
            if self.rng["cuda"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(self.rng["cuda"])


def image_generators(seed: int, step: int, image_ids: tuple[int, ...], device: torch.device) -> list[torch.Generator]:
    """A generator for each image of a step, whatever rank or place in the batch it has."""
    base = (seed * 1_000_003 + step) * 1_000_003
    return [torch.Generator(device).manual_seed((base + image_id) % 2**63) for image_id in image_ids]
