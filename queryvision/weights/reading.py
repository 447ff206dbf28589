"""What the readers of published checkpoints share: opening, renaming by rules, dropping copies, filling strictly."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from queryvision.data.classes import ClassMap
from queryvision.data.coco_classes import COCO_NAMES
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
    """COCO's sparse ids 0..90 for a published classifier, plain numbers for somebody's fine-tuned one."""
    names = [COCO_NAMES.get(i, f"unused {i}") if rows == 91 else f"class {i}" for i in range(rows)]
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
