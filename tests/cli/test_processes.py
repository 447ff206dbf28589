"""Several processes: each image is judged once, whoever saw it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TINY, Call

SMALL = ("--image-size", "64", "--set", "model.num_queries=10")


@pytest.mark.parametrize(
    ("task", "words", "size"),
    [("detection", TINY, 8), ("panoptic+keypoints", (*SMALL, "--batch-size", "2"), 2)],  # 8: one process has no image
)
def test_an_evaluation_of_two_processes_is_that_of_one(
    task: str, words: tuple[str, ...], size: int, scenes: Path, tmp_path: Path, call: Call
) -> None:
    """To the last digit, also where one of them has nothing to do."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "queryvision.cli"]
    given = ["train", "--task", task, "--data", scenes, *words, "--steps", "2", "--set", f"evaluation.batch_size={size}",
             "--set", "evaluation.pictures=0", "--output", tmp_path, "--name", "two"]  # fmt: skip
    done = subprocess.run([*launcher, *map(str, given)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / task / "two"
    told = json.loads((folder / "summary.json").read_text())["metrics"]
    alone = call("eval", folder / "best.pt", "--json")
    assert alone.code == 0, alone
    found = json.loads(alone.out)
    assert told == {key: found[key] for key in told} and len(told) > 5
