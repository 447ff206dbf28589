"""A task from elsewhere: an installed package of its own is trained, measured and used, and nothing here knows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_posing import SMALL
from tiny import Call

import queryvision
from queryvision.registry import resolve_task

ELSEWHERE = Path(__file__).parents[1] / "stranger"
GUIDE = Path(__file__).parents[2] / "docs" / "adding_a_task.md"


@pytest.fixture
def counted(spoil: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Drawn scenes whose objects have a `count`: letters in the name of the class; one has none, one of train is a word."""
    monkeypatch.syspath_prepend(str(ELSEWHERE))

    def edit(content: dict[str, Any]) -> None:
        names = {row["id"]: row["name"] for row in content["categories"]}
        for row in content["annotations"]:
            row["count"] = len(names[row["category_id"]])
        content["annotations"][0].pop("count")

    return spoil(edit, "train", "val")


def test_from_training_to_pictures(counted: Path, tmp_path: Path, call: Call) -> None:
    words = ["--data", counted, "--image-size", "64", "--batch-size", "2", "--steps", "6", "--weights", "none"]
    settings = [word for key in SMALL for word in ("--set", key)]
    done = call("train", "--task", "orchard.counting", *words, "--output", tmp_path / "runs", *settings)
    assert done.code == 0, done
    folder = tmp_path / "runs" / "orchard.counting" / "counting"
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert {"right", "AP", "AP50"} <= set(metrics) and (folder / "predictions.png").stat().st_size > 0
    assert "loss/count.distance" in (folder / "metrics.csv").read_text().splitlines()[0]
    done = call("eval", folder / "best.pt", "--json")
    assert done.code == 0 and json.loads(done.out)["right"] == metrics["right"]
    done = call("predict", folder / "best.pt", counted / "images", "-o", tmp_path / "out", "--threshold", "0")
    assert done.code == 0, done
    row = json.loads((tmp_path / "out" / "results.json").read_text())[0]
    assert row["count"] >= 0 and len(row["bbox"]) == 4
    done = call("train", "--resume", folder, "--steps", "7")
    assert done.code == 0, done


def test_it_joins_ours(counted: Path, tmp_path: Path) -> None:
    """Keypoints come from a file of their own, which has no counts."""
    folder = queryvision.train(
        "orchard.counting+keypoints", data=counted, image_size=64, batch_size=2, steps=2, weights="none",
        output=tmp_path, settings=SMALL,
    )  # fmt: skip
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert {"mean", "orchard.counting/right", "orchard.counting/AP", "keypoints/AP"} <= set(metrics)


def test_its_loss_is_that_of_known_counts(counted: Path) -> None:
    import torch
    from samples import targets_of

    from queryvision.structures import Facts, Match, Round, Stage

    head = resolve_task("orchard.counting").make_heads(5, {})(8)[-1]
    found = targets_of([[0, 1]])
    found.values["count"] = torch.tensor([[3.0, 0.0]])
    found.has["count"], found.num_with["count"] = torch.tensor([[True, False]]), (1,)
    log = torch.zeros(1, 1, 2, requires_grad=True)
    round = Round("main", (Stage("layer", 0, last=True),), {"count": {"log": log}}, {}, {})
    zero = torch.tensor([0, 0])
    match = Match(zero, zero, torch.tensor([0, 1]), torch.tensor([0, 1]), 1, (2,))
    term = head.loss(round, match, found, Facts(1.0, torch.ones(2), torch.ones(2, dtype=torch.bool), None))["distance"]
    assert term.item() == pytest.approx(1.386294 - 0.05, abs=1e-5)
    assert not head.cost(round, found, None)[..., 1].any()


def test_the_guide_shows_the_same_code() -> None:
    text = GUIDE.read_text()
    for name in ("counting.py", "default.yaml"):
        assert (ELSEWHERE / "orchard" / name).read_text().strip() in text, name
    assert (ELSEWHERE / "pyproject.toml").read_text().strip() in text


def test_no_task_of_that_name(call: Call) -> None:
    done = call("train", "--task", "orchard.missing", "--steps", "1")
    assert done.code == 2 and len(done.err.strip().splitlines()) == 1 and "orchard.missing" in done.err
