"""Where a data set keeps its annotation files and its images.

Understood are COCO's own layout (`annotations/instances_train2017.json` with `train2017/`), its short form
(`annotations/instances_train.json` with `images/`) and Roboflow's (`train/_annotations.coco.json` beside the images).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from queryvision.errors import DataError

ROBOFLOW = "_annotations.coco.json"
SPLITS = ("train", "val", "test")
LAYOUTS = (
    "annotations/instances_{split}.json or instances_{split}2017.json with images/ or {split}2017/ (COCO), "
    f"{{split}}/{ROBOFLOW} with the images beside it (Roboflow; valid/ stands for val)"
)


def find_annotations(path: Path | str, split: str, needs: Iterable[str] = ()) -> Path:
    """Finds the annotation file of a split.

    Args:
        path: root folder of the data set.
        split: `train`, `val`, ...
        needs: with "keypoints" among them, `person_keypoints_{split}*.json` is preferred where it exists.

    Returns:
        The json file.

    Raises:
        DataError: the folder or the file does not exist, or several files fit equally well.
    """
    root = _root(path)
    kinds = ("person_keypoints", "instances") if "keypoints" in needs else ("instances",)
    for kind in kinds:
        found = _coco_file(root, kind, split)
        if found:
            return found
    for name in _folders(split):
        if (root / name / ROBOFLOW).is_file():
            return root / name / ROBOFLOW
    there = sorted({name for name, _ in find_all(root)})
    hint = f"; it has the splits {', '.join(there)}" if there else ""
    raise DataError(f"{root}: no annotations of split '{split}'{hint}. Understood: {LAYOUTS.replace('{split}', split)}")


def find_all(path: Path | str) -> list[tuple[str, Path]]:
    """Finds every annotation file of a data set.

    Returns:
        (split, json file), in the order of `SPLITS`; empty where nothing is understood.

    Raises:
        DataError: the folder does not exist.
    """
    root = _root(path)
    found: list[tuple[str, Path]] = []
    for file in sorted((root / "annotations").glob("*.json")):
        match = re.fullmatch(r"(?:instances|person_keypoints)_([A-Za-z]+).*", file.stem)
        if match:
            found.append((match[1], file))
    for folder in sorted(f for f in root.iterdir() if f.is_dir()):
        if (folder / ROBOFLOW).is_file():
            found.append(("val" if folder.name == "valid" else folder.name, folder / ROBOFLOW))
    order = {name: i for i, name in enumerate(SPLITS)}
    return sorted(found, key=lambda item: order.get(item[0], len(order)))


def image_folders(root: Path, split: str, file: Path) -> tuple[Path, ...]:
    """The folders in which an image of `file` may lie, in the order in which they are tried."""
    if file.name == ROBOFLOW:
        return (file.parent,)
    tag = re.sub(r"^(instances|person_keypoints)_", "", file.stem)
    names = dict.fromkeys(("", tag, f"{split}2017", split))
    folders = [name for name in names if name] + ["images"] + [f"images/{name}" for name in names if name] + ["."]
    return tuple(folder for folder in (root / name for name in folders) if folder.is_dir())


def find_image(folders: Iterable[Path], file_name: str) -> Path:
    """Finds one image.

    Args:
        folders: of `image_folders`.
        file_name: as the annotation file has it; `safe_name` must have passed it.

    Raises:
        DataError: it lies in none of the folders.
    """
    tried = []
    for folder in folders:
        if (folder / file_name).is_file():
            return folder / file_name
        tried.append(str(folder))
    raise DataError(f"image '{file_name}' is missing; looked in {', '.join(tried)}")


def safe_name(file_name: str) -> bool:
    """Whether a file name of an annotation file stays inside the data set (links that the user set are trusted)."""
    path = PurePosixPath(file_name.replace("\\", "/"))
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]


def _root(path: Path | str) -> Path:
    root = Path(path)
    if not root.exists():
        raise DataError(f"{root}: there is no such folder; give the root folder of the data set")
    if not root.is_dir():
        raise DataError(f"{root}: is a file; give the root folder of the data set. Understood: {LAYOUTS}")
    return root


def _folders(split: str) -> tuple[str, ...]:
    return ("valid", "val") if split in ("val", "valid") else (split,)


def _coco_file(root: Path, kind: str, split: str) -> Path | None:
    stem = f"{kind}_{split}"
    for name in (stem, f"{stem}2017", *(f"{kind}_{alias}" for alias in _folders(split))):
        if (root / "annotations" / f"{name}.json").is_file():
            return root / "annotations" / f"{name}.json"
    # `instances_val*.json` must not find `instances_valid.json` for `val`, so a letter may not follow.
    others = sorted(f for f in (root / "annotations").glob(f"{stem}*.json") if not f.stem[len(stem)].isalpha())
    if len(others) > 1:
        names = ", ".join(f.name for f in others)
        raise DataError(f"{root / 'annotations'}: {names} all fit split '{split}'; name the right one {stem}.json")
    return others[0] if others else None
