"""How time and memory of a training step grow with queries, image size and objects.

    python scripts/benchmark_growth.py [--rounds 5] [--csv docs/growth.csv] [--plot docs/growth.png] [--plot-only]

A D-FINE-S, batches of 2, each figure in a process of its own: median of so many steps after one that is not measured, and the
peak of resident memory above what the libraries took. One thing varies at a time around 300 queries, 480x640 pixels, 8 objects.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from benchmark_step import resident
from step_models import CLASSES, images_of, random_targets, update

from queryvision.allocation import tune_allocation
from queryvision.criterion import Criterion
from queryvision.tasks.detection import dfine_s

USUAL = {"queries": 300, "side": 480, "objects": 8}
VARIED = {"queries": (100, 300, 900), "side": (240, 480, 720, 960), "objects": (1, 8, 32, 128)}
SHOWN = {"queries": "queries", "side": "short side of the image, px (4:3)", "objects": "objects an image"}


def child(queries: int, side: int, objects: int, rounds: int) -> None:
    """Prints milliseconds and MB."""
    libraries = resident("VmRSS")
    torch.manual_seed(0)
    model = dfine_s(CLASSES, frozen_norm=True, num_queries=queries).train()
    criterion = Criterion(model.heads.heads(), model.steering)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    pixels, targets = torch.randn(2, 3, side, side * 4 // 3), random_targets(2, objects)
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        criterion(model(images_of(pixels), targets), targets).total.backward()
        update(model, optimizer)
        times.append(1000 * (time.perf_counter() - began))
    print(statistics.median(times[1:]), resident("VmHWM") - libraries)


def measure(path: Path, rounds: int) -> None:
    """Writes the table, the usual setting measured once."""
    settings = {tuple({**USUAL, what: value}.items()) for what, values in VARIED.items() for value in values}
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*USUAL, "ms", "mb"])
        for setting in sorted(settings):
            numbers = [str(value) for _, value in setting]
            run = [sys.executable, __file__, "--child", *numbers, "--rounds", str(rounds)]
            ms, mb = subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()[-2:]
            row = [*numbers, f"{float(ms):.0f}", f"{float(mb):.0f}"]
            table.writerow(row)
            print("  ".join(f"{name} {value}" for name, value in zip((*USUAL, "ms", "MB"), row, strict=True)), flush=True)


def plot(table: Path, picture: Path) -> None:
    """Three panels, time and memory in each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(table.read_text().splitlines())]
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.4))
    for panel, what in zip(panels, VARIED, strict=True):
        mine = sorted((r for r in rows if all(r[o] == v for o, v in USUAL.items() if o != what)), key=lambda r: r[what])
        across = [row[what] for row in mine]
        panel.plot(across, [row["ms"] for row in mine], "o-", color="tab:blue", label="ms a step")
        other = panel.twinx()
        other.plot(across, [row["mb"] for row in mine], "s--", color="tab:orange", label="MB at the peak")
        panel.set_xlabel(SHOWN[what])
        for axes, unit in ((panel, "ms"), (other, "mb")):
            axes.set_ylim(0, 1.1 * max(row[unit] for row in mine))
    panels[0].set_ylabel("ms a step", color="tab:blue")
    other.set_ylabel("MB at the peak", color="tab:orange")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Measures, then draws."""
    tune_allocation()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=Path("growth.csv"))
    parser.add_argument("--plot", type=Path, default=Path("growth.png"))
    parser.add_argument("--plot-only", action="store_true")
    parser.add_argument("--child", type=int, nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child, given.rounds)
        return
    if not given.plot_only:
        measure(given.csv, given.rounds)
    plot(given.csv, given.plot)


if __name__ == "__main__":
    main()
