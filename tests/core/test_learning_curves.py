"""What `scripts/compare_learning.py` reads off its runs, and how the default starts."""

from __future__ import annotations

from pathlib import Path

import compare_learning
import pytest
import torch
from compare_learning import Row, ap_after, append, read, table
from torch import nn

from queryvision.layers.conv import ConvNorm
from queryvision.tasks.detection import dfine_small

LR = 1e-3  # of the default


def run(model: str, seed: int, *ap: float) -> list[Row]:
    threads = torch.get_num_threads()
    return [
        Row(model, seed, threads, 10.0, LR, 2.5 * (i + 1) + 0.02, 100 * (i + 1), value, round(value + 0.2, 4), 14.0)
        for i, value in enumerate(ap)
    ]


def test_ap_is_read_off_between_evaluations() -> None:
    rows = run("ours", 0, 0.1, 0.3, 0.4, 0.5)
    assert ap_after(rows, 0) == 0 and ap_after(rows, 20) == 0.5
    assert ap_after(rows, 5.02) == pytest.approx(0.3)
    assert ap_after(rows, 3.77) == pytest.approx(0.2), "halfway between the first two"
    assert ap_after(rows, 1.26) == pytest.approx(0.05), "before the first one on the line from the origin"


def test_runs_come_back_from_the_file_and_are_averaged(tmp_path: Path) -> None:
    file = tmp_path / "learning.csv"
    for seed, last in ((0, 0.5), (1, 0.7)):
        append(run("ours", seed, 0.1, 0.3, 0.4, last), file)
    other = run("ours", 2, 0, 0, 0, 0)
    append([Row(**{**vars(row), "threads": row.threads + 1}) for row in other], file)
    rows = read(file)
    assert len(rows) == 12 and rows[7] == run("ours", 1, 0.1, 0.3, 0.4, 0.7)[3]
    (line,) = table(rows, 10).splitlines()[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "ours" and cells[3].startswith("59.8 \u00b1 14.") and cells[4:] == ["14.0", "2"], (
        "other threads are apart"
    )
    compare_learning.plot(rows, 10, tmp_path / "learning.png")
    assert (tmp_path / "learning.png").stat().st_size > 10_000


def test_the_default_starts_with_small_convolutions_and_even_norms() -> None:
    """Behind a batch norm only the direction of weights counts, and small ones turn faster (docs/learning.md)."""
    model = dfine_small(3, backbone="resnet18", width=64, num_queries=20)
    parts = [part for part in (model.encoder, model.neck) for part in part.modules() if isinstance(part, ConvNorm)]
    assert len(parts) > 5
    for part in parts:
        assert part.conv.weight.detach().std() == pytest.approx(0.01, rel=0.2)
    norms = [module for module in model.encoder.modules() if isinstance(module, nn.BatchNorm2d | nn.LayerNorm)]
    assert norms and all(bool((norm.weight == 1).all()) for norm in norms)
