"""Bad input gets one line on stderr that says what, where and how to mend it, exit code 2, and loses nothing."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import signal
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY, Call, Run

from queryvision import config as configuration
from queryvision.data.coco import CocoDataset, open_dataset
from queryvision.engine import memory
from queryvision.engine.checkpoint import load_checkpoint
from queryvision.errors import CheckpointError
from queryvision.weights import sources

Refused = Callable[..., str]
Spoil = Callable[..., Path]
ONE_STEP = (*TINY, "--steps", "1", "--set", "evaluation.pictures=0")


def cut(image: Path) -> None:
    """Leaves half of a file."""
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])


@pytest.fixture
def train(refused: Refused, tmp_path: Path) -> Iterator[Refused]:
    """A training that is refused before it leaves anything behind."""

    def run(*words: object, says: str | tuple[str, ...], data: object = None) -> str:
        line = refused("train", "--data", data or "nowhere", *ONE_STEP, "--output", tmp_path / "out", *words, says=says)
        assert not (tmp_path / "out").exists(), "a refused run leaves no folder"
        return line

    yield run


# ---------------------------------------------------------------------------------------------------- one process
def test_a_process_of_its_own_says_one_line(tmp_path: Path, qv: Run) -> None:
    done = qv("train", "--data", tmp_path / "nowhere", *TINY, "--steps", "1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"qv: {tmp_path / 'nowhere'}: there is no such folder; give the root folder of the data set\n"


def test_debug_shows_the_traceback(call: Call) -> None:
    done = call("data", "check", "nowhere", "--debug")
    assert done.code == 2 and "Traceback" in done.err and "data/layout.py" in done.err
    assert done.err.splitlines()[-1].startswith("qv: nowhere: there is no such folder")


def test_a_bug_keeps_its_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("queryvision.data.check.check", broken)
    monkeypatch.setattr("sys.argv", ["qv", "data", "check", "nowhere"])
    from queryvision import cli

    with pytest.raises(ValueError, match="a bug"):
        cli.main()


@pytest.mark.parametrize(("command", "hint"), [("train", True), ("eval", False)])
def test_ctrl_c(call: Call, monkeypatch: pytest.MonkeyPatch, command: str, hint: bool) -> None:
    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("queryvision.runs.train", interrupted)
    monkeypatch.setattr("queryvision.commands.evaluate", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        done = call(command, *(["x.pt"] if command == "eval" else []))
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.code == 130 and len(done.err.splitlines()) == 1
    assert done.err.startswith("qv: interrupted") and ("--resume" in done.err) == hint


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train", "--stepz", "3"), "--stepz"),
        (("trian",), "'train'"),
        (("train", "--lr", "abc"), "--lr"),
        (("eval",), "checkpoint"),
        (("predict", "x.pt"), "sources"),
        (("predict", "x.pt", "y.jpg", "--threshold", "3"), "--threshold"),
        (("data",), "qv data --help"),
        (("convert", "x.pth"), "--from"),
    ],
)
def test_mistyped_commands(refused: Refused, words: tuple[str, ...], says: str) -> None:
    refused(*words, says=(says, "--help"))


# ---------------------------------------------------------------------------------------------------- data sets
def test_no_data_set(train: Refused, tmp_path: Path) -> None:
    train(data=tmp_path / "nowhere", says="there is no such folder")
    (tmp_path / "empty").mkdir()
    train(data=tmp_path / "empty", says=("empty", "annotations/instances_train.json"))
    train("--data", "", says="data.path = ''")  # an unset variable of the shell must not mean the drawn scenes


@pytest.mark.parametrize("content", ['{"a":', "[1]", '{"images": 3}', "\xff\xfe", "", '{"images": [], "annotations": []}'])
def test_a_file_that_is_not_coco(train: Refused, refused: Refused, scenes: Path, content: str) -> None:
    file = scenes / "annotations" / "instances_train.json"
    file.write_bytes(content.encode("latin-1"))
    train(data=scenes, says=str(file))
    refused("data", "check", scenes, says=str(file))


BAD = ("bbox not finite", "negative width", "unknown category", "box outside the image")


def bad_annotations(content: dict[str, Any]) -> None:
    rows = content["annotations"]
    rows[0]["bbox"][0] = float("nan")
    rows[1]["bbox"][2] = -3
    rows[2]["category_id"] = 99
    rows[3]["bbox"] = [900, 900, 5, 5]


def test_bad_annotations_are_dropped_counted_and_named(call: Call, train: Refused, spoil: Spoil, tmp_path: Path) -> None:
    data = spoil(bad_annotations)
    ids = [row["id"] for row in json.loads((data / "annotations/instances_train.json").read_text())["annotations"][:4]]
    train("--strict", data=data, says=("annotation ", "(3 more)", "qv data check"))
    checked = call("data", "check", data)
    assert checked.code == 1 and checked.err == ""
    assert all(f"annotation {id_}:" in checked.out for id_ in ids) and "4 problems" in checked.out
    cut(data / "images" / "train_00000.png")
    checked = call("data", "check", data)
    assert checked.code == 1 and "train_00000.png: cannot be read" in checked.out
    spoil(lambda content: content["annotations"].extend({**content["annotations"][9], "id": 10_000 + i} for i in range(20)))
    done = call("train", "--data", data, *TINY, "--epochs", "1", "--output", tmp_path / "out", "--set", "evaluation.pictures=0",
                "--set", "evaluation.max_results=15")  # fmt: skip
    assert done.code == 0, done
    assert "4 of" in done.out and "annotations dropped" in done.out and all(f"1 {kind}" in done.out for kind in BAD)
    assert "skipped unreadable image" in done.out and "times an image could not be read" in done.out
    objects = next(int(word) for line in done.out.splitlines() if "queries" in line for word in line.split() if word.isdigit())
    assert objects > 20 and f"model.num_queries to at least {objects}" in done.out and "only 12 queries" in done.out
    assert "only the best 15 results are kept; set evaluation.max_results" in done.out
    assert (tmp_path / "out/detection/custom/best.pt").exists()


def test_a_truncated_validation_image_loses_no_step(
    refused: Refused, call: Call, scenes: Path, trained: Path, tmp_path: Path
) -> None:
    cut(scenes / "images" / "val_00000.png")
    name = "val_00000.png: cannot be read"
    refused("train", "--data", scenes, *ONE_STEP, "--output", tmp_path / "out", says=name)
    folder = tmp_path / "out/detection/custom"
    assert load_checkpoint(folder / "last.pt")["step"] == 1 and not (folder / "best.pt").exists()
    shutil.copy(scenes / "images" / "val_00001.png", mended := tmp_path / "mended.png")
    refused("eval", trained / "best.pt", "--data", scenes, says=name)
    line = refused("predict", trained / "best.pt", scenes / "images", "-o", tmp_path / "p", says="1 of 18 pictures")
    assert "val_00000.png" in line and len(list((tmp_path / "p").glob("*.jpg"))) == 17
    assert (tmp_path / "p" / "results.json").exists()
    Image.open(mended).resize(sizes_of(scenes)["val_00000.png"]).save(scenes / "images" / "val_00000.png")
    done = call("train", "--resume", folder)
    assert done.code == 0, done.err
    assert (folder / "best.pt").exists() and "AP" in json.loads((folder / "summary.json").read_text())["metrics"]
    assert "val/AP" in (folder / "metrics.csv").read_text()


def sizes_of(scenes: Path) -> dict[str, tuple[int, int]]:
    content = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    return {row["file_name"]: (row["width"], row["height"]) for row in content["images"]}


def test_only_unreadable_images(refused: Refused, scenes: Path, tmp_path: Path) -> None:
    for image in (scenes / "images").glob("train_*"):
        image.write_bytes(b"")
    refused("train", "--data", scenes, *ONE_STEP, "--output", tmp_path / "out", says="10 images in a row cannot be read")


def test_the_fullest_image_may_be_missing(
    call: Call, refused: Refused, spoil: Spoil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--batch-size auto` tries others in its place; crowds make no image full."""
    read: list[int] = []

    def crowded(content: dict[str, Any]) -> None:
        row = content["annotations"][0]
        content["annotations"] += [{**row, "id": 10_000 + i, "iscrowd": 1} for i in range(20)]

    data = spoil(crowded)
    dataset = open_dataset(data, "train")
    fullest = np.argsort(-dataset.num_objects, kind="stable").tolist()
    dataset.path(fullest[0]).unlink()
    reading = CocoDataset.read
    monkeypatch.setattr(CocoDataset, "read", lambda self, index: read.append(index) or reading(self, index))
    monkeypatch.setattr(memory, "free_memory", lambda device: 1)
    auto = (*ONE_STEP, "--batch-size", "auto")
    done = call("train", "--data", data, *auto, "--output", tmp_path / "out")
    assert done.code == 0 and "batch size 1, as many images as fit into memory" in done.out, done
    assert read[:2] == fullest[:2]
    for image in (data / "images").glob("train_*"):
        image.write_bytes(b"")
    refused("train", "--data", data, *auto, "--output", tmp_path / "none", says="10 images in a row cannot be read")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda content: content.update(images=[], annotations=[]), "there is no image"),
        (lambda content: content.update(annotations=[]), "holds no object to learn from"),
        (lambda content: content.update(categories=[]), "there is no category"),
        (lambda content: content["categories"][0].update(name="zebra"), ("'zebra'", "'figure'", "'val'")),
        (lambda content: content["images"][0].update(width=10**12), "whole number"),
        (lambda content: content["images"][0].update(file_name="../../x.png"), "outside the data set"),
    ],
)
def test_data_sets_that_cannot_be_learned_from(
    train: Refused, spoil: Spoil, edit: Callable[[dict[str, Any]], None], says: str | tuple[str, ...]
) -> None:
    train(data=spoil(edit), says=says)


