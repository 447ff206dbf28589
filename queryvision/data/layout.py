"""Where a data set keeps its annotation files and its images.

Understood are COCO's own layout (`annotations/instances_train2017.json` with `train2017/`), its short form
(`annotations/instances_train.json` with `images/`) and Roboflow's (`train/_annotations.coco.json` beside the images).
Panoptic annotations are `annotations/panoptic_train.json` with a folder of PNG files, or are composed of instances and a folder
of label maps (see `semantic`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from queryvision.data.paths import is_dir, is_file, listed, mode
from queryvision.errors import DataError

Source = Literal["instances", "panoptic"]
ROBOFLOW = "_annotations.coco.json"
PEOPLE = "person_keypoints"
SPLITS = ("train", "val", "test")
LAYOUTS = (
    "annotations/instances_{split}.json or instances_{split}2017.json with images/ or {split}2017/ (COCO), "
    f"{{split}}/{ROBOFLOW} with the images beside it (Roboflow; valid/ stands for val)"
)
PANOPTIC_LAYOUTS = (
    "annotations/panoptic_{split}.json or panoptic_{split}2017.json with a folder of that name (COCO), or "
    "annotations/instances_{split}.json and semantic.json with semantic_{split}/ or labels_{split}/ (label maps)"
)


class Found(NamedTuple):
    """An annotation file, and as which source it can be read."""

    split: str
    file: Path
    source: Source


def find_annotations(path: Path | str, split: str, needs: Iterable[str] = (), source: Source = "instances") -> Path:
    """Finds the annotation file of a split.

    Args:
        path: root folder of the data set.
        split: `train`, `val`, ...
        needs: with "keypoints" among them, `person_keypoints_{split}*.json` is preferred where it exists.
        source: "panoptic" finds `panoptic_{split}*.json`, or the file of the instances where there are label maps too.

    Returns:
        The json file.

    Raises:
        DataError: the folder or the file does not exist, or several files fit equally well.
    """
    root = _root(path)
    found = _panoptic_file(root, split) if source == "panoptic" else _object_file(root, split, needs)
    if found:
        return found
    every = find_all(root)
    there = sorted({name for name, _, kind in every if kind == source})
    hint = f"; it has the splits {', '.join(there)}" if there else ""
    kind = "panoptic annotations" if source == "panoptic" else "annotations"
    understood = PANOPTIC_LAYOUTS if source == "panoptic" else LAYOUTS
    other = next((file for name, file, kind in every if name == split and kind != source), None)
    hint += "" if there or other is None else f", but {other.name}, which is for other tasks (--task)"
    raise DataError(f"{root}: no {kind} of split '{split}'{hint}. Understood: {understood.replace('{split}', split)}")


def find_all(path: Path | str) -> list[Found]:
    """Finds every annotation file of a data set.

    Returns:
        In the order of `SPLITS`; empty where nothing is understood. `find_annotations` finds each by its split.

    Raises:
        DataError: the folder does not exist or cannot be read, or an annotation file is a broken link.
    """
    root = _root(path)
    found: list[Found] = []
    for file in listed(root / "annotations"):
        match = re.fullmatch(rf"(instances|{PEOPLE}|panoptic)_(.+)\.json", file.name)
        if match and is_file(file):
            found.append(Found(_split_of(file, *match.groups()), file, "panoptic" if match[1] == "panoptic" else "instances"))
    for folder in listed(root):
        own = folder.name in (*SPLITS, "valid")  # others may be closed, such as `lost+found`
        if (own or os.access(folder, os.X_OK)) and is_file(folder / ROBOFLOW):
            found.append(Found("val" if folder.name == "valid" else folder.name, folder / ROBOFLOW, "instances"))
    mapped = {f.split for f in found if f.source == "panoptic"}
    plain = [f for f in found if f.split not in mapped and f.file.name.startswith("instances_")]
    found += [Found(f.split, f.file, "panoptic") for f in plain if _has_labels(root, f.split)]
    order = {name: i for i, name in enumerate(SPLITS)}
    return sorted(found, key=lambda item: order.get(item.split, len(order)))


def segment_folder(root: Path, split: str, file: Path) -> Path:
    """The folder with the PNG files of a panoptic file.

    Raises:
        DataError: there is none.
    """
    names = dict.fromkeys((file.stem, f"panoptic_{split}", f"panoptic_{split}2017"))
    folders = [folder / name for name in names for folder in (root, root / "annotations")]
    return _first_folder(folders, f"{file}: the folder with its PNG files is missing")


def label_folder(root: Path, split: str) -> Path:
    """The folder with the label maps of a split.

    Raises:
        DataError: there is none.
    """
    return _first_folder(_label_folders(root, split), f"{root}: the folder with the label maps of '{split}' is missing")


def label_file(root: Path, split: str) -> Path | None:
    """What says which label values mean which categories; None: there is nothing."""
    files = (root / "annotations" / f"{name}.json" for name in (f"semantic_{split}", f"semantic_{split}2017", "semantic"))
    return next((file for file in files if is_file(file)), None)


def image_folders(root: Path, split: str, file: Path) -> tuple[Path, ...]:
    """The folders in which an image of `file` may lie, in the order in which they are tried."""
    if file.name == ROBOFLOW:
        return (file.parent,)
    tag = re.sub(rf"^(instances|{PEOPLE}|panoptic)_", "", file.stem)
    names = dict.fromkeys(("", tag, f"{split}2017", split))
    folders = [name for name in names if name] + ["images"] + [f"images/{name}" for name in names if name] + ["."]
    return tuple(folder for folder in (root / name for name in folders) if is_dir(folder))


def find_image(folders: Iterable[Path], file_name: str) -> Path:
    """Finds one image.

    Args:
        folders: of `image_folders`.
        file_name: as the annotation file has it; `safe_name` must have passed it.

    Raises:
        DataError: it lies in none of the folders, is a broken link, or a folder may not be entered.
    """
    tried = []
    for folder in folders:
        path = inside(folder, file_name)
        if is_file(path):
            return path
        tried.append(str(folder))
    raise DataError(f"image '{file_name}' is missing; looked in {', '.join(tried)}")


def safe_name(file_name: str) -> bool:
    """Whether a file name of an annotation file stays inside the data set (links that the user set are trusted)."""
    path = PurePosixPath(file_name.replace("\\", "/"))
    elsewhere = path.is_absolute() or ".." in path.parts or "://" in file_name or re.match(r"[A-Za-z]:[\\/]", file_name)
    return bool(path.parts) and not elsewhere


def inside(folder: Path, file_name: str) -> Path:
    """Where a file lies whose name, which `safe_name` has passed, may have backslashes for slashes, as Windows writes it.

    Raises:
        DataError: the folder may not be entered.
    """
    path = folder / file_name
    return folder / file_name.replace("\\", "/") if "\\" in file_name and not is_file(path) else path


def _root(path: Path | str) -> Path:
    root = Path(path)
    if not mode(root):
        raise DataError(f"{root}: there is no such folder; give the root folder of the data set")
    if not is_dir(root):
        raise DataError(f"{root}: is a file; give the root folder of the data set. Understood: {LAYOUTS}")
    return root


def _folders(split: str) -> tuple[str, ...]:
    return ("valid", "val") if split in ("val", "valid") else (split,)


def _object_file(root: Path, split: str, needs: Iterable[str]) -> Path | None:
    kinds = (PEOPLE, "instances") if "keypoints" in needs else ("instances",)
    found = next((file for kind in kinds if (file := _coco_file(root, kind, split))), None)
    beside = (root / name / ROBOFLOW for name in _folders(split))
    return found or next((file for file in beside if is_file(file)), None)


def _panoptic_file(root: Path, split: str) -> Path | None:
    found = _coco_file(root, "panoptic", split)
    return _coco_file(root, "instances", split) if found is None and _has_labels(root, split) else found


def _has_labels(root: Path, split: str) -> bool:
    return label_file(root, split) is not None and any(is_dir(folder) for folder in _label_folders(root, split))


def _label_folders(root: Path, split: str) -> list[Path]:
    return [root / f"{name}_{split}{year}" for name in ("semantic", "labels") for year in ("", "2017")]


def _first_folder(folders: Iterable[Path], complaint: str) -> Path:
    folders = tuple(folders)
    found = next((folder for folder in folders if is_dir(folder)), None)
    if found is None:
        raise DataError(f"{complaint}; looked for {', '.join(str(folder) for folder in folders)}")
    return found


def _coco_file(root: Path, kind: str, split: str) -> Path | None:
    stem = f"{kind}_{split}"
    for name in (stem, f"{stem}2017", *(f"{kind}_{alias}" for alias in _folders(split))):
        if is_file(root / "annotations" / f"{name}.json"):
            return root / "annotations" / f"{name}.json"
    # `instances_val*.json` must not find `instances_valid.json` for `val`, so a letter may not follow.
    fitting = [f for f in listed(root / "annotations") if f.suffix == ".json" and f.stem.startswith(stem)]
    others = [f for f in fitting if not f.stem[len(stem) :][:1].isalpha() and is_file(f)]
    if len(others) > 1:
        names = ", ".join(f.name for f in others)
        raise DataError(f"{root / 'annotations'}: {names} all fit split '{split}'; name the right one {stem}.json")
    return others[0] if others else None


def _split_of(file: Path, kind: str, rest: str) -> str:
    """The shortest split by which `{kind}_{rest}.json` is found: a usual one, `rest` without its year, or all of `rest`."""
    usual, dated = re.sub("[^A-Za-z].*", "", rest), re.sub(r"[_-]?(19|20)\d\d$", "", rest)
    for name in (usual if usual in SPLITS else "", dated):
        with contextlib.suppress(DataError):  # several files fit
            if name and _coco_file(file.parents[1], kind, name) == file:
                return name
    return rest
