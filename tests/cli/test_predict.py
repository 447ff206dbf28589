"""`qv predict`: what it takes as pictures, what it leaves, and what stays when something ends it."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny import Call

import queryvision
from queryvision.assembly import build_model, header, resolve
from queryvision.config import load_config
from queryvision.data.classes import ClassMap
from queryvision.engine.checkpoint import save_checkpoint
from queryvision.errors import ConfigError, DataError
from queryvision.inference.predictor import Predictor, as_array, find_pictures
from queryvision.inference.result_folder import Arriving
from queryvision.registry import resolve_task
from queryvision.results import Result

SMALL = [
    "model.backbone=resnet18", "model.width=32", "model.ffn_width=32", "model.encoder_layers=1", "model.decoder_layers=2",
    "model.num_queries=12", "heads.masks.points=64", "heads.masks.least=0", "heads.masks.merging=detr",
    "data.image_size=64",
]  # fmt: skip
ORIENTATION = 0x0112


@pytest.fixture(scope="session")
def panoptic(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of random weights of a task that makes maps."""

    def make(name: str) -> Path:
        task = resolve_task(name)
        config = resolve(load_config(name, None, {"weights": "none"}, SMALL), task)
        classes = ClassMap((1, 2, 7), ("ball", "cat", "sky"), (True, True, False))
        torch.manual_seed(0)
        model = build_model(config, task, classes)
        content = {**header(config, task, classes), "model": model.state_dict(), "step": 0, "metrics": {}}
        file = tmp_path_factory.mktemp("maps") / f"{name}.pt"
        save_checkpoint(file, content)
        return file

    made: dict[str, Path] = {}
    return lambda name: made.get(name) or made.setdefault(name, make(name))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four pictures of noise: a, b, c, d."""
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name in "abcd":
        Image.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8)).save(tmp_path / "photos" / f"{name}.jpg")
    return tmp_path / "photos"


def read(file: Path) -> Any:
    return json.loads(file.read_text())


# ---------------------------------------------------------------------------------------------------- what stays
@pytest.mark.parametrize("task", ["panoptic", "detection+panoptic"])
def test_a_map_is_written_when_its_picture_is_done(
    task: str, panoptic: Callable[[str], Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its pixels are not kept; maps, results and pictures have the same numbers and names."""
    out, predict, alive = tmp_path / "out", Predictor.predict, list[weakref.ref[Any]]()

    def look(self: Predictor, *given: Any) -> Any:
        assert len(list(out.glob("panoptic/*.png"))) == len(alive)
        assert all(ref() is None for ref in alive[:-1]), "results of earlier pictures are kept"
        result: Any = predict(self, *given)
        assert len(result) > 0 and "semantic" in result.maps
        alive.append(weakref.ref(result.values["masks"].map))
        return result

    monkeypatch.setattr(Predictor, "predict", look)
    queryvision.predict(panoptic(task), photos, out, threshold=0)
    about, maps = read(out / "images.json")["images"], read(out / "panoptic.json")
    assert [(row["id"], row["file_name"]) for row in maps["images"]] == [(row["id"], row["file_name"]) for row in about]
    assert [row["file_name"] for row in about] == [str(photos / f"{name}.jpg") for name in "abcd"]
    assert [row["file_name"] for row in maps["annotations"]] == [f"{name}.png" for name in "abcd"]
    assert [row["image_id"] for row in maps["annotations"]] == [1, 2, 3, 4]
    assert {row["image_id"] for row in read(out / "results.json")} == {1, 2, 3, 4}


