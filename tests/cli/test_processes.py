"""Several processes: each image is judged once, whoever saw it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import TINY, Call

from queryvision.config import load_config
from queryvision.splits import evaluate_model

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


@pytest.mark.parametrize(("methods", "share"), [({"state": dict, "merge": list}, (1, 2)), ({}, (0, 1))])
def test_only_what_can_be_merged_is_shared(
    methods: dict[str, Any], share: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each process looks at every image."""
    seen: list[Any] = []
    monkeypatch.setattr("queryvision.splits.evaluation_loader", lambda *given: seen.append(given))
    monkeypatch.setattr("queryvision.splits.evaluate", lambda *_: {})
    judge = SimpleNamespace(records=[], add=None, compute=None, **methods)
    task: Any = SimpleNamespace(evaluator=lambda *_: judge, needs=())
    data: Any = SimpleNamespace(ground_truth=dict, classes=())
    second: Any = SimpleNamespace(process_index=1, num_processes=2)
    none: Any = None
    config = load_config("detection", None, {"data.image_size": 64})
    assert evaluate_model(none, task, none, data, config, second) == ({}, judge)
    assert seen[0][-2:] == share
