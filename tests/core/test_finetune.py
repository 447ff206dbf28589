"""Starting from a checkpoint of ours: what is copied, which class rows follow their names, what is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import WIDTH, TinyBackbone, detection_heads, tiny_model, vary

from queryvision.data.classes import ClassMap
from queryvision.engine.checkpoint import save_checkpoint
from queryvision.errors import CheckpointError
from queryvision.head import Head
from queryvision.model.query_model import QueryModel
from queryvision.tasks.detection import BoxHead, LabelHead
from queryvision.weights import finetune
from queryvision.weights.finetune import match_classes, start_from, take_over

OLD = ("cat", "dog", "Bird", "fish")
NEW = ("fish", "ant", "bird")


class TableHead(Head):
    """Two tables with a row a class, one behind the other with a last row of its own, one that tells only yes from no."""

    name = "table"
    class_rows = (r"rows\.\d+", r"last\.(weight|bias)")

    def __init__(self, classes: int, width: int = 3) -> None:
        super().__init__()
        self.rows = nn.ParameterList([torch.zeros(classes, width), torch.zeros(classes)])
        self.last = nn.Linear(width, classes + 1)
        self.other = nn.Parameter(torch.zeros(classes, width))  # of that shape by chance: nobody said it had a row a class


def class_map(names: tuple[str, ...]) -> ClassMap:
    return ClassMap(tuple(range(1, len(names) + 1)), names, (True,) * len(names))


def model_of(names: tuple[str, ...], seed: int = 0, heads: Callable[[int], list[Head]] | None = None, **more) -> QueryModel:
    made = [LabelHead(WIDTH, len(names)), BoxHead(WIDTH)] if heads is None else heads(len(names))
    return vary(tiny_model(made, **more), seed)


def saved(folder: Path, model: QueryModel, names: tuple[str, ...], /, **more: object) -> str:
    content = {"task": "toy", "config": {"model": {"name": "detr_small"}}, "classes": class_map(names).to_dict(), "step": 7}
    save_checkpoint(folder / "old.pt", {**content, "model": model.state_dict()} | more)
    return str(folder / "old.pt")


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def rows_of(model: QueryModel) -> dict[str, Tensor]:
    """The label head's parameters with a row a class and one for no object."""
    return {name: value for name, value in model.heads["labels"].state_dict().items() if len(value) > 2}


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    if not LabelHead.class_rows:
        monkeypatch.setattr(LabelHead, "class_rows", (r"(.*\.)?(weight|bias)",))


# ---------------------------------------------------------------------------------------------------- classes
def test_classes_are_matched_by_name_then_in_other_case() -> None:
    assert match_classes(class_map(NEW), class_map(OLD)) == {0: 3, 2: 2}
    assert match_classes(class_map(("car", "CAR", "Car")), class_map(("Car", "caR"))) == {0: 1, 2: 0}
    assert match_classes(class_map(("bus", "Bus")), class_map(("Bus",))) == {1: 0}
    assert match_classes(class_map(("DOG", "cat")), class_map(("dog", "Cat"))) == {0: 0, 1: 1}


def test_rows_follow_the_class_not_its_index(tmp_path: Path) -> None:
    old, new = model_of(OLD), model_of(NEW, seed=1)
    before, source = weights(new), weights(old)
    text = start_from(new, class_map(NEW), saved(tmp_path, old, OLD))
    fresh = {f"heads.labels.{name}" for name in rows_of(new)}
    assert fresh and all(torch.equal(value, source[name]) for name, value in new.state_dict().items() if name not in fresh)
    for name, value in new.state_dict().items():
        if name in fresh:
            assert torch.equal(value[[0, 2, 3]], source[name][[3, 2, 4]]), f"{name}: fish, bird and no object"
            assert torch.equal(value[1], before[name][1]), f"{name}: 'ant' is new"
    lines = text.splitlines()
    number = len(source)
    assert lines[0] == f"weights: {number} of {number} tensors from {tmp_path / 'old.pt'} (task toy, step 7)"
    assert lines[1:] == [
        "  classes carried over by name: fish, bird",
        "  new classes: ant",
        "  classes left behind: cat, dog",
        "  not loaded: nothing",
        "  not used: nothing",
    ]


