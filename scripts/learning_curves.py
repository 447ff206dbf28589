"""AP against minutes of training for DETR, Deformable DETR and DINO with the same backbone and width.

    python scripts/learning_curves.py [--model dino ...] [--minutes 5] [--seed 0] [--csv FILE] [--plot FILE]
    python scripts/learning_curves.py --model dino_mal --run runs/detection/scenes    # adds a run that is already there

Every run trains on the embedded scenes and appends its evaluations to the CSV, so that a curve can go on another day; `--plot`
draws what the CSV holds. Minutes are wall-clock minutes of training on this machine, evaluation and reading of the data set not
counted: steps times the mean time of a step. The number of steps is chosen so that a run takes about `--minutes`, by timing a
short run first. Curves of a run end with its own schedule: a longer run is another curve, not a longer one.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

import queryvision

COMMON = ["data.image_size=128", "data.augmentation=light", "train.backbone_lr=0.2", "train.warmup=50", "evaluation.pictures=0"]
SMALL = [
    "model.backbone=tf_efficientnet_lite0", "model.width=128", "model.encoder_layers=1", "model.decoder_layers=3",
    "model.num_heads=4", "model.num_queries=60", "model.ffn_width=512", "model.dropout=0.0", "model.freeze=3",
]  # fmt: skip
DEFORMABLE = ["model.name=deformable_detr", "model.num_levels=3", "heads.labels.loss=focal", "heads.labels.cost=2.0",
              "heads.labels.weight=2.0"]  # fmt: skip
MODELS = {
    "detr": ["model.name=detr", "model.stride=16", "heads.labels.loss=softmax", "heads.labels.cost=1.0"],
    "deformable": DEFORMABLE,
    "two_stage": [*DEFORMABLE, "model.refine=true", "model.two_stage=true"],
    "dino": ["model.name=dino", "model.num_levels=3", "model.denoising=40", "heads.labels.loss=focal", "heads.labels.cost=2.0"],
    "dino_mal": ["model.name=dino", "model.num_levels=3", "model.denoising=40", "heads.labels.loss=mal",
                 "heads.labels.cost=2.0"],
}  # fmt: skip
FIELDS = ("model", "seed", "threads", "steps", "step", "minutes", "AP", "AP50")


def train(model: str, seed: int, steps: int, evaluations: int, output: str) -> Path:
    """The folder of a run."""
    every = max(1, steps // evaluations)
    return queryvision.train(
        "detection",
        steps=steps,
        batch_size=8,
        lr=5e-4,
        seed=seed,
        weights="imagenet",
        output=output,
        name=f"{model}-{seed}",
        settings=[*COMMON, *SMALL, *MODELS[model], f"train.eval_every={every}"],
    )


def pace_of(folder: Path) -> tuple[float, int]:
    """Seconds a step, and the number of steps."""
    summary = json.loads((folder / "summary.json").read_text())
    return summary["seconds"] / summary["steps"], summary["steps"]


def append(model: str, folder: Path, file: Path) -> None:
    """Adds the evaluations of a run to the CSV."""
    pace, steps = pace_of(folder)
    seed = json.loads((folder / "summary.json").read_text())["config"]["train"]["seed"]
    with open(folder / "metrics.csv") as source:
        rows = [row for row in csv.DictReader(source) if row.get("val/AP")]
    new = not file.exists()
    with open(file, "a", newline="") as out:
        writer = csv.DictWriter(out, FIELDS)
        if new:
            writer.writeheader()
        for row in rows:
            at = int(row["step"])
            run_of = {"model": model, "seed": seed, "threads": torch.get_num_threads(), "steps": steps, "step": at}
            found = {"AP": f"{float(row['val/AP']):.4f}", "AP50": f"{float(row['val/AP50']):.4f}"}
            writer.writerow({**run_of, "minutes": f"{at * pace / 60:.2f}", **found})


def run(model: str, seed: int, minutes: float, file: Path) -> None:
    """Trains one model for about so many minutes and appends its curve."""
    with tempfile.TemporaryDirectory() as output:
        pace, _ = pace_of(train(model, seed, 24, 1, output))
        append(model, train(model, seed, max(24, int(minutes * 60 / pace)), 6, output), file)


def plot(file: Path, picture: Path) -> None:
    """Draws every run of the CSV, a colour a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[tuple[str, str, str], list[tuple[float, float, float]]] = defaultdict(list)
    with open(file) as source:
        for row in csv.DictReader(source):
            point = (float(row["minutes"]), float(row["AP"]), float(row["AP50"]))
            curves[row["model"], row["seed"], row["steps"]].append(point)
    models = list(dict.fromkeys(model for model, _, _ in curves))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for (model, seed, _), points in curves.items():
        colour = f"C{models.index(model)}"
        first = next(key for key in curves if key[0] == model)
        label = model if (model, seed) == first[:2] else None
        for axis, column in zip(axes, (1, 2), strict=True):
            axis.plot([p[0] for p in points], [p[column] for p in points], ".-", color=colour, label=label)
    for axis, title in zip(axes, ("AP", "AP50"), strict=True):
        axis.set(xlabel="minutes of training", title=f"{title}, held-out scenes", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="a finished run of the one --model, instead of training")
    parser.add_argument("--csv", type=Path, default=Path("docs/learning_curves.csv"))
    parser.add_argument("--plot", type=Path, default=Path("docs/learning_curves.png"))
    options = parser.parse_args()
    for model in options.model:
        if options.run:
            append(model, options.run, options.csv)
            continue
        run(model, options.seed, options.minutes, options.csv)
    plot(options.csv, options.plot)


if __name__ == "__main__":
    main()
