"""Joint tasks from the command line: one model for two annotation files, from training to pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_posing import SMALL
from tiny import Call

import queryvision
from queryvision.assembly import build_model, load_model
from queryvision.config import load_config
from queryvision.data.scene_sprites import KEYPOINTS
from queryvision.errors import ConfigError
from queryvision.registry import resolve_task

TASK = "instance+keypoints"


@pytest.fixture(scope="module")
def joint(drawn_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return queryvision.train(
        TASK, "default", data=drawn_once, image_size=64, batch_size=2, steps=4, weights="none",
        output=tmp_path_factory.mktemp("joint"), settings=SMALL,
    )  # fmt: skip


def test_metrics_of_all_tasks_and_their_mean(joint: Path, call: Call) -> None:
    metrics = json.loads((joint / "summary.json").read_text())["metrics"]
    assert {"mean", "instance/AP", "instance/box_AP", "keypoints/AP", "keypoints/AP50", "instance/AP/ball"} <= set(metrics)
    assert metrics["mean"] == pytest.approx((metrics["instance/AP"] + metrics["keypoints/AP"]) / 2)
    done = call("eval", joint / "best.pt", "--json")
    assert done.code == 0, done
    assert json.loads(done.out) == pytest.approx(metrics, abs=1e-9)


def test_one_result_holds_what_every_task_says(joint: Path, drawn_once: Path, tmp_path: Path, call: Call) -> None:
    done = call("predict", joint / "best.pt", drawn_once / "images", "--output", tmp_path / "out", "--threshold", "0.0")
    assert done.code == 0, done
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    figures = [row for row in rows if row["category_id"] == 1]
    assert figures and all("segmentation" in row for row in rows)
    assert all(("keypoints" in row) == (row["category_id"] == 1) for row in rows)
    picture = next(path for path in (drawn_once / "images").rglob("*") if path.is_file())
    result = queryvision.load(joint / "best.pt").predict(picture, threshold=0.0)
    assert len(result.masks) == len(result.boxes) == len(result.keypoints) == len(result)
    assert result.keypoints.shape[1:] == (len(KEYPOINTS), 3)


def test_one_checkpoint_holds_one_core(joint: Path) -> None:
    found = load_model(joint / "best.pt")
    alone = {}
    for name in ("detection", "instance", "keypoints"):
        task = resolve_task(name)
        heads = {head: found.config.heads.get(head, {}) for head in task.heads}
        alone[name] = build_model(found.config.model_copy(update={"task": name, "heads": heads}), task, found.classes)
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in alone.items()}
    shared = set(alone["detection"].state_dict())
    assert {*alone["instance"].state_dict(), *alone["keypoints"].state_dict()} == set(found.model.state_dict()) > shared
    together = sum(p.numel() for p in found.model.parameters())
    assert together == sizes["instance"] + sizes["keypoints"] - sizes["detection"]


def test_a_union_without_a_preset_takes_those_of_its_parts() -> None:
    config = load_config("detection+keypoints")
    alone = load_config("detection")
    assert config.task == "detection+keypoints" and config.model == alone.model and config.train == alone.train
    assert config.heads == {**load_config("keypoints").heads, **alone.heads}


def test_the_order_of_tasks_does_not_matter() -> None:
    assert load_config("keypoints+instance") == load_config(TASK)
    assert resolve_task("keypoints+instance").pick is resolve_task(TASK).pick
    with pytest.raises(ConfigError, match="'keypoints' is named twice"):
        resolve_task("keypoints+instance+keypoints")
    with pytest.raises(ConfigError, match="no task 'keypionts'; did you mean 'keypoints'"):
        resolve_task("instance+keypionts")


def test_data_view_and_trace_know_joint_tasks(drawn_once: Path, tmp_path: Path, call: Call) -> None:
    done = call("data", "view", drawn_once, "--task", TASK, "--image-size", "64", "--count", "2", "-o", tmp_path / "data.png")
    assert done.code == 0 and (tmp_path / "data.png").stat().st_size > 0


def test_segments_and_keypoints_in_one_model(drawn_once: Path, tmp_path: Path, call: Call) -> None:
    folder = queryvision.train(
        "panoptic+keypoints", data=drawn_once, image_size=64, batch_size=2, steps=2, weights="none", output=tmp_path,
        settings=["model.backbone=resnet18", "model.width=32", "model.decoder_layers=2", "heads.masks.least=0"],
    )  # fmt: skip
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert {"mean", "panoptic/PQ", "panoptic/mIoU", "keypoints/AP"} <= set(metrics)
    done = call("predict", folder / "best.pt", drawn_once / "images", "--output", tmp_path / "out", "--threshold", "0")
    assert done.code == 0, done
    assert (tmp_path / "out" / "panoptic.json").is_file()
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(("keypoints" in row) == (row["category_id"] == 1) for row in rows) and all("area" in row for row in rows)


def test_splits_with_other_keypoints_are_refused(scenes: Path, tmp_path: Path, call: Call) -> None:
    file = scenes / "annotations" / "person_keypoints_val.json"
    content = json.loads(file.read_text())
    content["categories"][0]["sigmas"][0] = 0.5
    file.write_text(json.dumps(content))
    done = call("train", "--task", TASK, "--data", scenes, "--steps", "1", "--output", tmp_path / "runs")
    assert done.code == 2 and "other keypoints" in done.err and not (tmp_path / "runs").exists()
