"""AP against minutes of training: the default configuration, and detectors of `transformers` on the same backbone.

    python scripts/compare_learning.py [--model ours dfine rtdetrv2 ...] [--seed 0 1] [--minutes 10] [--skip-done]
    python scripts/compare_learning.py --plot-only --table

Same for all: drawn scenes, image size, augmentation, batch size, the backbone with its ImageNet weights and its frozen parts,
sizes (see `learning_peers.py`, which also says what `_shipped` means), AdamW, warm-up, flat-cosine schedule, clipping, averaged
weights, held-out AP by the project's own evaluator. Models and their losses differ; ours is `queryvision.train("detection")`.

Minutes are wall-clock minutes of training on the threads that torch has, reading of batches included; building, evaluating and
saving are not. A run has `--minutes` of them and is evaluated at every quarter. A peer's schedule follows the elapsed minutes.
Ours follows its steps, whose number is chosen by timing a short run first: it may take a little more or less than `--minutes`;
the CSV has what it took, and the table what it had after the minutes named there.
Runs are comparable if nothing else kept the machine busy: `images_per_second` of a model should be the same for all seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from learning_peers import OFFSETS, PEERS, PUBLISHED_STRIDES, STRIDES, Peer

from queryvision.assembly import resolve
from queryvision.config import TrainSettings, load_config
from queryvision.data.loader import BatchPlan, evaluation_loader, train_loader
from queryvision.data.transforms import evaluation_transform, training_transform
from queryvision.engine.optimisation import AveragedWeights, lr_factor, parameter_groups
from queryvision.model.backbone import make_backbone
from queryvision.registry import resolve_task
from queryvision.runs import train
from queryvision.splits import open_splits
from queryvision.weights.sources import load_backbone

TIMED = 120  # steps of ours that are timed before its run
QUARTERS = 4  # evaluations of a run
EXTRA = ("dfine_shipped", "deformable_shipped")  # only where asked for
FINE = 1_000_000  # parts of a run that the schedule of a peer tells apart


@dataclass
class Row:
    """An evaluation; the fields are the columns of the CSV."""

    model: str
    seed: int
    threads: int
    budget: float  # minutes of training that the run was to have
    lr: float
    minutes: float  # of training until here
    step: int
    AP: float
    AP50: float
    images_per_second: float  # of training, so far (ours: of the whole run)


# ------------------------------------------------------------------------------------------------------------- ours
def run_ours(seed: int, minutes: float) -> list[Row]:
    """The default configuration, with as many steps as take so many minutes here."""
    with tempfile.TemporaryDirectory() as output:

        def timed_run(steps: int, every: int) -> tuple[Path, dict[str, Any]]:
            settings = [f"train.eval_every={every}", "evaluation.pictures=0"]
            folder = train("detection", steps=steps, seed=seed, output=output, settings=settings)
            return folder, json.loads((folder / "summary.json").read_text())

        timed = timed_run(TIMED, TIMED)[1]
        quarter = max(1, round(60 * minutes / QUARTERS / (timed["seconds"] / TIMED)))
        folder, found = timed_run(QUARTERS * quarter, quarter)
        with open(folder / "metrics.csv") as file:
            metrics = [row for row in csv.DictReader(file) if row.get("val/AP")]
    settings, pace = found["config"]["train"], found["seconds"] / found["steps"]
    speed, threads = settings["batch_size"] / pace, torch.get_num_threads()
    rows = []
    for row in metrics:
        step = int(row["step"])
        values = float(row["val/AP"]), float(row["val/AP50"])
        rows.append(Row("ours", seed, threads, minutes, settings["lr"], step * pace / 60, step, *values, speed))
    return rows


# ------------------------------------------------------------------------------------------------------------ peers
class PeerRun:
    """Trains a peer with the recipe of the default configuration.

    Args:
        name: one of `PEERS`.
        seed: of weights, order, augmentation and denoising.
        lr: learning rate; None: that of the default configuration.
    """

    def __init__(self, name: str, seed: int, lr: float | None = None) -> None:
        self.task = resolve_task("detection")
        self.config = resolve(load_config("detection", overrides={"train.seed": seed, "train.lr": lr}), self.task)
        self.name, self.settings = name, self.config.train
        self.train_data, self.val_data = open_splits(self.config, self.task)
        torch.manual_seed(seed)
        model = self.config.model
        strides = STRIDES.get(name, PUBLISHED_STRIDES)
        backbone = make_backbone(model["backbone"], strides, model["frozen_norm"], freeze=model["freeze"])
        load_backbone(backbone, self.config.weights)
        self.peer = PEERS[name](backbone, len(self.train_data.classes))
        self.optimizer, self.rates = _optimizer(self.peer, self.settings, OFFSETS.get(name, 1.0))
        self.average = AveragedWeights(self.peer, self.settings.ema, self.settings.ema_warmup)
        self.step, self.seconds, self.images = 0, 0.0, 0
        self.batches = iter(self._loader())

    def _loader(self) -> Any:
        data, images = self.config.data, self.train_data
        several = [key for key in ("mosaic", "mixup", "copy_blend") if data.model_dump().get(key)]
        if several or data.augmentation == "strong":
            raise NotImplementedError(f"augmentation {data.augmentation} {several} has phases; peers get only a plain one")
        plan = BatchPlan(images.sizes[:, 1] / images.sizes[:, 0], self.settings.batch_size, self.settings.seed)
        transform = training_transform(data.augmentation, data.side)
        return train_loader(images, transform, len(images.classes), self.task.needs, plan)

    def advance(self, part: float) -> float:
        """One step of training at `part` (0..1) of the run; returns the loss."""
        began = time.perf_counter()
        batch = next(self.batches)
        self.peer.train()
        s = self.settings
        factor = lr_factor(int(part * FINE), FINE, s.schedule, 0, s.flat, s.final, s.drop_at)
        factor *= min(1.0, (self.step + 1) / (s.warmup + 1))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        loss = self.peer.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], s.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.images = self.step + 1, self.images + len(batch.images.pixels)
        self.average.update(self.peer)
        self.seconds += time.perf_counter() - began
        return loss.item()

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics of the averaged weights."""
        settings, classes, averaged = self.config.evaluation, self.train_data.classes, cast(Peer, self.average.model)
        transform = evaluation_transform(self.config.data.side)
        loader = evaluation_loader(self.val_data, transform, len(classes), self.task.needs, settings.batch_size)
        evaluator = self.task.evaluator(self.val_data.ground_truth(), classes, settings.evaluator)
        for batch, infos in loader:
            for info, result in zip(infos, averaged.results(batch.images, classes, infos, settings.max_results), strict=True):
                evaluator.add(info.image_id, result)
        return evaluator.compute()

    def run(self, minutes: float) -> list[Row]:
        """Trains for so many minutes of training."""
        rows: list[Row] = []
        limit, losses = 60 * minutes, []
        while len(rows) < QUARTERS:
            losses.append(self.advance(min(1.0, self.seconds / limit)))
            if self.seconds < limit * (len(rows) + 1) / QUARTERS:
                continue
            found, speed = self.evaluate(), self.images / self.seconds
            print(
                f"{self.name} step {self.step}: {self.seconds / 60:.2f} minutes  loss {statistics.mean(losses):.3f}  "
                f"AP {found['AP']:.3f}  AP50 {found['AP50']:.3f}  {speed:.1f} images/s",
                flush=True,
            )
            losses = []
            run_of = self.name, self.settings.seed, torch.get_num_threads(), minutes, self.settings.lr
            rows.append(Row(*run_of, self.seconds / 60, self.step, found["AP"], found["AP50"], speed))
        return rows