def test_as_many_classes_in_another_order_and_by_other_names() -> None:
    """The shapes agree, and still no row may go to another class."""
    other = ("fish", "cow", "dog", "cat")
    old, new = model_of(OLD), model_of(other, seed=1)
    before, source = rows_of(model_of(other, seed=1)), rows_of(old)
    taken = take_over(new, class_map(other), old.state_dict(), class_map(OLD))
    assert taken.classes == ["fish", "dog", "cat"] and taken.new == ["cow"] and taken.left == ["Bird"]
    for name, value in rows_of(new).items():
        assert torch.equal(value[[0, 2, 3, 4]], source[name][[3, 1, 0, 4]])
        assert torch.equal(value[1], before[name][1])


def test_any_head_may_have_rows_of_classes() -> None:
    def heads(classes: int) -> list[Head]:
        return [TableHead(classes)]

    old, new = model_of(OLD, heads=heads), model_of(NEW, seed=1, heads=heads)
    before, source = weights(new), weights(old)
    taken = take_over(new, class_map(NEW), source, class_map(OLD))
    found = {name.removeprefix("heads.table."): value for name, value in new.state_dict().items() if "table" in name}
    theirs = {name.removeprefix("heads.table."): value for name, value in source.items()}
    for name in ("rows.0", "rows.1", "last.weight", "last.bias"):
        assert torch.equal(found[name][[0, 2]], theirs[name][[3, 2]]), name
        assert torch.equal(found[name][1], before[f"heads.table.{name}"][1])
    assert torch.equal(found["last.bias"][3], theirs["last.bias"][4]), "the row behind the classes"
    assert taken.misfit == ["heads.table.other (4, 3) there, (3, 3) here"]
    assert taken.unused == ["heads.table.other"]


def test_rows_behind_the_classes_must_be_as_many(tmp_path: Path) -> None:
    """Softmax has a row for no object, focal none: these logits mean something else."""
    old, new = model_of(OLD), model_of(OLD, seed=1, heads=lambda n: [LabelHead(WIDTH, n, loss="focal"), BoxHead(WIDTH)])
    before = rows_of(model_of(OLD, seed=1, heads=lambda n: [LabelHead(WIDTH, n, loss="focal"), BoxHead(WIDTH)]))
    text = start_from(new, class_map(OLD), saved(tmp_path, old, OLD))
    assert before and all(torch.equal(value, before[name]) for name, value in rows_of(new).items())
    assert all(f"heads.labels.{name} (5" in text.split("of another shape: ")[1] for name in before)


def test_no_class_in_common() -> None:
    def heads(classes: int) -> list[Head]:
        return [LabelHead(WIDTH, classes, loss="focal"), BoxHead(WIDTH)]

    other = ("x", "y", "z", "w")
    new, before = model_of(other, seed=1, heads=heads), weights(model_of(other, seed=1, heads=heads))
    taken = take_over(new, class_map(other), model_of(OLD, heads=heads).state_dict(), class_map(OLD))
    assert taken.strange == [f"heads.labels.{name}" for name in rows_of(new)] and not taken.classes
    assert all(torch.equal(new.state_dict()[name], before[name]) for name in taken.strange)


# ---------------------------------------------------------------------------------------------------- other tensors
@pytest.mark.parametrize("two_stage", [False, True])
@pytest.mark.parametrize(("there", "here"), [(8, 5), (5, 8)])
def test_another_number_of_queries(two_stage: bool, there: int, here: int) -> None:
    old, new = (model_of(OLD, seed, num_queries=n, two_stage=two_stage) for seed, n in enumerate((there, here)))
    before, source = weights(new), weights(old)
    taken = take_over(new, class_map(OLD), source, class_map(OLD))
    (name,) = [name for name, value in before.items() if value.shape != source[name].shape]
    value = new.state_dict()[name]
    assert name.startswith("queries.") and torch.equal(value[:5], source[name][:5])
    assert torch.equal(value[5:], before[name][5:]), "the others stay fresh"
    assert taken.tables == [f"the first 5 rows of {name} ({there} there, {here} here)"] and not taken.misfit


