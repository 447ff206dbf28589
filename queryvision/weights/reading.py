"""What the readers of published checkpoints share: opening, renaming by rules, dropping copies, filling strictly."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from queryvision.data.classes import ClassMap
from queryvision.data.coco_classes import COCO_NAMES, COCO_STUFF
from queryvision.engine.checkpoint import read_file
from queryvision.errors import CheckpointError
from queryvision.head import Head
from queryvision.weights.sources import fetch

Rules = tuple[tuple[str, str], ...]
"""(pattern, replacement) of `re.sub`; the first pattern that is found counts."""


def open_state(source: str, names: Sequence[str] = ("model",)) -> dict[str, Tensor]:
    """The state dict of a published file, a dict of it and more.

    Args:
        source: path or URL.
        names: keys under which it may stand, the better ones first.

    Returns:
        The state dict; empty where the file holds none.

    Raises:
        CheckpointError: the file is missing, damaged, or could run code.
    """
    content = read_file(fetch(source), [argparse.Namespace])
    for name in names:
        state = content.get(name) if isinstance(content, dict) else None
        if isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()):
            return state
    return {}


def open_safetensors(source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file of `transformers`, and the settings in the `config.json` beside it.

    Args:
        source: path or URL of the file, or the folder that holds its `model.safetensors`.

    Returns:
        {name: tensor}, and the settings; none where there is no such file.

    Raises:
        CheckpointError: a file is missing, damaged, or is something else.
    """
    beside, query, rest = source.partition("?")
    if Path(source).is_dir():
        path, settings = Path(source) / "model.safetensors", Path(source) / "config.json"
    else:
        path = fetch(source)
        settings = _optional(f"{beside.rpartition('/')[0] or '.'}/config.json{query}{rest}")
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        return load_file(path), _settings(settings)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({str(error).splitlines()[0]})") from error


def _optional(source: str) -> Path:
    """Like `fetch`, but a server that does not have the file is no error; the path does not exist then."""
    try:
        return fetch(source)
    except CheckpointError as error:
        if isinstance(error.__cause__, HTTPError) and error.__cause__.code == 404:
            return Path("none/config.json")
        raise


def _settings(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no settings of a model")
    return content


def check_resnet50(source: str, state: Mapping[str, Tensor]) -> None:
    """Raises a CheckpointError where the backbone is not torchvision's ResNet-50."""
    backbone = [key.removeprefix("backbone.0.") for key in state if key.startswith("backbone.0.")]
    blocks = {key.split(".")[2] for key in backbone if key.startswith("body.layer3.")}
    if len(blocks) == 6 and "body.layer1.0.conv3.weight" in backbone:
        return
    known = {"patch_embed.": "a Swin transformer", "downsample_layers.": "a ConvNeXt", "body.layer3.": "another ResNet"}
    found = next((name for part, name in known.items() if any(key.startswith(part) for key in backbone)), "an unknown one")
    raise CheckpointError(f"{source}: its backbone is {found}; only checkpoints with ResNet-50 can be read")


def class_map(rows: int) -> ClassMap:
    """Classes of a published classifier that has a row for every id.

    Args:
        rows: 91: COCO's ids 0..90, with gaps; 250: its panoptic ids, stuff from 92 on; another number is somebody's fine-tuned
            one, whose classes have plain numbers.
    """
    known = {91: COCO_NAMES, 250: COCO_NAMES | COCO_STUFF}.get(rows, {})
    names = [known.get(i, f"unused {i}") if known else f"class {i}" for i in range(rows)]
    return ClassMap(tuple(range(rows)), tuple(names), tuple(rows != 250 or i <= max(COCO_NAMES) for i in range(rows)))


def dense_class_map(rows: int) -> ClassMap:
    """Classes of a classifier without gaps.

    Args:
        rows: 80: COCO's objects; 133: its objects, then its stuff; another number is as in `class_map`.
    """
    known = {80: COCO_NAMES, 133: COCO_NAMES | COCO_STUFF}.get(rows)
    if known is None:
        return class_map(rows)
    return ClassMap(tuple(known), tuple(known.values()), tuple(i in COCO_NAMES for i in known))


ALIASES = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""COCO's categories as some published settings call them."""


def classes_of(rows: int, settings: Mapping[str, Any], source: str) -> ClassMap:
    """Classes of a classifier with a row each: COCO's 80 under their own ids, others as the settings name them.

    Args:
        rows: how many there are.
        settings: `id2label` is looked for; without it, or with stand-ins only, 80 rows are taken for COCO's.
        source: for errors.

    Raises:
        CheckpointError: the settings name another number of classes.
    """
    given = settings.get("id2label") or {}
    if not given or all(name == f"LABEL_{index}" for index, name in given.items()):
        names = list(COCO_NAMES.values()) if rows == 80 else [f"class {i}" for i in range(rows)]
    elif set(given) == {str(index) for index in range(rows)}:
        names = [str(given[str(index)]) for index in range(rows)]
    else:
        raise CheckpointError(f"{source}: has {rows} classes, the config.json beside it names {len(given)}")
    if [ALIASES.get(name, name) for name in names] == list(COCO_NAMES.values()):
        return ClassMap(tuple(COCO_NAMES), tuple(COCO_NAMES.values()), (True,) * rows)
    names = [name if names.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(names)]
    return ClassMap(tuple(range(rows)), tuple(names), (True,) * rows)


def without_copies(state: Mapping[str, Tensor], copies: Rules) -> dict[str, Tensor]:
    """Drops tensors that are there again under another name.

    Args:
        state: is not changed.
        copies: (pattern, replacement) that make the other name of a copy's; what they leave as it is is no copy.

    Raises:
        CheckpointError: a copy differs from the other, or is there alone.
    """
    kept = {}
    for key, value in state.items():
        other = next((new for pattern, new in ((p, re.sub(p, r, key)) for p, r in copies) if new != key), None)
        if other is None:
            kept[key] = value
        elif other not in state or not torch.equal(state[other], value):
            raise CheckpointError(f"the checkpoint's tensor '{key}' is no copy of '{other}', as in the published model")
    return kept


def rename(state: Mapping[str, Tensor], rules: Rules, family: str, heads: Mapping[str, Head]) -> dict[str, Tensor]:
    """A published state dict under our names.

    Args:
        state: under theirs.
        rules: of the core; a head maps its own (`Head.published`).
        family: key of `Head.published`.
        heads: {name: head}.

    Raises:
        CheckpointError: a key belongs to nothing.
    """
    every = list(rules)
    for name, head in heads.items():
        for theirs, ours in head.published.get(family, {}).items():
            every.append((rf"^{re.escape(theirs)}", f"heads.{name}.{ours}"))
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in every:
            new, count = re.subn(pattern, replacement, key)
            if count:
                renamed[new] = value
                break
        else:
            raise CheckpointError(f"the checkpoint's tensor '{key}' belongs to no part of this model")
    return renamed


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads all of it, and nothing may be left over on either side but batch norm's counters.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit the model: {str(error).splitlines()[1].strip()}") from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    unexpected = [key for key in unexpected if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise CheckpointError(f"the checkpoint does not fit the model: missing {missing[:3]}, left over {unexpected[:3]}")