def _optimizer(peer: Peer, settings: TrainSettings, offsets: float) -> tuple[torch.optim.Optimizer, list[float]]:
    """AdamW over the trained parameters, and the full learning rate of each of its groups."""
    groups = parameter_groups(
        peer,  # type: ignore[arg-type]  # of a model it asks for parameters and a backbone, which a peer has
        settings.lr,
        weight_decay=settings.weight_decay,
        backbone_lr=settings.backbone_lr,
        offsets_lr=offsets,
        norm_decay=settings.norm_decay,
    )
    rates = [group["lr"] for group in groups]
    return torch.optim.AdamW([{k: v for k, v in g.items() if k != "names"} for g in groups], fused=True), rates


# --------------------------------------------------------------------------------------------------------- the file
def read(file: Path) -> list[Row]:
    """The rows of a CSV, none if there is no file."""
    if not file.exists():
        return []
    types = {f.name: {"str": str, "int": int, "float": float}[str(f.type)] for f in fields(Row)}
    with open(file, newline="") as source:
        return [Row(**{key: types[key](text) for key, text in row.items()}) for row in csv.DictReader(source)]


def append(rows: Sequence[Row], file: Path) -> None:
    """Adds a finished run to the CSV."""
    new = not file.exists()
    with open(file, "a", newline="") as out:
        writer = csv.DictWriter(out, [f.name for f in fields(Row)])
        if new:
            writer.writeheader()
        for row in rows:
            values = {key: f"{value:.4f}" if key in ("minutes", "AP", "AP50") else value for key, value in asdict(row).items()}
            writer.writerow({**values, "images_per_second": f"{row.images_per_second:.1f}"})