@pytest.mark.parametrize(("end", "code"), [(KeyboardInterrupt, 130), (ConfigError, 2)])
def test_what_was_done_is_kept_whatever_ends_it(
    end: type[BaseException],
    code: int,
    panoptic: Callable[[str], Path],
    photos: Path,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, predict, seen = tmp_path / "out", Predictor.predict, list[int]()
    words = ("predict", panoptic("panoptic"), "-o", out, "--threshold", "0")
    assert call(*words, photos / "d.jpg").code == 0
    files = [out / f"{name}.json" for name in ("results", "images", "panoptic")]
    assert all(file.exists() for file in files)

    def look(self: Predictor, *given: Any) -> Any:
        if not seen:
            assert not any(file.exists() for file in files), "old results lie beside new pictures"
        seen.append(1)
        if len(seen) == 3:
            raise end
        return predict(self, *given)

    monkeypatch.setattr(Predictor, "predict", look)
    assert call(*words, photos).code == code
    wanted = [str(photos / "a.jpg"), str(photos / "b.jpg")]
    assert [row["file_name"] for row in read(out / "images.json")["images"]] == wanted
    assert [row["file_name"] for row in read(out / "panoptic.json")["images"]] == wanted
    assert {row["image_id"] for row in read(out / "results.json")} == {1, 2}


def test_results_that_arrive_are_read_by_several() -> None:
    results = {name: Result(torch.ones(1), torch.zeros(1), ClassMap((1,), ("a",), (True,)), (1, 1), {}) for name in "ab"}
    for readers in (1, 2):
        arriving = Arriving(iter(results.items()), readers)
        assert [list(arriving.items()) for _ in range(readers)] == [list(results.items())] * readers
        with pytest.raises(KeyError, match="take each when its turn comes"):
            arriving["a"]
        with pytest.raises(TypeError, match="read once"):
            list(arriving)
        with pytest.raises(TypeError, match="is known behind the last one"):
            bool(arriving)


def test_an_overlay_too_large_for_a_jpeg_is_a_png(trained: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (65_501, 40), "green").save(tmp_path / "strip.png")
    Image.new("RGB", (90, 40), "green").save(tmp_path / "deep" / "strip.jpg")
    done = call("predict", trained / "best.pt", tmp_path / "strip.png", tmp_path / "deep", "-o", tmp_path / "out")
    assert done.code == 0 and "2 pictures" in done.out, done
    about = {row["drawn"]: row["width"] for row in read(tmp_path / "out" / "images.json")["images"]}
    assert about == {"strip.png": 65_501, "strip_2.jpg": 90}, "a stem of its own each: a map may have it, too"
    for name, width in about.items():
        assert Image.open(tmp_path / "out" / name).size == (width, 40)


def test_an_overlay_that_cannot_be_written_is_one_line(trained: Path, photos: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "out" / "b.jpg").mkdir(parents=True)
    done = call("predict", trained / "best.pt", photos, "-o", tmp_path / "out")
    assert done.code == 2 and len(done.err.splitlines()) == 1 and f"cannot write {tmp_path / 'out' / 'b.jpg'}" in done.err, done
    assert [row["drawn"] for row in read(tmp_path / "out" / "images.json")["images"]] == ["a.jpg"]


# ---------------------------------------------------------------------------------------------------- upright
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_looked_at_upright(trained: Path, tmp_path: Path, orientation: int, call: Call) -> None:
    exif, pixels = Image.Exif(), np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(tmp_path / "phone.png", exif=exif)
    model, path = queryvision.load(trained / "best.pt"), tmp_path / "phone.png"
    with Image.open(path) as picture:
        shown = np.array(ImageOps.exif_transpose(picture))
        found = [model.predict(source, threshold=0) for source in (path, picture, shown)]
        assert picture.getexif()[ORIENTATION] == orientation, "a picture that is handed over is not changed"
    assert all(result.size == shown.shape[:2] for result in found)
    for result in found[:2]:
        torch.testing.assert_close(result.boxes, found[2].boxes)
        torch.testing.assert_close(result.scores, found[2].scores)
    assert call("predict", trained / "best.pt", path, "-o", tmp_path / "out").code == 0
    (row,) = read(tmp_path / "out" / "images.json")["images"]
    with Image.open(tmp_path / "out" / row["drawn"]) as overlay:
        assert (row["height"], row["width"]) == shown.shape[:2] == overlay.size[::-1]
        assert overlay.getexif().get(ORIENTATION, 1) == 1


def test_a_damaged_exif_does_not_lose_a_picture(tmp_path: Path) -> None:
    """Pillow turns such a picture, and then fails to rewrite what else stands in its EXIF."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x011A] = 6, 72.5
    damaged = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x07")  # a resolution that is no number
    for name, data, shape in (("damaged", damaged, (90, 60)), ("cut", damaged[:12], (60, 90))):
        Image.new("RGB", (90, 60)).save(tmp_path / f"{name}.jpg", exif=data)
        assert as_array(tmp_path / f"{name}.jpg").shape == (*shape, 3), name
    with pytest.raises(TypeError), Image.open(tmp_path / "damaged.jpg") as picture:
        ImageOps.exif_transpose(picture)


# ---------------------------------------------------------------------------------------------------- sources
def test_one_source_needs_no_list(trained: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)  # whoever reads a text letter by letter shall not walk from the root
    for source in ("photos", Path("photos"), [Path("photos")], ["photos"], "photos/*.jpg"):
        folder = queryvision.predict(trained / "best.pt", source, "out")
        assert len(read(folder / "images.json")["images"]) == 4


def names(pictures: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in pictures]


def test_a_second_prediction_looks_at_the_same_pictures(
    panoptic: Callable[[str], Path], photos: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    for source in (".", "**/*.*"):
        for _ in range(2):
            done = call("predict", panoptic("panoptic"), source, "-o", "deep/out")
            assert done.code == 0 and "4 pictures" in done.out, done
    assert len(find_pictures(["deep/out/a.jpg", "deep/out/*.jpg"], "deep/other")) == 4, "who names them gets them"


def test_overlays_are_not_drawn_among_the_pictures_of_a_folder(trained: Path, photos: Path, call: Call) -> None:
    """A second prediction would take them for pictures."""
    for source in (photos, f"{photos}/*.jpg"):
        done = call("predict", trained / "best.pt", source, "-o", photos)
        assert done.code == 2 and f"--output {photos}: holds pictures of {source}; choose another folder" in done.err, done
    assert len(list(photos.iterdir())) == 4


def test_what_cannot_be_written_spoils_no_earlier_prediction(
    trained: Path, panoptic: Callable[[str], Path], photos: Path, tmp_path: Path, call: Call
) -> None:
    out = tmp_path / "out"
    assert call("predict", trained / "best.pt", photos, "-o", out, "--threshold", "0").code == 0
    before = (out / "results.json").read_bytes()
    (out / "panoptic").touch()
    done = call("predict", panoptic("panoptic"), photos, "-o", out)
    assert done.code == 2 and "panoptic" in done.err and (out / "results.json").read_bytes() == before, done


def test_hidden_files_are_left_out_and_links_followed_once(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    for name in ("b/x.jpg", "b/._x.jpg", ".cache/y.jpg", "a.jpg", "folder.jpg/z.png", "b/c/w.PNG", "note.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    other.mkdir()
    (other / "linked.jpg").touch()
    (root / "a_link").symlink_to(other)
    (root / "again").symlink_to(other)
    (other / "loop").symlink_to(root)
    (root / "a_twin").symlink_to(root / "b")
    (root / "a_deep").symlink_to(root / "b" / "c")
    found = names(find_pictures(root), root)
    assert found == ["a.jpg", "a_link/linked.jpg", "b/c/w.PNG", "b/x.jpg", "folder.jpg/z.png"]
    os.symlink(root, tmp_path / "alias")
    assert names(find_pictures(tmp_path / "alias"), tmp_path / "alias") == found, "a link that is named is followed"
    assert names(find_pictures(root / ".cache"), root) == [".cache/y.jpg"], "and so is a hidden folder"
    assert names(find_pictures(root, other), root) == [name for name in found if "link" not in name]
    with pytest.raises(DataError, match="no picture"):
        find_pictures(root / "b" / "nothing.jpg")
