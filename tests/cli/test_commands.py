"""The commands that work: what they print and write, and that they are their Python twins."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import json
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from PIL import Image
from tiny import TINY, Call

import queryvision
from queryvision import cli, commands, config, describe, profiling, runs, tracing
from queryvision.assembly import resolve
from queryvision.data.check import check
from queryvision.data.classes import ClassMap
from queryvision.data.scenes import make_scenes
from queryvision.engine.checkpoint import load_checkpoint, save_checkpoint
from queryvision.errors import DataError
from queryvision.model.builders import BUILDERS
from queryvision.model.query_model import QueryModel
from queryvision.registry import resolve_task
from queryvision.results import Result
from queryvision.weights import FAMILIES, reader_of

# ---------------------------------------------------------------------------------------------------- the face
COMMANDS = {"train", "profile", "eval", "predict", "trace", "convert", "tasks", "config", "data"}
TRAIN_OPTIONS = {
    "--task", "--config", "--data", "--steps", "--epochs", "--batch-size", "--lr", "--image-size", "--weights", "--devices",
    "--precision", "--workers", "--seed", "--name", "--output", "--resume", "--strict", "--set", "--debug",
}  # fmt: skip
"""Everything else is `--set`: think twice before a flag is added, and never take one away."""
CHOICES = {"--queries", "--layers", "--overlap", "--image-size", "--debug"}
EVAL_OPTIONS = {"--data", "--split", "--json", "--save-json", "--evaluator", "--batch-size", "--workers", *CHOICES}
PREDICT_OPTIONS = {"--output", "-o", "--threshold", "--json", *CHOICES}


def options(command: Callable[..., Any]) -> dict[str, Any]:
    """{parameter: default} of a function; `...` where it must be given."""
    parameters = inspect.signature(command).parameters.values()
    return {p.name: ... if p.default is p.empty else p.default for p in parameters}


def test_the_commands_and_their_flags_are_frozen() -> None:
    group: Any = typer.main.get_command(cli.app)
    assert set(group.commands) == COMMANDS
    assert set(group.commands["data"].commands) == {"make", "check", "view"}
    for name, wanted in (("train", TRAIN_OPTIONS), ("eval", EVAL_OPTIONS), ("predict", PREDICT_OPTIONS)):
        found = {word for parameter in group.commands[name].params for word in parameter.opts if word.startswith("-")}
        assert found - {"--help"} == wanted, name
    for command in group.commands.values():
        assert command.help, f"{command.name} says nothing about itself"


def test_help_needs_no_torch() -> None:
    code = "import sys, queryvision.cli; assert not {'torch', 'numpy', 'timm'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_help(call: Call) -> None:
    for words in ((), ("--help",)):
        done = call(*words)
        assert done.code == 0 and all(name in done.out for name in COMMANDS)
    assert "--batch-size" in call("train", "--help").out


@pytest.mark.parametrize(
    ("face", "twin", "renamed"),
    [
        (cli.profile, profiling.profile, {"set_": "settings"}),
        (cli.evaluate, commands.evaluate, {"json": "quiet"}),  # printing is the command line's matter, keeping quiet is not
        (cli.predict, commands.predict, {}),
        (cli.trace, tracing.trace, {}),
        (cli.convert, commands.convert, {}),
        (cli.config, describe.describe, {"set_": "settings"}),
        (cli.data_make, make_scenes, {"output": "root"}),
        (cli.data_check, check, {}),
    ],
)
def test_every_command_has_a_python_twin(
    face: Callable[..., Any], twin: Callable[..., Any], renamed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = options(face), options(twin)
    del mine["debug"]
    mine = {renamed.get(name, name): default for name, default in mine.items()}
    if twin is check:  # the command asks a task what to check; without one both check everything
        assert mine.pop("task") is None
        mine |= {"needs": None, "source": theirs["source"]}
    if twin is describe.describe:  # without a name the command lists, and no setting is an empty list
        assert (mine["name"], mine["settings"]) == (None, None)
        mine |= {"name": ..., "settings": ()}
    if twin is profiling.profile:
        assert mine.pop("settings") is None
        mine["settings"] = ()
    if twin is make_scenes:  # None: the function's own default
        mine |= {name: theirs[name] for name in ("train", "val", "size") if mine[name] is None}
    assert mine == theirs


def test_train_has_a_python_twin() -> None:
    mine, theirs = options(cli.train), options(runs.train)
    assert set(mine) - {"set_", "debug"} == set(theirs) - {"settings"} == {*runs.FLAGS, "task", "config", "resume"}
    assert all(default in (None, False, ()) for default in theirs.values())
    assert all(default is None for name, default in mine.items() if name not in ("strict", "debug"))
    assert all(name in config.Config.model_fields or "." in name for name in runs.FLAGS.values())


def test_profile_adds_up_and_leaves_nothing(
    call: Call, drawn_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = profiling.profile(
        data=drawn_once, steps=2, batch_size=2, image_size=64, settings=["model.num_queries=15", "train.accumulate=2"]
    )
    assert list(found.parts) == [*profiling.PARTS, "rest"]
    took = {name for name, seconds in found.parts.items() if seconds > 1e-4}
    assert took >= {"data", "forward", "assignment", "loss", "backward", "optimiser", "average"}
    assert found.images == 4 and found.evaluation > 0 and found.memory > 2**20
    shares = [float(line.split()[3].rstrip("%")) for line in found.lines()[: len(found.parts)]]
    assert sum(shares) == pytest.approx(100, abs=1)
    judging = 6 * found.evaluation  # images of the validation split; the run evaluates every 200 steps
    assert found.share == pytest.approx(judging / (judging + 200 * found.step))
    done = call("profile", "--data", drawn_once, *TINY[:-2], "--steps", "1")
    assert done.code == 0 and "images/s" in done.out and "peak memory" in done.out
    assert list(tmp_path.iterdir()) == []


def test_tasks(call: Call) -> None:
    done = call("tasks")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == sorted(
        p.parent.name for p in Path(cli.__file__).parent.glob("tasks/*/task.py")
    )


# ---------------------------------------------------------------------------------------------------- configurations
def test_config_lists_what_config_takes(call: Call) -> None:
    names = [line.split()[0] for line in call("config").out.splitlines()]
    assert "detection/detr_r50_coco" in names
    assert call("config", "detection/detr_r50_coco").out == call("config", "detr_r50_coco").out


@pytest.mark.parametrize("path", config.presets(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_config_prints_what_config_reads(call: Call, tmp_path: Path, path: Path) -> None:
    name, task = path.stem, path.parent.name
    done = call("config", name, "--task", task)
    assert done.code == 0 and "# " in done.out
    (tmp_path / "printed.yaml").write_text(done.out)
    wanted = config.load_config(task, name)
    found = config.load_config(None, str(tmp_path / "printed.yaml"))
    assert found == resolve(wanted, resolve_task(task))
    assert resolve(found, resolve_task(task)) == found


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_config_explains_every_setting_of_every_builder(call: Call, build: Callable[..., Any]) -> None:
    done = call("config", "default", "--set", f"model={{name: {build.__name__}}}")
    _, _, section = done.out.partition("\nmodel:\n")
    lines = [line for line in section.split("\n\n")[0].splitlines() if line.startswith("  ")]
    assert len(lines) >= 2 and all("  # " in line for line in lines), lines


def test_config_takes_settings(call: Call) -> None:
    printed = yaml.safe_load(call("config", "detr_r50_coco", "--set", "train.lr=1e-3", "--set", "heads.boxes.giou=3").out)
    assert printed["train"]["lr"] == 1e-3 and printed["heads"]["boxes"]["giou"] == 3


# ---------------------------------------------------------------------------------------------------- eval
@pytest.fixture(scope="module")
def evaluated(trained: Path, drawn_once: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], Path]:
    """Metrics and the results file of the tiny checkpoint on its validation images."""
    file = tmp_path_factory.mktemp("eval") / "deep" / "results.json"
    metrics = queryvision.evaluate(str(trained / "best.pt"), str(drawn_once), save_json=str(file), evaluator="hotcoco")
    assert max(metrics.values()) > 0, "nothing found, so nothing is compared below"
    return metrics, file


def test_eval_prints_the_metrics(call: Call, trained: Path, evaluated: tuple[dict[str, float], Path]) -> None:
    done = call("eval", trained / "best.pt", "--json")
    assert done.code == 0 and json.loads(done.out) == pytest.approx(evaluated[0], abs=1e-6)
    lines = dict(line.split() for line in call("eval", trained / "best.pt").out.splitlines())
    assert {name: float(value) for name, value in lines.items()} == pytest.approx(evaluated[0], abs=1e-4)


def test_both_evaluators_say_the_same(trained: Path, evaluated: tuple[dict[str, float], Path]) -> None:
    metrics = queryvision.evaluate(str(trained / "best.pt"), evaluator="pycocotools")
    assert metrics == pytest.approx(evaluated[0], abs=1e-9)


def test_saved_results_score_the_same_elsewhere(drawn_once: Path, evaluated: tuple[dict[str, float], Path]) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    metrics, file = evaluated
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(drawn_once / "annotations" / "instances_val.json"))
        scoring = COCOeval(truth, truth.loadRes(str(file)), "bbox")
        scoring.evaluate(), scoring.accumulate(), scoring.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    assert {name: metrics[name] for name in names} == pytest.approx(dict(zip(names, scoring.stats.tolist(), strict=True)))


def test_eval_counts_what_it_drops(call: Call, trained: Path, spoil: Callable[..., Path]) -> None:
    data = spoil(lambda content: content["annotations"][0]["bbox"].__setitem__(2, -1), "val")
    assert "1 of" in call("eval", trained / "best.pt", "--data", data).out
    assert json.loads(call("eval", trained / "best.pt", "--data", data, "--json").out)


# ---------------------------------------------------------------------------------------------------- predict
def test_predict_on_files_folders_and_patterns(call: Call, trained: Path, drawn_once: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "photos" / "deep", tmp_path / "other"
    folder.mkdir(parents=True), other.mkdir()
    sizes = {}
    for name, size, mode in (("a.jpg", (90, 60), "RGB"), ("b.png", (50, 70), "RGBA"), ("c.bmp", (64, 64), "L")):
        Image.new(mode, size, 120).save(folder / name)
        sizes[str(folder / name)] = size
    for name in ("a.png", "z.gif"):
        Image.new("RGB", (40, 80)).save(other / name)
    sizes[str(other / "a.png")] = (40, 80)
    one = drawn_once / "images" / "val_00000.png"
    sizes[str(one)] = Image.open(one).size
    words = (one, tmp_path / "photos", f"{other}/*.png", folder / "a.jpg", "--threshold", "0", "-o", tmp_path / "out")
    done = call("predict", trained / "best.pt", *words)
    assert done.code == 0 and "5 pictures" in done.out, done
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    about = json.loads((tmp_path / "out" / "images.json").read_text())
    assert {row["file_name"]: (row["width"], row["height"]) for row in about["images"]} == sizes
    assert len({row["drawn"] for row in about["images"]}) == 5, "pictures of the same name must not overwrite each other"
    for row in about["images"]:
        size = (row["width"], row["height"])
        assert Image.open(tmp_path / "out" / row["drawn"]).size == size
        boxes = np.array([record["bbox"] for record in records if record["image_id"] == row["id"]])
        assert len(boxes) == 12, "every query answers at threshold 0"
        assert (boxes[:, 2:] >= 0).all() and (boxes[:, :2] >= -1e-3).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= np.array(size) + 1e-3).all()
    known = {row["id"] for row in about["categories"]}
    assert all(record["category_id"] in known and 0 <= record["score"] <= 1 for record in records)


def test_predict_prints_its_results(call: Call, trained: Path, drawn_once: Path, tmp_path: Path) -> None:
    picture = drawn_once / "images" / "val_00000.png"
    done = call("predict", trained / "best.pt", picture, "--threshold", "0", "-o", tmp_path / "out", "--json")
    assert done.code == 0
    assert (
        json.loads(done.out) == json.loads((tmp_path / "out" / "results.json").read_text()) and len(json.loads(done.out)) == 12
    )


def test_predict_never_draws_over_its_source(call: Call, trained: Path, tmp_path: Path) -> None:
    Image.new("RGB", (60, 60), "green").save(tmp_path / "a.jpg")
    before = (tmp_path / "a.jpg").read_bytes()
    assert call("predict", trained / "best.pt", tmp_path / "a.jpg", "-o", tmp_path).code == 0
    assert (tmp_path / "a.jpg").read_bytes() == before and (tmp_path / "a_2.jpg").exists()


def test_public_names_stay_what_they_are() -> None:
    for name in ("trace", "train", "load", "evaluate", "predict", "convert", "Result"):
        assert callable(getattr(queryvision, name)) and getattr(queryvision, name) is getattr(queryvision, name)


def equal(a: Result, b: Result) -> None:
    assert a.size == b.size
    np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-4)
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-6)
    assert a.labels.tolist() == b.labels.tolist()


def test_a_result_depends_on_its_own_picture_alone(trained: Path, drawn_once: Path) -> None:
    model = queryvision.load(trained / "best.pt", batch_size=3)
    rng = np.random.default_rng(0)
    sizes = [(48, 64), (64, 48), (48, 64), (48, 64), (48, 64), (200, 90), (96, 128)]
    pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    together = model.predict(pictures, threshold=0)
    assert [result.size for result in together] == sizes
    for picture, result in zip(pictures, together, strict=True):
        equal(model.predict(picture, threshold=0), result)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_eval_and_predict_see_the_same(trained: Path, drawn_once: Path, tmp_path: Path, batch_size: int) -> None:
    file = tmp_path / "results.json"
    queryvision.evaluate(str(trained / "best.pt"), batch_size=batch_size, save_json=str(file), quiet=True)
    records = json.loads(file.read_text())
    model = queryvision.load(trained / "best.pt")
    for image in json.loads((drawn_once / "annotations" / "instances_val.json").read_text())["images"]:
        result = model.predict(drawn_once / "images" / image["file_name"], threshold=0)
        mine = [record for record in records if record["image_id"] == image["id"]]
        boxes = np.array([record["bbox"] for record in mine])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(boxes, result.boxes, atol=1e-4)
        np.testing.assert_allclose([record["score"] for record in mine], result.scores, atol=1e-6)
        assert [record["category_id"] for record in mine] == [result.classes.ids[i] for i in result.labels.tolist()]


def test_predict_in_python(trained: Path, drawn_once: Path) -> None:
    model = queryvision.load(trained / "best.pt")
    path = drawn_once / "images" / "val_00001.png"
    with Image.open(path) as image:
        image.load()
    result = model.predict(path, threshold=0)
    assert isinstance(result, Result) and len(result) == 12 and result.path == str(path)
    assert result.size == (image.height, image.width) and len(result.names) == 12
    assert (result.scores[:-1] >= result.scores[1:]).all(), "best first"
    for source in (str(path), image, np.asarray(image), np.asarray(image)[:, ::-1][:, ::-1]):
        equal(model.predict(source, threshold=0), result)
    several = model.predict([path, image], threshold=0)
    assert isinstance(several, list) and model.predict([]) == []
    equal(several[1], result)
    assert len(model.predict(path, threshold=1)) == 0
    for wrong in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8), Image.new("F", (8, 8))):
        with pytest.raises(DataError):
            model.predict(wrong)


def test_a_deep_picture_is_the_same_by_path_and_in_memory(trained: Path, tmp_path: Path) -> None:
    deep = (np.random.default_rng(0).random((64, 64)) * 65535).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    model = queryvision.load(trained / "best.pt")
    with Image.open(tmp_path / "deep.png") as image:
        equal(model.predict(image, threshold=0), model.predict(tmp_path / "deep.png", threshold=0))


def test_to_supervision(trained: Path, drawn_once: Path) -> None:
    pytest.importorskip("supervision")
    result = queryvision.load(trained / "best.pt").predict(drawn_once / "images" / "val_00000.png", threshold=0)
    found = result.to_supervision()
    np.testing.assert_array_equal(found.xyxy, result.boxes)
    np.testing.assert_array_equal(found.confidence, result.scores)
    np.testing.assert_array_equal(found.class_id, result.labels)
    assert found.data["class_name"].tolist() == result.names


# ---------------------------------------------------------------------------------------------------- choices at run time
def iou(a: np.ndarray, b: np.ndarray) -> float:
    width, height = (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return float(width * height / (sum(areas) - width * height))


def kept_by_hand(result: Result, most: float) -> list[int]:
    kept: list[int] = []
    boxes = result.boxes.double().numpy()
    for index in range(len(result)):  # best first
        if all(iou(boxes[index], boxes[other]) <= most for other in kept):
            kept.append(index)
    return kept


@pytest.fixture
def crowded() -> Result:
    """Boxes that overlap a lot, of two classes, with a mask each."""
    corner, size = (
        torch.rand(40, 2, generator=(g := torch.Generator().manual_seed(0))) * 40,
        20 + 40 * torch.rand(40, 2, generator=g),
    )
    classes = ClassMap((1, 2), ("a", "b"), (True, True))
    values = {"boxes": torch.cat((corner, corner + size), 1), "masks": torch.rand(40, 5, 5, generator=g) > 0.5}
    return Result(torch.linspace(1, 0, 40), torch.arange(40) % 2, classes, (100, 100), values)


@pytest.mark.parametrize("most", [0.0, 0.3, 0.7])
def test_boxes_that_overlap_are_dropped(crowded: Result, most: float) -> None:
    kept, result = kept_by_hand(crowded, most), crowded.without_overlaps(most)
    assert 0 < len(kept) < 40 and torch.equal(result.scores, crowded.scores[kept]), "the better of two stays, and best first"
    assert torch.equal(result.labels, crowded.labels[kept]) and torch.equal(result.masks, crowded.masks[kept])
    assert torch.equal(result.boxes, crowded.boxes[kept])


def test_where_nothing_is_dropped(crowded: Result) -> None:
    twice = replace(crowded, values={name: value[[0] * 40] for name, value in crowded.values.items()})
    assert len(twice.without_overlaps(1)) == 40 and len(twice.without_overlaps(0.99)) == 1
    assert len(replace(crowded, values={}).without_overlaps(0.1)) == 40, "a result without boxes"
    assert len(crowded.above(2).without_overlaps(0.5)) == 0


def test_overlap_everywhere(call: Call, trained: Path, drawn_once: Path, tmp_path: Path) -> None:
    """`load`, `predict` and `eval` drop the same boxes, by the flag or by the checkpoint's settings."""
    picture, most = drawn_once / "images" / "val_00000.png", 0.2
    whole = queryvision.load(trained / "best.pt").predict(picture, threshold=0)
    wanted = whole.scores[kept_by_hand(whole, most)].tolist()
    assert 0 < len(wanted) < 12
    assert queryvision.load(trained / "best.pt", overlap=most).predict(picture, threshold=0).scores.tolist() == wanted
    content = load_checkpoint(trained / "best.pt")
    content["config"]["evaluation"]["overlap"] = most
    save_checkpoint(tmp_path / "strict.pt", content)
    assert queryvision.load(tmp_path / "strict.pt").predict(picture, threshold=0).scores.tolist() == wanted
    assert len(queryvision.load(tmp_path / "strict.pt", overlap=1).predict(picture, threshold=0)) == 12
    words = (trained / "best.pt", picture, "--threshold", "0", "-o", tmp_path / "out", "--json", "--overlap", most)
    scores = [record["score"] for record in json.loads(call("predict", *words).out)]
    assert scores == pytest.approx(wanted, abs=1e-6)
    (id_,) = [
        image["id"]
        for image in json.loads((drawn_once / "annotations" / "instances_val.json").read_text())["images"]
        if image["file_name"] == picture.name
    ]
    for checkpoint, flags in ((trained / "best.pt", ("--overlap", most)), (tmp_path / "strict.pt", ())):
        assert call("eval", checkpoint, *flags, "--save-json", tmp_path / "all.json").code == 0
        scores = [row["score"] for row in json.loads((tmp_path / "all.json").read_text()) if row["image_id"] == id_]
        assert scores == pytest.approx(wanted, abs=1e-6)