def label(row: Row) -> str:
    """What a row's curve is called."""
    return row.model if row.lr == load_config("detection").train.lr else f"{row.model}, lr {row.lr:g}"


def curves(rows: Sequence[Row], minutes: float) -> dict[str, dict[int, list[Row]]]:
    """{label: {seed: its evaluations in order}} of the runs of so many minutes on as many threads as torch has."""
    found: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if (row.budget, row.threads) == (minutes, torch.get_num_threads()):
            found[label(row)][row.seed].append(row)
    return found


def ap_after(run: Sequence[Row], minutes: float) -> float:
    """AP of a run after so many minutes, between two evaluations on the line through them; its last one beyond them."""
    return float(np.interp(minutes, [0.0, *(row.minutes for row in run)], [0.0, *(row.AP for row in run)]))


def table(rows: Sequence[Row], minutes: float) -> str:
    """Markdown: AP in percent after a quarter, half and all of the minutes, mean over seeds ± standard deviation of a run."""
    quarters = (1, 2, 4)
    lines = [f"| model | {' | '.join(f'{minutes * q / QUARTERS:g} minutes' for q in quarters)} | images/s | seeds |"]
    lines.append("|---" * (len(quarters) + 3) + "|")
    for name, seeds in curves(rows, minutes).items():
        cells = []
        for quarter in quarters:
            values = [100 * ap_after(run, minutes * quarter / QUARTERS) for run in seeds.values()]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        speed = statistics.mean(run[-1].images_per_second for run in seeds.values())
        lines.append(f"| {name} | {' | '.join(cells)} | {speed:.1f} | {len(seeds)} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], minutes: float, picture: Path) -> None:
    """AP and AP50 over minutes: a colour a model, seeds thin, their mean thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for index, (name, seeds) in enumerate(curves(rows, minutes).items()):
        for axis, metric in zip(axes, ("AP", "AP50"), strict=True):
            lines = [[(0.0, 0.0), *((row.minutes, getattr(row, metric)) for row in run)] for run in seeds.values()]
            for line in lines:
                axis.plot(*zip(*line, strict=True), color=f"C{index}", linewidth=0.7, alpha=0.6)
            mean = [[statistics.mean(column) for column in zip(*points, strict=True)] for points in zip(*lines, strict=True)]
            axis.plot(*zip(*mean, strict=True), ".-", color=f"C{index}", linewidth=2.2, label=f"{name} ({len(seeds)})")
    for axis, title in zip(axes, ("AP", "AP50"), strict=True):
        axis.set(xlabel="minutes of training", title=f"{title}, held-out scenes", xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(title="model (seeds)", fontsize=8)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["ours", *PEERS]
    parser.add_argument("--model", nargs="+", choices=names, default=[name for name in names if name not in EXTRA])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, of each run; also which runs are shown")
    parser.add_argument("--lr", type=float, help="of the peers; ours has its own. Default: that of the default configuration")
    parser.add_argument("--threads", type=int, help="of torch, default: its own choice; also which runs are shown")
    parser.add_argument("--csv", type=Path, default=Path("docs/learning.csv"))
    parser.add_argument("--plot", type=Path, default=Path("docs/learning.png"))
    parser.add_argument("--skip-done", action="store_true", help="leave out what the CSV already has")
    parser.add_argument("--plot-only", action="store_true", help="train nothing")
    parser.add_argument("--table", action="store_true", help="print a markdown table")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    own = load_config("detection").train.lr
    for seed, name in [] if options.plot_only else [(s, m) for s in options.seed for m in options.model]:
        lr = own if name == "ours" or options.lr is None else options.lr
        done = {(row.model, row.seed, row.budget, row.lr, row.threads) for row in read(options.csv)}
        if options.skip_done and (name, seed, options.minutes, lr, torch.get_num_threads()) in done:
            print(f"{name}, seed {seed}: is in {options.csv}")
            continue
        append(run_ours(seed, options.minutes) if name == "ours" else PeerRun(name, seed, lr).run(options.minutes), options.csv)
    rows = read(options.csv)
    if not curves(rows, options.minutes):
        parser.error(f"{options.csv} has no run of {options.minutes:g} minutes on {torch.get_num_threads()} threads")
    plot(rows, options.minutes, options.plot)
    if options.table:
        print(table(rows, options.minutes))


if __name__ == "__main__":
    main()
