"""What two training processes must agree upon although only one of them meets it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import gather_object
from test_optimisation import NormedBackbone
from toys import detection_heads, images, make_targets, tiny_model

from queryvision.config import TrainSettings
from queryvision.criterion import Criterion
from queryvision.engine.checkpoint import load_checkpoint
from queryvision.engine.launch import launch
from queryvision.engine.processes import make_accelerator
from queryvision.engine.trainer import Trainer
from queryvision.errors import DataError
from queryvision.model.query_model import QueryModel
from queryvision.structures import Batch


def lose(folder: Path) -> None:
    """Trains a toy; the second process meets a broken image in step 2 and has no batch for step 4."""
    settings = TrainSettings(warmup=0, ema=0.9, eval_every=2, log_every=1)
    accelerator = make_accelerator(settings)
    second = accelerator.process_index == 1

    def batches(start: int) -> Iterator[Batch]:
        for number in range(start, 3 if second else 100):
            skipped = ("broken.jpg",) if second and number == 1 else ()
            yield Batch(images(seed=2 * number + second), make_targets([2, 1]), skipped)
        raise DataError("ten images are gone")

    def evaluate(model: QueryModel) -> dict[str, float]:
        first, other = gather_object([{name: value.tolist() for name, value in model.backbone.norm.named_buffers()}])
        assert first == other, "each process measures another model"
        return {"AP": 0.0}

    torch.manual_seed(0)
    model = tiny_model(detection_heads(), backbone=NormedBackbone())
    Trainer(
        model=model, criterion=Criterion(model.heads.heads()), settings=settings, steps=9, steps_per_epoch=1, batches=batches,
        evaluate=evaluate, main_metric="AP", folder=folder, header={"task": "toy", "classes": {"names": ["a"]}},
        accelerator=accelerator,
    ).fit()  # fmt: skip


def test_what_one_process_loses_costs_no_step(tmp_path: Path, capfd: Any) -> None:
    """All save, and its line is the reason; an image that it skipped is told; both measure the same model."""
    with pytest.raises(DataError, match="^ten images are gone$"):
        launch(lose, {"folder": tmp_path}, 2)
    saved = load_checkpoint(tmp_path / "last.pt")
    assert saved["step"] == 3 and saved["log"]["skipped"] == 1
    assert capfd.readouterr().out.count("skipped unreadable image: broken.jpg") == 1