def test_no_class_in_common(refused: Refused, spoil: Spoil, trained: Path) -> None:
    def rename(content: dict[str, Any]) -> None:
        for row in content["categories"]:
            row["name"] = f"z{row['name']}"

    refused("eval", trained / "best.pt", "--data", spoil(rename, "val"), says=("zfigure", "knows none", "figure, ball"))


# ---------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("train.stepz=3", ("'train.stepz'", "did you mean 'steps'")),
        ("trin.lr=3", "did you mean 'train'"),
        ("model.wdth=3", ("'model.wdth'", "did you mean 'width'")),
        ("heads.boxes.gio=3", ("'heads.boxes.gio'", "did you mean 'giou'")),
        ("heads.box.giou=3", "did you mean 'boxes'"),
        ("train.lr=abc", "train.lr = 'abc'"),
        ("train.lr=-1", "train.lr = -1"),
        ("train.lr=.inf", "train.lr = inf"),
        ("train.steps=1.5", "train.steps = 1.5"),
        ("train", "section.key=value"),
        ("train=3", "train.steps"),
        ("train.lr.x=3", "'lr' is a setting"),
        ("train.freeze=[backbon]", ("no part 'backbon'", "did you mean 'backbone'")),
        ("train.freeze=[heads.lables]", ("did you mean 'labels'", "parts of the model: backbone, neck, encoder")),
        ("train.freeze=backbone", "train.freeze = 'backbone'"),
        ("train.freeze=[backbone, neck, encoder, queries, decoder, heads]", "nothing to train"),
        ("train.offsets_lr=0", "train.offsets_lr = 0"),
        ("train.min_steps=-1", "train.min_steps = -1"),
        ("evaluation.overlap=2", "evaluation.overlap = 2"),
        ("train.lr=[1", "not YAML"),
        ("train.epochs=3", "either train.steps or train.epochs"),
        ("name=../x", "name = '../x'"),
        ("task=detectoin", "did you mean 'detection'"),
        ("task=os.path", "holds no TASK"),
        ("task=.x", "there is no task '.x'"),
        ("model.name=dtr", "did you mean 'detr'"),
        ("data.augmentation=hevy", "'detr', 'light' or 'none'"),
        ("data.train_split=nope", "it has the splits train, val"),
        ("model.backbone=resnt18", "did you mean 'resnet18'"),
        ("model.num_heads=5", "model.width = 32: is not divisible by model.num_heads = 5"),
        ("model.num_heads=0", "model.num_heads = 0"),
        ("model.width=30", "divisible by 4"),
        ("model.stride=7", "only [4, 8, 16, 32]"),
        ("model.stride=64", "only [4, 8, 16, 32]"),
        ("model.dc5=true", "cannot be dilated"),
        ("model.decoder_layers=0", "model.decoder_layers = 0"),
        ("model.num_queries=0", "model.num_queries = 0"),
        ("model.dropout=2", "model.dropout = 2"),
        ("heads.labels.loss=foo", "'softmax', 'focal'"),
        ("train.precision=fp8", "'fp32', 'bf16', 'fp16' or 'auto'"),
    ],
)
def test_wrong_settings(train: Refused, drawn_once: Path, setting: str, says: str | tuple[str, ...]) -> None:
    line = train("--set", setting, data=drawn_once, says=says)
    assert len(line) < 600, "a line that one can read"