def test_early_exit(call: Call, trained: Path, drawn_once: Path, tmp_path: Path) -> None:
    picture = drawn_once / "images" / "val_00000.png"
    whole, early = queryvision.load(trained / "best.pt"), queryvision.load(trained / "best.pt", layers=1)
    cut = queryvision.load(trained / "best.pt")
    cut.model.decoder.layers = cut.model.decoder.layers[:1]
    found = early.predict(picture, threshold=0)
    equal(found, cut.predict(picture, threshold=0))
    assert not np.allclose(found.boxes, whole.predict(picture, threshold=0).boxes, atol=1e-3)
    words = ("--threshold", "0", "--layers", "1", "-o", tmp_path / "out", "--json")
    scores = [record["score"] for record in json.loads(call("predict", trained / "best.pt", picture, *words).out)]
    np.testing.assert_allclose(scores, found.scores, atol=1e-6)
    metrics = queryvision.evaluate(trained / "best.pt", layers=1, quiet=True)
    assert metrics == pytest.approx(json.loads(call("eval", trained / "best.pt", "--layers", "1", "--json").out))
    assert metrics != pytest.approx(queryvision.evaluate(trained / "best.pt", quiet=True))


def test_the_number_of_queries_reaches_the_model(
    call: Call, trained: Path, drawn_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(QueryModel, "set_num_queries", lambda self, count: asked.append(count))
    picture = drawn_once / "images" / "val_00000.png"
    queryvision.load(trained / "best.pt", queries=5)
    assert call("eval", trained / "best.pt", "--queries", "6").code == 0
    assert call("predict", trained / "best.pt", picture, "--queries", "7", "-o", tmp_path / "out").code == 0
    queryvision.load(trained / "best.pt")
    assert asked == [5, 6, 7]


# ---------------------------------------------------------------------------------------------------- convert
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_reader(family: str) -> None:
    if importlib.util.find_spec(FAMILIES[family]) is None:
        pytest.skip("nobody has written this reader yet")
    reader = reader_of(family)
    assert resolve_task(reader.TASK).name == reader.TASK
    assert list(inspect.signature(reader.read).parameters)[0] == "source"
    assert list(inspect.signature(reader.rename).parameters) == ["state", "heads"]


def test_convert_asks_the_reader_of_the_family(
    call: Call, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the reader says becomes a checkpoint: preset, model, classes, weights."""
    content, asked = load_checkpoint(trained / "best.pt"), []

    def read(source: str, *rest: object) -> dict[str, Any]:
        asked.append((source, *rest))
        classes = ClassMap.from_dict(content["classes"])
        state = {f"theirs.{key}": value for key, value in content["model"].items()}
        return {"state": state, "model": content["config"]["model"], "classes": classes, "config": "detr_r50_coco"}

    def rename(state: dict[str, Any], heads: dict[str, Any]) -> dict[str, Any]:
        assert set(heads) == {"labels", "boxes"}
        return {key.removeprefix("theirs."): value for key, value in state.items()}

    reader = types.SimpleNamespace(TASK="detection", read=read, rename=rename)
    monkeypatch.setitem(FAMILIES, "toy", "toy_reader")
    monkeypatch.setitem(sys.modules, "toy_reader", reader)
    done = call("convert", "theirs.pth", "--from", "toy", "-o", tmp_path / "ours.pt")
    assert done.code == 0 and "theirs.pth" in done.out and asked == [("theirs.pth",)], done
    found = load_checkpoint(tmp_path / "ours.pt")
    assert found["config"]["model"] == content["config"]["model"] and found["classes"] == content["classes"]
    assert found["config"]["name"] == "detr_r50_coco" and found["config"]["data"]["image_size"] == 800
    assert all(torch.equal(value, found["model"][name]) for name, value in content["model"].items())


# ---------------------------------------------------------------------------------------------------- data, trace
def test_data_make_check_view(call: Call, tmp_path: Path) -> None:
    made = call("data", "make", "-o", tmp_path, "--train", "2", "--val", "1", "--size", "64")
    folder = made.out.strip()
    assert made.code == 0 and Path(folder).parent == tmp_path
    checked = call("data", "check", folder)
    assert checked.code == 0 and "2 images" in checked.out and "ok" in checked.out
    shown = call("data", "view", folder, "-o", tmp_path / "new" / "sheet.png", "--count", "2", "--image-size", "64")
    assert shown.code == 0 and Image.open(tmp_path / "new" / "sheet.png").width > 64


def test_trace(call: Call) -> None:
    done = call("trace", "--config", "default", "--image", "64x96")
    assert done.code == 0 and "(1,3,64,96)" in done.out and "object queries" in done.out


def test_two_precisions_in_one_process(drawn_once: Path, tmp_path: Path) -> None:
    """Nothing of an earlier run stays; the others of this process were fp32."""
    from queryvision.config import TrainSettings
    from queryvision.engine.processes import make_accelerator

    for precision, wanted in (("fp32", "no"), ("bf16", "bf16"), ("fp32", "no")):
        assert make_accelerator(TrainSettings(precision=precision)).mixed_precision == wanted


def test_precision_auto_is_what_the_machine_computes_in(
    call: Call, drawn_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is chosen once: the run's configuration names it, and the run goes on in it on another machine."""
    from queryvision.engine.processes import BF16, native_precision

    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if flags:
        able = "avx512_bf16" in flags or "amx_tile" in flags
        assert native_precision(torch.device("cpu")) == ("bf16" if able else "fp32")
    for able, wanted in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda able=able, **given: able)
        assert native_precision(torch.device("cuda")) == wanted
    if torch.cuda.is_available():
        pytest.skip("runs would be on the GPU")
    for able, wanted in ((False, "fp32"), (True, "bf16")):
        told = ("train", "--data", drawn_once, *TINY, "--precision", "auto", "--output", tmp_path / wanted)

        def pretend(able: bool) -> None:
            for name in BF16:
                monkeypatch.setattr(torch.cpu, name, lambda: able, raising=False)

        pretend(able)
        done = call(*told, "--steps", "1")
        assert done.code == 0 and f"precision {wanted} (auto)" in done.out
        pretend(not able)
        assert call(*told, "--steps", "2", "--resume").code == 0
        (config,) = (tmp_path / wanted).rglob("config.yaml")
        assert f"precision: {wanted}\n" in config.read_text() and "steps: 2\n" in config.read_text()
