"""`qv trace` of one preset of every task, and of those whose heads ask the classes for more than their number."""

from __future__ import annotations

import pytest
from tiny import TASKS, Call


@pytest.mark.parametrize(
    ("task", "config"),
    [*((task, "default") for task in TASKS), ("keypoints", "detr_keypoints_r50_coco"), ("keypoints", "grouppose_r50_coco")],
)
def test_trace(task: str, config: str, call: Call) -> None:
    done = call("trace", "--task", task, "--config", config, "--image", "64x96")
    assert done.code == 0, done
    shapes = {tuple(line.split()[-2:][::-1]) for line in done.out.splitlines() if line.startswith("head ")}
    points = [shape for what, shape in shapes if what == "points"]
    assert [shape.split(",")[2:] for shape in points] == ([["17", "2)"]] if "keypoints" in task else []), done.out
