"""What a run leaves for people: metrics.csv, TensorBoard events, curves.png, a progress bar or plain lines.

`metrics.csv` holds nothing that depends on the clock, so that a resumed run writes the same file as one without interruption.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from queryvision.engine.files import replacing
from queryvision.errors import ConfigError


class RunLog:
    """Writes the run folder's records; on other ranks than 0 it does nothing.

    What cannot be written later on is told once, and training goes on without it.

    Args:
        folder: of the run.
        steps: of the whole run, for the progress bar.
        start: first step.
        active: whether this rank writes.
        written: the last step whose row is kept of an interrupted run; None: `start`.

    Raises:
        ConfigError: nothing can be written there.
    """

    def __init__(self, folder: Path, steps: int, start: int = 0, active: bool = True, written: int | None = None) -> None:
        self.folder, self.steps, self.active = folder, steps, active
        self.path = folder / "metrics.csv"
        self.console = Console()
        self.progress: Progress | None = None
        self.complained = False
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
            kept = _read_rows(self.path, start if written is None else written) if start else []
            self._write_csv(kept, list(dict.fromkeys(key for row in kept for key in row)) or ["step"])
        except OSError as error:
            raise ConfigError(f"cannot write into {folder} ({error.strerror})") from error
        self.began, self.first, self.images = time.perf_counter(), start, 0
        self.paused = 0.0
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, TextColumn("{task.fields[info]}"), console=self.console)
            self.bar = self.progress.add_task("training", total=steps, completed=start, info="")
            self.progress.start()

    def say(self, text: str) -> None:
        """A line for people."""
        if self.active:
            with contextlib.suppress(OSError):
                self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    @contextlib.contextmanager
    def _spared(self) -> Iterator[None]:
        """A record is not worth a run."""
        try:
            yield
        except OSError as error:
            if not self.complained:
                self.complained = True
                self.say(f"warning: the records in {self.folder} are not complete ({error.strerror}); training goes on")

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """One line of the CSV; a column that is new is added to all of it."""
        if not self.active:
            return
        with self._spared():
            self._add_row({"step": str(step), **{key: repr(float(value)) for key, value in values.items()}})
        with self._spared():
            for key, value in values.items():
                self.board.add_scalar(key, value, step)

    def advance(self, step: int, images: int) -> None:
        """A step is done."""
        if self.active:
            self.images += images
            if self.progress is not None:
                self.progress.update(self.bar, completed=step)

    def status(self, step: int, loss: float, lr: float) -> None:
        """Loss, speed and remaining time: in the bar, or as a plain line where the output is no terminal."""
        if not self.active:
            return
        seconds = max(1e-9, time.perf_counter() - self.began - self.paused)
        speed = self.images / seconds
        with self._spared():
            self.board.add_scalar("images per second", speed, step)
        if self.progress is not None:
            self.progress.update(self.bar, info=f"loss {loss:.3f}  {speed:.1f} images/s")
            return
        left = (self.steps - step) * seconds / max(1, step - self.first)
        with self._spared():
            print(
                f"step {step}/{self.steps}  loss {loss:.4f}  lr {lr:.2e}  {speed:.1f} images/s  left {_clock(left)}", flush=True
            )

    def pause(self, seconds: float) -> None:
        """Time that is not training."""
        if self.active:
            self.paused += seconds

    def close(self) -> None:
        """Draws the curves and ends the bar."""
        if not self.active:
            return
        if self.progress is not None:
            self.progress.stop()
        with self._spared():
            draw_curves(_read_rows(self.path), self.folder / "curves.png")
        with self._spared():
            self.board.close()
        with self._spared():
            sys.stdout.flush()

    def _add_row(self, row: dict[str, str]) -> None:
        new = [key for key in row if key not in self.columns]
        if new:
            self._write_csv([*_read_rows(self.path), row], [*self.columns, *new])
            return
        text = io.StringIO()
        csv.DictWriter(text, self.columns).writerow(row)
        line = text.getvalue().encode()
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            if file.write(line) < len(line):  # else the next row would go on in the middle of this one
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _write_csv(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        with replacing(self.path) as file:
            file.write(text.getvalue().encode())
        self.columns = columns


def _read_rows(path: Path, last: int | None = None) -> list[dict[str, str]]:
    """Rows up to step `last`; a line that a killed run left unfinished ends the file."""
    rows: list[dict[str, str]] = []
    if not path.exists():
        return rows
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            step = row.get("step") or ""
            if not step.isdigit() or (rows and int(step) <= int(rows[-1]["step"])) or (last is not None and int(step) > last):
                break
            rows.append(row)
    return rows


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def draw_curves(rows: list[dict[str, str]], path: Path) -> None:
    """Losses at the left, metrics at the right, over the steps."""
    from matplotlib.figure import Figure

    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, text in row.items():
            if key != "step" and text:
                series.setdefault(key, []).append((int(row["step"]), float(text)))
    figure = Figure(figsize=(11, 4), layout="constrained")
    losses, metrics = figure.subplots(1, 2)
    for key, points in series.items():
        steps, values = zip(*points, strict=True)
        if key.startswith("loss"):
            losses.plot(steps, values, label=key, linewidth=2 if key == "loss" else 1)
    # The first few metrics (those of single classes come last), without those that say "nothing to measure" (-1).
    shown = [key for key in series if key.startswith("val/") and max(v for _, v in series[key]) >= 0]
    for key in shown[:6]:
        steps, values = zip(*series[key], strict=True)
        metrics.plot(steps, values, label=key.removeprefix("val/"), marker="o", markersize=3)
    for axis, title in ((losses, "training loss"), (metrics, "validation")):
        axis.set(title=title, xlabel="optimiser step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def summary(task: str, config: Mapping[str, Any], steps: int, seconds: float, metrics: Mapping[str, float]) -> dict[str, Any]:
    """The content of `summary.json`; `metrics` are those of the best checkpoint."""
    return {"task": task, "config": dict(config), "steps": steps, "seconds": round(seconds, 1), "metrics": dict(metrics)}