def test_all_that_is_not_loaded_is_told(tmp_path: Path) -> None:
    """More layers here, another head there, and a part of another width."""

    class Wide(TinyBackbone):
        def __init__(self) -> None:
            super().__init__()
            self.conv2 = nn.Conv2d(8, 16, 4, stride=2)

    old = model_of(OLD, heads=lambda n: [LabelHead(WIDTH, n), BoxHead(WIDTH), TableHead(n)])
    new = model_of(OLD, seed=1, layers=3, backbone=Wide())
    text = start_from(new, class_map(OLD), saved(tmp_path, old, OLD))
    unwrapped = text.replace("\n    ", " ").splitlines()  # one line a kind
    kinds = dict(line.strip().split(": ", 1) for line in unwrapped)
    mine, theirs = new.state_dict(), old.state_dict()
    assert set(kinds["not loaded"].split(", ")) == mine.keys() - theirs.keys()
    assert any(name.startswith("decoder.layers.2.") for name in mine.keys() - theirs.keys())
    assert kinds["not loaded, of another shape"] == "backbone.conv2.weight (16, 8, 2, 2) there, (16, 8, 4, 4) here"
    assert set(kinds["not used"].split(", ")) == (theirs.keys() - mine.keys()) | {"backbone.conv2.weight"}
    loaded = len(mine.keys() & theirs.keys()) - 1
    assert text.startswith(f"weights: {loaded} of {len(mine)} tensors")
    assert max(map(len, text.splitlines())) < 180


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    old, average, new = model_of(OLD), model_of(OLD, seed=2), model_of(OLD, seed=1)
    start_from(new, class_map(OLD), saved(tmp_path, old, OLD, ema=average.state_dict()))
    assert all(torch.equal(value, average.state_dict()[name]) for name, value in new.state_dict().items())


# ---------------------------------------------------------------------------------------------------- what is refused
def test_another_architecture(tmp_path: Path) -> None:
    class Other(TinyBackbone):
        channels = (8,)

        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 4, stride=4), nn.Conv2d(4, 8, 2, stride=2)
            self.name = "other"

    source = saved(tmp_path, model_of(OLD), OLD)
    with pytest.raises(CheckpointError, match=r"nothing of it fits the backbone 'other'.*made with model.name=detr_small"):
        start_from(model_of(OLD, backbone=Other()), class_map(OLD), source)
    save_checkpoint(tmp_path / "empty.pt", {"classes": class_map(OLD).to_dict(), "model": {"a": torch.zeros(1)}})
    with pytest.raises(CheckpointError, match="none of its tensors fits"):
        start_from(model_of(OLD), class_map(OLD), str(tmp_path / "empty.pt"))


@pytest.mark.parametrize("change", [{"model": {"a": 1}}, {"classes": {"ids": [1]}}, {"classes": 3}])
def test_a_checkpoint_that_lacks_what_it_should_hold(tmp_path: Path, change: dict[str, object]) -> None:
    model = model_of(OLD)
    with pytest.raises(CheckpointError, match=r"old\.pt: (holds no weights|its classes are malformed)"):
        start_from(model, class_map(OLD), saved(tmp_path, model, OLD, **change))


def test_everything_else_goes_to_the_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(finetune, "load_backbone", lambda backbone, source: asked.append(source) or "backbone: yes")
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, model_of(OLD), OLD)
    Path("imagenet").write_bytes(Path("old.pt").read_bytes())  # a file of that name is not meant
    torch.save({"conv1.weight": torch.zeros(2)}, "plain.pth")
    Path("text.pth").write_text("queryvision/1")
    sources = [
        "none",
        "imagenet",
        "timm:resnet18",
        "torchvision:ResNet18_Weights.IMAGENET1K_V1",
        "plain.pth",
        "text.pth",
        "no.pt",
    ]
    for source in sources:
        assert start_from(model_of(OLD), class_map(OLD), source) == "backbone: yes"
    assert asked == sources
    assert start_from(model_of(OLD), class_map(OLD), "old.pt").startswith("weights: ") and asked == sources


def test_toy_heads_without_rows_of_classes() -> None:
    assert Head.class_rows == () and all(isinstance(head.class_rows, tuple) for head in detection_heads())
