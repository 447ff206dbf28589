"""Reader of the checkpoints of facebookresearch/detr (a dict with `model`): R50, R101, and their DC5 variants.

The core's keys are mapped here; a head maps its own (`Head.published`). All 92 rows of the classifier are kept: ids 0..90 of
COCO and no-object; leaving some out would change the softmax.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from queryvision.data.classes import ClassMap
from queryvision.data.coco_classes import COCO_NAMES
from queryvision.engine.checkpoint import read_file
from queryvision.errors import CheckpointError
from queryvision.head import Head
from queryvision.weights.sources import fetch

TASK = "detection"
RULES: tuple[tuple[str, str], ...] = (
    (r"^backbone\.0\.body\.", "backbone.body."),
    (r"^input_proj\.", "neck.levels.0."),
    (r"^query_embed\.", "queries.positions."),
    (r"^transformer\.encoder\.layers\.(\d+)\.(linear[12])\.", r"encoder.layers.\1.ffn.\2."),
    (r"^transformer\.encoder\.", "encoder."),
    (r"^transformer\.decoder\.layers\.(\d+)\.(linear[12])\.", r"decoder.layers.\1.ffn.\2."),
    (r"^transformer\.decoder\.layers\.(\d+)\.multihead_attn\.", r"decoder.layers.\1.cross_attn.attention."),
    (r"^transformer\.decoder\.", "decoder."),
)


def read(source: str, dc5: bool | None = None) -> dict[str, Any]:
    """Reads a published file.

    Args:
        source: path or URL.
        dc5: whether its last stage is dilated, which the weights do not show; None: told by the file's name.

    Returns:
        {"state": their state dict, "model": {"name": builder, keyword arguments}, "classes": ClassMap}.

    Raises:
        CheckpointError: it is something else.
    """
    content = read_file(fetch(source), [argparse.Namespace])
    state = content.get("model") if isinstance(content, dict) else None
    needed = ("class_embed.weight", "query_embed.weight", "transformer.decoder.norm.weight", "backbone.0.body.conv1.weight")
    if not isinstance(state, dict) or any(key not in state for key in needed):
        hint = (
            " (a panoptic one: its box model is under `detr.`)"
            if isinstance(state, dict) and "detr.query_embed.weight" in state
            else ""
        )
        raise CheckpointError(f"{source}: is no box checkpoint of facebookresearch/detr: it lacks `model` or {needed[0]}{hint}")
    deep = any(".layer3.22." in key for key in state)
    dilated = "dc5" in Path(source).name.lower() if dc5 is None else dc5
    queries, rows = state["query_embed.weight"].shape[0], state["class_embed.weight"].shape[0] - 1
    return {
        "state": state,
        "model": {"name": "detr_r101" if deep else "detr_r50", "dc5": dilated, "num_queries": queries},
        "classes": _classes(rows),
    }


def _classes(rows: int) -> ClassMap:
    """COCO's sparse ids 0..90 for a published classifier, plain numbers for somebody's fine-tuned one."""
    names = [COCO_NAMES.get(i, f"unused {i}") if rows == 91 else f"class {i}" for i in range(rows)]
    return ClassMap(tuple(range(rows)), tuple(names), (True,) * rows)


def rename(state: dict[str, Tensor], heads: dict[str, Head]) -> dict[str, Tensor]:
    """Their state dict under our names.

    Raises:
        CheckpointError: a key belongs to nothing.
    """
    rules = list(RULES)
    for name, head in heads.items():
        for theirs, ours in head.published.get("detr", {}).items():
            rules.append((rf"^{re.escape(theirs)}", f"heads.{name}.{ours}"))
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            new, count = re.subn(pattern, replacement, key)
            if count:
                renamed[new] = value
                break
        else:
            raise CheckpointError(f"the checkpoint's tensor '{key}' belongs to no part of this model")
    return renamed


def fill(model: nn.Module, state: dict[str, Tensor], heads: dict[str, Head]) -> None:
    """Loads all of it, and nothing may be left over on either side.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    try:
        missing, unexpected = model.load_state_dict(rename(state, heads), strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit the model: {str(error).splitlines()[1].strip()}") from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    unexpected = [key for key in unexpected if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise CheckpointError(f"the checkpoint does not fit the model: missing {missing[:3]}, left over {unexpected[:3]}")