def test_a_level_that_a_timm_backbone_lacks(train: Refused, drawn_once: Path) -> None:
    words = ("--set", "model.backbone=tf_efficientnet_lite0", "--set", "model.stride=7")
    train(*words, data=drawn_once, says="only [2, 4, 8, 16, 32]")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--epochs", "1"), "either train.steps or train.epochs"),
        (("--steps", "0"), "train.steps = 0"),
        (("--lr", "-1"), "train.lr = -1"),
        (("--task", "detectoin"), "did you mean 'detection'"),
        (("--config", "detr_r50_coc"), "did you mean 'detr_r50_coco'"),
        (("--config", "nowhere.yaml"), "no configuration file nowhere.yaml"),
    ],
)
def test_wrong_flags(train: Refused, drawn_once: Path, words: tuple[str, ...], says: str) -> None:
    train(*words, data=drawn_once, says=says)


def test_devices_must_agree_with_the_launcher(train: Refused, drawn_once: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    train("--devices", "2", data=drawn_once, says=("train.devices = 2", "4 processes"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_half_precision_needs_a_gpu(train: Refused, drawn_once: Path) -> None:
    train("--precision", "fp16", data=drawn_once, says="bf16")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train:\n  stepz: 3\n", "'train.stepz'; did you mean 'steps'"),
        ("train: 3\n", "train = 3: a section"),
        ("train:\n", "train = None: a section"),
        ("train:\n\tsteps: 3\n", ("line 2, column 1", "spaces")),
        ("train:\n  steps: 3\n  steps: 4\n", ("line 3", "'steps' occurs twice")),
        ("{a", "line 1"),
        ("- a", "list"),
        ("", "mapping"),
        ("model: detr\n", "model = 'detr'"),
        ("3: 4\n", "strings"),
        ("task: 3\n", "task = 3"),
        ("\xff\xfe", "utf-8"),
    ],
)
def test_wrong_files(train: Refused, tmp_path: Path, text: str, says: str | tuple[str, ...]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(text.encode("latin-1"))
    line = train("--config", file, says=says)
    assert line.startswith(f"qv: {file}: ")


def test_a_name_that_two_tasks_have(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in ("a", "b"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "same.yaml").write_text("train:\n  steps: 1\n")
    monkeypatch.setattr(configuration, "PRESETS", tmp_path)
    refused("train", "--config", "same", says=("a/same, b/same", "--task"))


def test_trace(refused: Refused) -> None:
    refused("trace", "--image", "800", says=("--image 800", "800x600"))
    refused("trace", "--config", "nowhere", says="there is no configuration 'nowhere'")


# ---------------------------------------------------------------------------------------------------- weights
@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, nothing cached, and a download that was begun all the same fails the test."""

    def nowhere(*_: object, **__: object) -> None:
        raise URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "urlopen", nowhere)
    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("begun a download without network"))
    monkeypatch.setattr(sources.timm, "create_model", lambda *_, **__: pytest.fail("begun a download without network"))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere.pth", ("'nowhere.pth': there is no such file", "imagenet, torchvision:NAME")),
        ("imagnet", "Valid: none, imagenet"),
        ("", "weights = ''"),
        (".", "is a folder"),
        ("imagenet", ("cannot be fetched (Name or service not known)", "--weights none")),
        ("torchvision:ResNet18_Weights.IMAGENET1K_V1", ("cannot be fetched (Name", "path")),
        ("torchvision:Nope.V1", "'torchvision:Nope.V1': torchvision knows no weights"),
        ("timm:resnet18", "cannot be fetched (Name"),
        ("timm:resnet_18", "did you mean 'resnet"),
        ("https://example.invalid/x.pth", "https://example.invalid/x.pth: cannot be fetched (Name"),
        ("https://example.invalid/", "names no file"),
        ("https://[/x.pth", "https://[/x.pth"),
    ],
)
@pytest.mark.usefixtures("offline")
def test_weights_that_are_not_there(train: Refused, drawn_once: Path, source: str, says: str | tuple[str, ...]) -> None:
    train("--weights", source, data=drawn_once, says=says)


def test_downloads_are_told_apart_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the same name from two folders, a hash in the name, and a date that looks like one."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    content = tmp_path / "web"
    for folder in ("a", "b"):
        (content / folder).mkdir(parents=True)
        for name in ("model.bin", "model-20240115.bin"):
            (content / folder / name).write_bytes(folder.encode())
    digest = hashlib.sha256(b"a").hexdigest()[:8]
    (content / f"good-{digest}.bin").write_bytes(b"a")
    (content / f"bad-{digest}.bin").write_bytes(b"b")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(content))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_port}"
        for name in ("model.bin", "model-20240115.bin"):
            assert [sources.fetch(f"{web}/{folder}/{name}").read_bytes() for folder in ("a", "b")] == [b"a", b"b"]
        assert sources.fetch(f"{web}/good-{digest}.bin").read_bytes() == b"a"
        with pytest.raises(CheckpointError, match="invalid hash value"):
            sources.fetch(f"{web}/bad-{digest}.bin")
        server.shutdown()


def test_weights_of_something_else(train: Refused, drawn_once: Path, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    for content, says in (
        ({"a": torch.zeros(2)}, "lack 100 tensors of backbone 'resnet18'"),
        ([1], "no plain state dict"),
        ({"model": [torch.zeros(1)]}, "no plain state dict"),
    ):
        torch.save(content, file)
        train("--weights", file, data=drawn_once, says=says)
    file.write_text("hello")
    train("--weights", file, data=drawn_once, says=f"{file}: is no checkpoint or is damaged")
    words = ("--weights", trained / "best.pt", "--set", "model.backbone=tf_efficientnet_lite0", "--set", "model.stride=16")
    says = ("best.pt: nothing of it fits the backbone 'tf_efficientnet_lite0'", "model.name=detr, model.backbone=resnet18")
    train(*words, data=drawn_once, says=says)
    file.write_bytes(overwritten((trained / "best.pt").read_bytes()))
    train("--weights", file, data=drawn_once, says=f"{file}: is damaged, a checksum does not match")


def test_a_server_that_has_nothing_or_never_answers(
    train: Refused, drawn_once: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "TIMEOUT", 0.3)
    monkeypatch.setattr(http.server.BaseHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        train("--weights", f"http://127.0.0.1:{server.server_port}/x.pth", data=drawn_once, says="501")
        server.shutdown()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        train("--weights", f"http://127.0.0.1:{silent.getsockname()[1]}/x.pth", data=drawn_once, says="timed out")
    assert not list((tmp_path / "cache").rglob("*.pth"))


# ---------------------------------------------------------------------------------------------------- checkpoints
class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "b")
    return buffer.getvalue()


def overwritten(whole: bytes) -> bytes:
    """Some bytes in the middle are zero, as after a bad copy; PyTorch alone would not notice."""
    return whole[: len(whole) // 2] + bytes(4096) + whole[len(whole) // 2 + 4096 :]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda whole: b"", "is an empty file"),
        (lambda whole: bytes(range(256)) * 20, "is no checkpoint or is damaged"),
        (lambda whole: b"hello", "is no checkpoint or is damaged"),
        (lambda whole: zipped(), "is no checkpoint or is damaged"),
        (lambda whole: whole[: len(whole) // 2], "is no checkpoint or is damaged"),
        (overwritten, "a checksum does not match"),
        (lambda whole: saved({"weight": torch.zeros(2)}), ("['weight']", "qv convert")),
        (lambda whole: saved([1]), "list"),
        (lambda whole: saved({"format": "queryvision/1"}), "lacks classes, config, model, task"),
    ],
)
def test_a_checkpoint_of_something_else(
    refused: Refused, trained: Path, tmp_path: Path, make: Callable[[bytes], bytes], says: str | tuple[str, ...]
) -> None:
    file = tmp_path / "x.pt"
    file.write_bytes(make((trained / "best.pt").read_bytes()))
    for command in (("eval", file), ("predict", file, tmp_path), ("convert", file, "--from", "detr", "-o", tmp_path / "y.pt")):
        refused(
            *command, says=str(file) if command[0] == "convert" else (str(file), *([says] if isinstance(says, str) else says))
        )
    assert not (tmp_path / "y.pt").exists()


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_checkpoint_that_would_run_code(refused: Refused, tmp_path: Path, how: str) -> None:
    file, trace = tmp_path / "x.pt", tmp_path / "ran"
    content = {"model": Evil(trace)}
    file.write_bytes(pickle.dumps(content, protocol=2) if how == "pickle" else saved(content))
    refused("eval", file, says=("refused" if how == "torch" else "x.pt"))
    assert not trace.exists()


def test_checkpoints_that_do_not_fit_their_settings(refused: Refused, trained: Path, tmp_path: Path) -> None:
    content, file = load_checkpoint(trained / "best.pt"), tmp_path / "x.pt"
    settings = content["config"]
    for change, says in (
        ({"model": {}}, "is missing"),
        ({"model": [1]}, "holds no weights"),
        ({"task": "nope"}, "there is no task 'nope'"),
        ({"classes": {"ids": [1]}}, "classes are malformed"),
        ({"config": {**settings, "zzz": 1}}, "there is no setting 'zzz'"),
        (
            {"config": {**settings, "model": {**settings["model"], "width": 64}}},
            ("is (32, 512, 1, 1)", "make it (64, 512, 1, 1)"),
        ),
    ):
        torch.save({**content, **change}, file)
        refused("eval", file, says=says)
    refused("eval", tmp_path / "nowhere.pt", says="there is no checkpoint")
    refused("eval", tmp_path, says="is a folder")


# ---------------------------------------------------------------------------------------------------- eval, predict, convert
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--split", "nope"), "it has the splits train, val"),
        (("--data", ""), "data.path = ''"),
        (("--evaluator", "x"), "'hotcoco' or 'pycocotools'"),
        (("--image-size", "0"), "data.image_size = 0"),
        (("--batch-size", "0"), "evaluation.batch_size = 0"),
        (("--workers", "-1"), "data.workers = -1"),
        (("--save-json", "."), "is a folder"),
        (("--queries", "5"), "queries = 5: this model's 12 queries are learned one by one"),
        (("--layers", "0"), "layers = 0: must be at least 1 and at most 2"),
        (("--layers", "3"), "layers = 3"),
        (("--overlap", "1.5"), "evaluation.overlap = 1.5"),
    ],
)
def test_eval(refused: Refused, trained: Path, words: tuple[str, ...], says: str) -> None:
    refused("eval", trained / "best.pt", *words, says=says)


def test_results_that_cannot_be_written_are_told_before_the_work(
    refused: Refused, trained: Path, drawn_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("queryvision.commands.Evaluation", lambda *_, **__: pytest.fail("worked in vain"))
    monkeypatch.setattr("queryvision.inference.predictor.Predictor.predict", lambda *_, **__: pytest.fail("worked in vain"))
    (tmp_path / "file").write_text("here")
    inside, picture = tmp_path / "file" / "x.json", drawn_once / "images" / "val_00000.png"
    refused("eval", trained / "best.pt", "--save-json", inside, says="cannot write")
    refused("predict", trained / "best.pt", picture, "-o", tmp_path / "file", says="cannot write")
    refused("data", "view", drawn_once, "-o", inside, says="cannot write")
    refused("train", "--data", drawn_once, *ONE_STEP, "--output", tmp_path / "file", says="cannot write")
    assert (tmp_path / "file").read_text() == "here"


def test_predict(refused: Refused, trained: Path, drawn_once: Path, tmp_path: Path, call: Call) -> None:
    checkpoint, out = trained / "best.pt", tmp_path / "p"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("hello")
    picture = drawn_once / "images" / "val_00000.png"
    refused("predict", checkpoint, tmp_path / "nowhere.jpg", "-o", out, says="nowhere.jpg: no such file")
    refused("predict", checkpoint, tmp_path / "empty", "-o", out, says=("empty", ".jpg"))
    refused("predict", checkpoint, tmp_path / "*.gif", "-o", out, says="*.gif")
    refused("predict", checkpoint, picture, "-o", out, "--image-size", "0", says="data.image_size = 0")
    refused("predict", checkpoint, picture, "-o", out, "--overlap", "-1", says="evaluation.overlap = -1")
    refused("predict", checkpoint, picture, "-o", out, "--layers", "9", says="layers = 9")
    refused("predict", checkpoint, picture, "-o", out, "--queries", "9", says="queries = 9")
    assert not out.exists()
    refused("predict", checkpoint, tmp_path / "text.jpg", picture, "-o", out, says="1 of 2 pictures cannot be read")
    assert [path.name for path in out.glob("*.jpg")] == ["val_00000.jpg"]
    assert json.loads(call("predict", checkpoint, tmp_path / "text.jpg", picture, "-o", out, "--json").out) is not None


def test_convert(refused: Refused, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "y.pt"
    refused("convert", trained / "best.pt", "--from", "detr", "-o", output, says="no box checkpoint of facebookresearch/detr")
    refused(
        "convert",
        trained / "best.pt",
        "--from",
        "detrr",
        "-o",
        output,
        says=("--from detrr", "did you mean 'detr'", "deformable-detr, detr, dfine, dino, mask2former, maskdino, rtdetrv2"),
    )
    refused("convert", "x.pth", "--from", "dino", "--dc5", "-o", output, says="checkpoints of --from dino are never dilated")
    refused("convert", tmp_path / "nowhere.pth", "--from", "detr", "-o", output, says="there is no checkpoint")
    keys = ("class_embed.weight", "query_embed.weight", "transformer.decoder.norm.weight", "backbone.0.body.conv1.weight")
    torch.save({"model": {key: torch.zeros(3, 3) for key in keys}}, tmp_path / "fake.pth")
    refused("convert", tmp_path / "fake.pth", "--from", "detr", "-o", output, says="does not fit the model")
    assert not output.exists()


# ---------------------------------------------------------------------------------------------------- going on
def test_resume_without_a_run(refused: Refused, run_copy: Path, tmp_path: Path) -> None:
    words = ("train", *ONE_STEP, "--output", tmp_path / "runs")
    refused(*words, "--name", "other", "--resume", says="there is no run")
    refused("train", "--resume", tmp_path / "nowhere", says="there is no run here")
    refused("train", "--resume", run_copy / "best.pt", says="only last.pt")
    refused("train", "--resume", run_copy, "--config", "default", says="leave out --config")


def test_a_run_that_saved_nothing_starts_over_in_its_folder(call: Call, run_copy: Path) -> None:
    (run_copy / "last.pt").unlink()
    done = call("train", "--resume", run_copy)
    assert done.code == 0 and "saved nothing yet" in done.out
    assert (run_copy / "last.pt").is_file()


def test_resume_from_a_damaged_checkpoint(refused: Refused, run_copy: Path) -> None:
    whole = (run_copy / "last.pt").read_bytes()
    for content in (b"xx", whole[: len(whole) // 2], overwritten(whole)):
        (run_copy / "last.pt").write_bytes(content)
        refused("train", "--resume", run_copy, "--steps", "14", says=("last.pt", "damaged"))
    shutil.copy(run_copy / "best.pt", run_copy / "last.pt")
    refused("train", "--resume", run_copy, "--steps", "14", says=("last.pt", "lacks log, optimizer, rng"))


def test_resume_with_something_else_spoils_nothing(refused: Refused, run_copy: Path, spoil: Spoil) -> None:
    def rename(content: dict[str, Any]) -> None:
        content["categories"][0]["name"] = "zebra"

    before = {path.name: path.read_bytes() for path in run_copy.iterdir() if path.is_file()}
    again = ("train", "--resume", run_copy, "--steps", "14")
    refused(*again, "--data", spoil(rename, "train", "val"), says=("other classes", "figure", "zebra"))
    refused(*again, "--set", "model.width=64", says=("disagree", "(64, 512, 1, 1)"))
    refused(*again, "--set", "train.backbone_lr=0", says="its optimiser trained other parts")
    assert {path.name: path.read_bytes() for path in run_copy.iterdir() if path.is_file()} == before


def test_flags_count_when_a_named_run_is_resumed(call: Call, run_copy: Path) -> None:
    done = call("train", "--resume", run_copy, "--steps", "13")
    assert done.code == 0 and load_checkpoint(run_copy / "last.pt")["step"] == 13, done


def test_a_run_folder_that_vanishes_is_one_line(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    from queryvision.engine.trainer import Trainer

    step = Trainer._step

    def vanish(self: Trainer, *words: Any) -> None:
        step(self, *words)
        shutil.rmtree(self.folder)

    monkeypatch.setattr(Trainer, "_step", vanish)
    words = ("train", "--task", "detection", "--data", scenes, *TINY, "--steps", "3", "--output", tmp_path / "runs")
    refused(*words, "--set", "train.save_every=1", says=("cannot write", "last.pt"))
