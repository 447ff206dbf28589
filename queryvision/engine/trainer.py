"""The trainer: steps, evaluation, checkpoints. It knows the contract of heads and tasks, never a task.

Devices, precision and processes are Accelerate's matter. Losses are divided by counts of the whole accumulated, all-rank batch;
so accumulation is done here (Accelerate would divide again) and the loss is multiplied by the ranks DDP averages over.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGTERM, Signals
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from queryvision.config import TrainSettings
from queryvision.criterion import Criterion
from queryvision.engine.checkpoint import save_checkpoint
from queryvision.engine.health import Health
from queryvision.engine.optimisation import lr_factor
from queryvision.engine.processes import host_group, make_accelerator, summed_on_host
from queryvision.engine.progress import Metrics, Progress
from queryvision.engine.randomness import image_generators, random_state, set_random_state
from queryvision.engine.run_log import RunLog
from queryvision.engine.state import RunState
from queryvision.engine.stopping import Asked, Interrupted, Stopped, listening
from queryvision.errors import ConfigError, DataError, QueryVisionError
from queryvision.model.query_model import QueryModel
from queryvision.structures import Batch
from queryvision.timing import Timer, untimed


class Trainer:
    """Trains a model.

    Args:
        model: to be trained.
        criterion: of its heads.
        settings: how.
        steps: optimiser steps of the whole run.
        steps_per_epoch: for the epoch column of the log.
        batches: step (counted in batches, from 0) -> endless iterator of batches of this rank.
        evaluate: model -> metrics.
        main_metric: of the metrics; more is better.
        folder: of the run.
        header: what every checkpoint says beside the weights: task, config, classes.
        accelerator: devices and precision; None: made from the settings.
        timer: stands around the parts of a step: data, transfer, forward, loss, backward, optimiser, average; and evaluation.
    """

    def __init__(
        self,
        model: QueryModel,
        criterion: Criterion,
        settings: TrainSettings,
        steps: int,
        steps_per_epoch: float,
        batches: Callable[[int], Iterator[Batch]],
        evaluate: Callable[[QueryModel], Metrics],
        main_metric: str,
        folder: Path,
        header: dict[str, Any],
        accelerator: Accelerator | None = None,
        timer: Timer = untimed,
    ) -> None:
        self.accelerator = accelerator or make_accelerator(settings)
        self.settings, self.steps, self.steps_per_epoch, self.timer = settings, steps, steps_per_epoch, timer
        self.folder, self.header = folder, header
        self.epochs = None if settings.steps or not settings.epochs else [settings.epochs, settings.min_steps]
        self.criterion, self.batches, self.evaluate, self.main_metric = criterion, batches, evaluate, main_metric
        self.state = RunState(model, settings, self.accelerator)
        self.health = Health(model, self.accelerator, settings.bad_steps)
        self.meeting = host_group(self.accelerator)
        self.asked, self.stopping = Asked(), 0  # which signal came, and which one all processes know of
        self.drawn: dict[str, Any] = {}  # generators before the step
        self.updating = False  # whether weights are half those of the next step
        self.log: RunLog

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.state.progress

    # ------------------------------------------------------------------------------------------------ the run
    def fit(self) -> Progress:
        """Runs to the last step, from the first or from where `load` left off.

        Raises:
            QueryVisionError: losses are no longer finite, validation data cannot be read, or a step needs too much memory.
            Stopped: a signal came; the state is saved.
        """
        start = self.progress.step
        written = start if self.progress.owed is None else start - 1
        self.log = RunLog(self.folder, self.steps, start, self.accelerator.is_main_process, written)
        batches = self.batches(start * self.settings.accumulate)
        # After the loader, which draws from the global generator when it starts.
        set_random_state(self.state.rng, self.accelerator.device, self.settings.seed, self.accelerator.process_index, start)
        try:
            if self.progress.owed is not None:
                self._write(start, {**self.progress.owed, **self._evaluate(start)})
                self.progress.owed = None
                self._save()
            with listening() as self.asked:
                for step in range(start, self.steps):
                    if self.settings.patience and self.progress.stale >= self.settings.patience:
                        self.log.say(
                            f"no better {self.main_metric} in {self.progress.stale} evaluations: ended (train.patience)"
                        )
                        self._save()
                        break
                    try:
                        self._step(step, batches)
                    except DataError:  # met before anything of the step was done, and raised in all processes
                        self._read_health()
                        self._save()
                        self.accelerator.wait_for_everyone()  # a launcher ends the others as soon as one has ended
                        raise
                    except ConfigError as error:  # in the midst of a step, as the next
                        self._save_before(error)
                        raise
                    except torch.OutOfMemoryError as error:
                        saved = ", the state before it is saved" if self._save_before(error) else ""
                        raise QueryVisionError(
                            f"the device has not the memory for step {step + 1}{saved}; try a smaller --batch-size (and "
                            "train.accumulate) or data.image_size, or train.recompute"
                        ) from error
                    self._after(step + 1)
        finally:
            self.log.close()
        return self.progress

    def _save_before(self, error: Exception) -> bool:
        """Saves the state before a step that was broken off, if one process can and no weight has moved yet."""
        if self.accelerator.num_processes > 1 or self.updating:
            return False
        traceback.clear_frames(error.__traceback__)  # they hold what the step has computed
        self.health.undo()
        set_random_state([self.drawn], self.accelerator.device, self.settings.seed, 0, self.progress.step)
        self.state.optimizer.zero_grad(set_to_none=True)
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        self._read_health()
        self._save()
        return True

    def _step(self, step: int, batches: Iterator[Batch]) -> None:
        began = time.perf_counter()
        s = self.settings
        self.drawn = random_state(self.accelerator.device)
        self.state.begin_step(lr_factor(step, self.steps, s.schedule, s.warmup, s.flat, s.final, s.drop_at))
        waiting: list[Batch] = []
        lost: DataError | None = None
        with self.timer("data"):
            try:
                waiting += [next(batches) for _ in range(s.accumulate)]
            except DataError as error:
                lost = error
        normalisers = self._normalisers(waiting, lost)
        self.health.begin()
        losses: dict[str, Tensor] = {}
        for index, batch in enumerate(waiting):
            last = index == len(waiting) - 1
            with self.state.gathering(last):
                for key, value in self._accumulate(batch, step, normalisers).items():
                    losses[key] = losses[key] + value if key in losses else value
        with self.timer("optimiser"):
            self.state.uncalled.refuse()
            norm = self.state.clipped(s.clip or math.inf)
            bad = self.health.end(step + 1, norm, losses, [i for batch in waiting for i in batch.targets.image_ids])
            self.updating = True
            self.state.step(bad)
        with self.timer("average"):
            self.state.follow()
        self.progress.step, self.updating = step + 1, False
        self.progress.add(losses, bad)
        self.log.advance(step + 1, sum(len(b.images.pixels) for b in waiting) * self.accelerator.num_processes)
        self.progress.seconds += time.perf_counter() - began

    def _accumulate(self, batch: Batch, step: int, normalisers: dict[tuple[str, str], float]) -> dict[str, Tensor]:
        """Forward, losses and backward of one micro-batch; its losses by `head.term`, and their sum."""
        device = self.accelerator.device
        generators = image_generators(self.settings.seed, step, batch.targets.image_ids, device)
        with self.timer("transfer"):
            batch = batch.to(device)
        with self.timer("forward"), self.accelerator.autocast():
            outputs = self.state.model(batch.images, batch.targets, generators=generators)
        with self.timer("loss"):
            losses = self.criterion(outputs, batch.targets, normalisers, generators)
        with self.timer("backward"):
            self.accelerator.backward(losses.total * self.accelerator.num_processes)
        return {"loss": losses.total.detach(), **losses.terms}

    def _normalisers(self, batches: list[Batch], lost: DataError | None) -> dict[tuple[str, str], float]:
        """Counts of all micro-batches and ranks, known before the first forward pass; all ranks meet here.

        Raises:
            DataError: a rank has `lost` its batches; in each the same.
        """
        total = {(group, head): 0.0 for group in self.state.plain.group_sizes(()) for head in self.criterion.heads}
        for batch in batches:
            counts = self.criterion.counts(batch.targets, self.state.plain.group_sizes(batch.targets.counts))
            for key, value in counts.items():
                total[key] += value
        said = [f"skipped unreadable image: {path}" for batch in batches for path in batch.skipped]
        errors = [] if lost is None else [str(lost)]
        self.stopping = number = self.asked.number
        if self.accelerator.num_processes > 1:  # all must stop after the same step
            mine = [*total.values(), number, len(said) + len(errors)]
            *summed, asked, told = summed_on_host(mine, self.meeting)
            total, self.stopping = dict(zip(total, summed, strict=True)), number or int(asked > 0) * SIGTERM
            if told:
                said, errors = gather_object(said), gather_object(errors)
        self.progress.skipped += len(said)
        for line in said:
            self.log.say(line)
        if errors:
            raise lost or DataError(errors[0])
        return total

    # ------------------------------------------------------------------------------------------------ after a step
    def _after(self, step: int) -> None:
        """Log, evaluate, save; in this order, so that what a checkpoint follows is already written."""
        s, final = self.settings, step == self.steps
        evaluating, saving = (step % every == 0 or final for every in (s.eval_every, s.save_every))
        alone = self.accelerator.num_processes == 1
        stopping = 0 if final else self.stopping or (self.asked.number if alone else 0)
        values: Metrics = {}
        if step % s.log_every == 0 or final:
            values = self._read_losses(step)
        elif evaluating or saving or stopping:
            self._read_health()
        if evaluating:
            self.progress.owed = values
            self._save()  # whatever happens meanwhile, the steps so far are not lost
            if not stopping:  # then there may be no time for it
                try:
                    values |= self._evaluate(step)
                    self.progress.owed = None
                except Interrupted:
                    stopping = self.asked.number
        if values and self.progress.owed is None:
            self._write(step, values)
        if saving or (stopping and not evaluating):
            self._save()
        if stopping:
            self.accelerator.wait_for_everyone()  # a launcher ends the others as soon as one has ended
            name = Signals(stopping).name
            raise Stopped(stopping, f"{name}: stopped after step {step}; go on with: qv train --resume {self.folder}")

    def _write(self, step: int, values: Metrics) -> None:
        self.log.row(step, {"epoch": step / self.steps_per_epoch, **values})

    def _read_losses(self, step: int) -> Metrics:
        """Means since the last line, shown and checked."""
        self._read_health()
        values, lr = self.progress.means(self.accelerator), self.state.optimizer.param_groups[0]["lr"]
        self.log.status(step, values.get("loss", math.nan), lr)
        return {"lr": lr, **values}

    def _read_health(self) -> None:
        """Says which steps were left out, before anything is saved."""
        lines, self.progress.in_row = self.health.read(self.progress.in_row)
        for line in lines:
            self.log.say(f"warning: {line}")

    def _evaluate(self, step: int) -> Metrics:
        """Metrics of the averaged weights; the best so far are kept in `best.pt`."""
        began = time.perf_counter()
        model = self.state.evaluated
        device = self.accelerator.device
        drawn_apart = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        alone = self.accelerator.num_processes == 1  # else the others would wait for its results
        with self.timer("evaluation"), drawn_apart, self.asked.breaking_off(alone):
            metrics = self.evaluate(model)
        value = metrics.get(self.main_metric, 0.0)
        if self.progress.best is None or value > self.progress.best or math.isnan(self.progress.best):
            self.progress.best, self.progress.best_metrics, self.progress.stale = value, metrics, 0
            if self.accelerator.is_main_process:
                save_checkpoint(
                    self.folder / "best.pt", {**self.header, "model": model.state_dict(), "step": step, "metrics": metrics}
                )
        else:
            self.progress.stale += 1
        shown = "  ".join(f"{key} {value:.3f}" for key, value in list(metrics.items())[:6] if value >= 0)
        self.log.pause(time.perf_counter() - began)
        self.log.say(f"step {step}: {shown}")
        return {f"val/{key}": value for key, value in metrics.items()}

    # ------------------------------------------------------------------------------------------------ checkpoints
    def _save(self) -> None:
        self.state.save(self.folder / "last.pt", {**self.header, "steps": self.steps, "epochs": self.epochs})

    def load(self) -> None:
        """Takes over `last.pt`, from which `fit` then goes on, and the steps of the run; errors as in `RunState.load`."""
        self.steps = self.state.load(self.folder / "last.pt", self.header["classes"], self.steps, self.epochs)
