"""Keypoints from the command line: training, measuring, predicting; and data whose keypoints nobody can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import Call, trainer_of

import queryvision
from queryvision.data.scene_sprites import KEYPOINTS
from queryvision.engine.run_log import RunLog

SMALL = [
    "model.backbone=resnet18", "model.width=32", "model.ffn_width=32", "model.encoder_layers=1", "model.decoder_layers=2",
    "model.num_queries=12", "model.denoising=6", "model.freeze=0", "evaluation.pictures=2", "data.workers=0",
]  # fmt: skip


def trained(scenes: Path, output: Path, *more: str) -> Path:
    return queryvision.train(
        "keypoints", "default", data=scenes, image_size=64, batch_size=2, steps=4, weights="none", output=output,
        settings=[*SMALL, *more],
    )  # fmt: skip


@pytest.mark.parametrize("grouped", [False, True])
def test_from_training_to_pictures(grouped: bool, scenes: Path, tmp_path: Path, call: Call) -> None:
    folder = trained(scenes, tmp_path / "runs", f"heads.keypoints.grouped={grouped}".lower())
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert {"AP", "AP50", "box_AP", "box_AP50"} <= set(metrics)
    assert (folder / "predictions.png").stat().st_size > 0
    done = call("eval", folder / "best.pt", "--json")
    assert done.code == 0, done
    again = json.loads(done.out)
    assert {key: again[key] for key in ("AP", "AP50", "box_AP")} == pytest.approx(
        {key: metrics[key] for key in ("AP", "AP50", "box_AP")}, abs=1e-9
    )
    done = call("predict", folder / "best.pt", scenes / "images", "--output", tmp_path / "out", "--threshold", "0")
    assert done.code == 0, done
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 18
    row = json.loads((tmp_path / "out" / "results.json").read_text())[0]
    assert len(row["keypoints"]) == 3 * len(KEYPOINTS)
    picture = sorted(path for path in (scenes / "images").rglob("*") if path.is_file())[0]
    result = queryvision.load(folder / "best.pt").predict(picture, threshold=0.0)
    assert result.keypoints.shape == (len(result), len(KEYPOINTS), 3)
    assert result.classes.skeletons[0] is not None and result.classes.skeletons[0].names == KEYPOINTS


def test_keypoints_without_a_label_do_not_even_shorten_gradients(tmp_path: Path) -> None:
    """A whole step with clipping: without `findable` all other weights become the same, bit for bit."""
    weights = []
    for findable in (0.0, 5.0):
        trainer = trainer_of("keypoints", tmp_path, "train.clip=0.1", f"heads.keypoints.findable={findable}")
        trainer.log = RunLog(tmp_path, 2, active=False)
        batches = trainer.batches(0)
        for step in range(2):
            trainer._step(step, batches)
        weights.append(trainer.state.plain.state_dict())
    changed = {name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])}
    assert changed and all(".findable." in name for name in changed)


def test_a_class_with_unknown_pairs_is_named(scenes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for file in (scenes / "annotations").glob("person_keypoints_*.json"):
        content = json.loads(file.read_text())
        content["categories"].append({"id": 99, "name": "hand", "keypoints": ["wrist", "thumb"]})
        file.write_text(json.dumps(content))
    trained(scenes, tmp_path / "runs")
    told = [line for line in capfd.readouterr().out.splitlines() if "mirrored" in line]
    assert len(told) == 1 and told[0].startswith("warning: ") and "'hand'" in told[0] and "flip_pairs" in told[0]


def test_data_without_keypoints_says_so(scenes: Path, tmp_path: Path, call: Call) -> None:
    for file in (scenes / "annotations").glob("instances_*.json"):
        (tmp_path / "data" / "annotations").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "annotations" / file.name).write_text(file.read_text())
    (tmp_path / "data" / "images").symlink_to(scenes / "images")
    done = call("train", "--task", "keypoints", "--data", tmp_path / "data", "--steps", "1", "--output", tmp_path / "runs")
    assert done.code == 2 and "keypoints" in done.err and len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
