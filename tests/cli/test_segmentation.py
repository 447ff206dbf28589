"""Instance and panoptic segmentation from the command line: training, measuring, predicting."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import Call

import queryvision
from queryvision.data.coco import open_dataset

SMALL = [
    "model.backbone=resnet18", "model.width=32", "model.ffn_width=32", "model.encoder_layers=1", "model.decoder_layers=2",
    "model.num_queries=12", "model.denoising=6", "heads.masks.points=64", "evaluation.pictures=2", "data.workers=0",
]  # fmt: skip
NAMES = {
    "instance": {"AP", "AP50", "box_AP", "box_AP50", "AP/ball"},
    "panoptic": {"PQ", "SQ", "RQ", "PQ_th", "PQ_st", "mIoU", "PQ/ball"},
}


def trained(task: str, scenes: Path, output: Path, **more: object) -> Path:
    return queryvision.train(
        task, "default", data=scenes, image_size=64, batch_size=2, steps=6, weights="none", output=output,
        settings=[*SMALL, "train.save_every=3", *(["heads.masks.least=0"] if task == "panoptic" else [])], **more,
    )  # fmt: skip


@pytest.mark.parametrize("task", NAMES)
def test_from_training_to_pictures(task: str, scenes: Path, tmp_path: Path, call: Call) -> None:
    folder = trained(task, scenes, tmp_path / "runs")
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert NAMES[task] <= set(metrics)
    assert (folder / "predictions.png").stat().st_size > 0
    done = call("eval", folder / "best.pt", "--json", "--save-json", tmp_path / "results.json")
    assert done.code == 0, done
    again = json.loads(done.out)
    assert {key: again[key] for key in NAMES[task]} == pytest.approx({key: metrics[key] for key in NAMES[task]}, abs=1e-9)
    done = call("predict", folder / "best.pt", scenes / "images", "--output", tmp_path / "out", "--threshold", "0.02")
    assert done.code == 0, done
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 18
    if task == "instance":
        row = next(iter(json.loads((tmp_path / "results.json").read_text())))
        assert set(row["segmentation"]) == {"size", "counts"}
    else:
        assert len(list((tmp_path / "out" / "panoptic").glob("*.png"))) == 18


def test_written_maps_score_the_same_under_panopticapi_alone(scenes: Path, tmp_path: Path, call: Call) -> None:
    from panopticapi.evaluation import pq_compute

    folder = trained("panoptic", scenes, tmp_path / "runs")
    done = call("eval", folder / "best.pt", "--json", "--save-json", tmp_path / "found.json")
    assert done.code == 0, done
    found = json.loads(done.out)
    truth = scenes / "annotations" / "panoptic_val.json"
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = pq_compute(str(truth), str(tmp_path / "found.json"), str(scenes / "panoptic_val"), str(tmp_path / "found"))
    for mine, group in (("PQ", "All"), ("PQ_th", "Things"), ("PQ_st", "Stuff")):
        assert found[mine] == pytest.approx(theirs[group]["pq"], abs=1e-12)


def test_a_result_does_not_depend_on_its_neighbours(scenes: Path, tmp_path: Path) -> None:
    model = queryvision.load(trained("instance", scenes, tmp_path / "runs") / "best.pt")
    pictures = sorted((scenes / "images").glob("*.png"))[:4]
    together = model.predict(pictures, threshold=0.0)
    for picture, result in zip(pictures, together, strict=True):
        alone = model.predict(picture, threshold=0.0)
        assert alone.masks.shape == (len(alone), *np.asarray(Image.open(picture)).shape[:2])
        torch.testing.assert_close(alone.scores, result.scores, atol=1e-5, rtol=1e-4)


def test_panoptic_without_a_panoptic_file_is_one_clear_line(tmp_path: Path, scenes: Path, call: Call) -> None:
    for file in (scenes / "annotations").glob("panoptic_*.json"):
        file.unlink()
    done = call("train", "--task", "panoptic", "--data", scenes, "--steps", "1", "--output", tmp_path / "runs")
    assert done.code == 2 and len(done.err.splitlines()) == 1 and "panoptic_train.json" in done.err, done


@pytest.mark.parametrize(
    ("name", "task"), [("camvid", "panoptic"), ("coco", "panoptic"), ("coco", "instance"), ("penn_fudan", "instance")]
)
def test_real_data_trains_and_is_measured(name: str, task: str, real_data, tmp_path: Path) -> None:
    folder = queryvision.train(
        task, data=str(real_data(name)), steps=2, batch_size=2, image_size=96, output=str(tmp_path), weights="none",
        settings=["heads.masks.points=64", "data.limit=6", "evaluation.pictures=1"],
    )  # fmt: skip
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert all(np.isfinite(value) for value in metrics.values())
    if name == "camvid":
        assert metrics["PQ_th"] == -1 and metrics["PQ_st"] >= 0 and metrics["mIoU"] >= 0
    assert open_dataset(real_data(name), "val", source="panoptic" if task == "panoptic" else "instances").max_objects > 0
