"""Several processes: each image is judged once, whoever saw it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import TINY, Call, wait_for_rows

from queryvision.config import load_config
from queryvision.engine.checkpoint import load_checkpoint
from queryvision.splits import Evaluation

SMALL = ("--image-size", "64", "--set", "model.num_queries=10")


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "queryvision.cli")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "queryvision.cli")


@pytest.mark.parametrize(
    ("task", "launcher", "words", "size"),
    [
        ("detection", TORCHRUN, TINY, 8),
        ("detection", ACCELERATE, SMALL, 2),
        pytest.param("panoptic+keypoints", ("queryvision.cli",), (*SMALL, "--devices", "2"), 2, marks=pytest.mark.slow),
    ],
    ids=["torchrun", "accelerate", "devices"],
)
def test_an_evaluation_of_two_processes_is_that_of_one(
    task: str, launcher: tuple[str, ...], words: tuple[str, ...], size: int, scenes: Path, tmp_path: Path, call: Call
) -> None:
    """To the last digit, also where one of them has nothing to do: images of one size fill a single batch."""
    if size == 8:
        file = scenes / "annotations" / "instances_val.json"
        content = json.loads(file.read_text())
        size_of = [(image["height"], image["width"]) for image in content["images"]]
        usual = max(size_of, key=size_of.count)
        content["images"] = [image for image, own in zip(content["images"], size_of, strict=True) if own == usual]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [each for each in content["annotations"] if each["image_id"] in kept]
        file.write_text(json.dumps(content))
        assert 1 < len(kept) <= size
    given = [
        "train", "--task", task, "--data", scenes, *words, "--batch-size", "2", "--steps", "2", "--output", tmp_path,
        "--name", "two", "--set", f"evaluation.batch_size={size}", "--set", "evaluation.pictures=0",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", *launcher, *map(str, given)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "Grad strides" not in done.stderr, done.stderr
    folder = tmp_path / task / "two"
    assert len(load_checkpoint(folder / "last.pt")["rng"]) == 2, "so many processes"
    told = json.loads((folder / "summary.json").read_text())["metrics"]
    alone = call("eval", folder / "best.pt", "--json")
    assert alone.code == 0, alone
    found = json.loads(alone.out)
    assert told == {key: found[key] for key in told} and len(told) > 5, told
    assert words is not TINY or max(told.values()) > 0, "nothing was found, so nothing was compared"


@pytest.mark.parametrize(("methods", "share"), [({"state": dict, "merge": list}, (1, 2)), ({}, (0, 1))])
def test_only_what_can_be_merged_is_shared(
    methods: dict[str, Any], share: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each process looks at every image."""
    seen: list[Any] = []
    monkeypatch.setattr("queryvision.splits.evaluation_loader", lambda *given, **_: seen.append(given) or "batches")
    monkeypatch.setattr("queryvision.splits.evaluate", lambda *_: {})
    judge = SimpleNamespace(records=[], add=None, compute=None, **methods)
    task: Any = SimpleNamespace(evaluator=lambda *_: judge, needs=())
    data: Any = SimpleNamespace(ground_truth=dict, classes=())
    second: Any = SimpleNamespace(process_index=1, num_processes=2)
    none: Any = None
    model: Any = torch.nn.Linear(1, 1)
    evaluation = Evaluation(task, none, data, load_config("detection", None, {"data.image_size": 64}), second)
    assert evaluation(model) == evaluation(model) == ({}, judge)
    assert [given[-2:] for given in seen] == [share], "one loader, whose workers stay"


START = ("--steps", "400", "--set", "evaluation.pictures=0", "--set", "train.log_every=1", "--devices", "2")


def test_a_signal_to_the_one_who_waits_ends_all_and_is_resumed_by_one(scenes: Path, tmp_path: Path, call: Call) -> None:
    """The launcher is asked to stop, the processes save; a single process goes on with what two began."""
    given = ["train", "--data", scenes, *TINY, *START, "--output", tmp_path, "--name", "two"]
    process = subprocess.Popen([sys.executable, "-m", "queryvision.cli", *map(str, given)], stdout=PIPE, stderr=PIPE, text=True)
    table = tmp_path / "detection" / "two" / "metrics.csv"
    wait_for_rows(process, table)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    last = load_checkpoint(table.with_name("last.pt"))
    step = last["step"]
    first, second = last["rng"]
    assert not torch.equal(first["torch"], second["torch"]), "each process goes on with its own random numbers"
    assert said == f"qv: SIGTERM: stopped after step {step}; go on with: qv train --resume {table.parent}\n"
    more = ("--resume", table.parent, "--devices", "1", "--steps", str(step + 2))
    assert call("train", *more).code == 0
    assert load_checkpoint(table.with_name("last.pt"))["step"] == step + 2


def test_what_one_process_meets_is_one_line(scenes: Path, tmp_path: Path) -> None:
    """Its own, without a traceback, whatever the others say about the loss of it."""
    command = [sys.executable, "-m", "queryvision.cli", "train", "--data", scenes, *TINY, *START, "--output", tmp_path / "a"]
    for image in (scenes / "images").rglob("val*"):
        image.write_bytes(b"")
    done = subprocess.run([*map(str, command), "--set", "train.eval_every=1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("qv: ") and len(done.stderr.splitlines()) == 1 and "val" in done.stderr
