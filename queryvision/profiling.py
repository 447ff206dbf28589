"""Where the time of a training step goes."""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from queryvision.config import load_config
from queryvision.engine.run_log import RunLog
from queryvision.errors import ConfigError
from queryvision.run import Run
from queryvision.timing import Clock

PARTS = ("data", "transfer", "forward", "assignment", "loss", "backward", "optimiser", "average")
"""In the order of a step; what is in none of them is `rest`."""

WARM = 3
"""Steps before the measured ones."""


@dataclass(frozen=True)
class Profile:
    """What was measured.

    Attributes:
        parts: {part of a step: seconds a step}; they sum to the step.
        evaluation: seconds an image.
        share: of a run's time that its evaluations take, 0..1.
        images: a step.
        memory: peak of the GPU, else of the process, bytes.
        device: in words.
    """

    parts: dict[str, float]
    evaluation: float
    share: float
    images: int
    memory: int
    device: str

    @property
    def step(self) -> float:
        """Seconds."""
        return sum(self.parts.values())

    def lines(self) -> list[str]:
        """A table for people."""
        rows = [f"{name:12s} {1000 * value:9.1f} ms  {value / self.step:6.1%}" for name, value in self.parts.items()]
        return [
            *rows,
            f"{'step':12s} {1000 * self.step:9.1f} ms  {self.images / self.step:.1f} images/s, {self.images} images a step",
            f"{'evaluation':12s} {1000 * self.evaluation:9.1f} ms  an image, reading and metrics included; "
            f"{self.share:.1%} of a run with this train.eval_every",
            f"peak memory {self.memory / 2**20:,.0f} MB on {self.device}",
        ]


def profile(
    task: str | None = None,
    config: str | None = None,
    *,
    data: str | Path | None = None,
    steps: int = 10,
    batch_size: int | None = None,
    image_size: int | None = None,
    precision: str | None = None,
    workers: int | None = None,
    settings: Sequence[str] = (),
) -> Profile:
    """Measures the parts of training steps and of an evaluation, from random weights; leaves no folder.

    On a GPU the host waits at the ends of each part, so the sum is a little more than an ordinary step.

    Args:
        task: name of the task; None: of the configuration, else `detection`.
        config: name of a preset or a YAML file; None: the task's default.
        data: folder of the data set; None: of the configuration, else the embedded drawn scenes.
        steps: that are measured, after three that are not.
        batch_size: images a step.
        image_size: short side of the input in pixels.
        precision: fp32, bf16, fp16, or auto: bf16 where the device computes in it.
        workers: processes that read images.
        settings: `section.key=value`, any other setting.

    Raises:
        ConfigError, DataError: one line says what is wrong.
    """
    if steps < 1:
        raise ConfigError(f"steps = {steps}: must be at least 1")
    given = {
        "data.path": None if data is None else str(data), "train.batch_size": batch_size, "data.image_size": image_size,
        "train.precision": precision, "data.workers": workers, "train.devices": 1, "weights": "none",
        "train.steps": WARM + steps,
    }  # fmt: skip
    chosen = load_config(task, config, given, settings)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(chosen, Path(folder))
        clock = Clock(run.accelerator.device)
        run.timer = clock
        trainer = run.trainer(resume=False)
        trainer.log = RunLog(Path(folder), trainer.steps, active=False)
        batches = trainer.batches(0)
        for step in range(WARM):
            trainer._step(step, batches)
        clock.seconds.clear()
        with clock("rest"):
            for step in range(WARM, WARM + steps):
                trainer._step(step, batches)
        parts = {part: clock.seconds.get(part, 0.0) / steps for part in (*PARTS, "rest")}
        total = len(run.val_data)
        run.val_data = run.val_data.subset(min(len(run.val_data), 4 * run.config.evaluation.batch_size))
        trainer.evaluate(trainer.state.evaluated)  # the first one starts workers and reads annotations
        clock.seconds.clear()
        with clock("evaluation"):
            trainer.evaluate(trainer.state.evaluated)
        train = run.config.train
        each = clock.seconds["evaluation"] / len(run.val_data)
        between = train.eval_every * sum(parts.values())
        share = total * each / (total * each + between)
        return Profile(parts, each, share, train.images * train.accumulate, *_memory(run.accelerator.device))


def _memory(device: torch.device) -> tuple[int, str]:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.get_device_name(device)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak, f"{torch.get_num_threads()} threads of the CPU (libraries included)"
