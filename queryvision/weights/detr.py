"""Reader of the checkpoints of facebookresearch/detr (a dict with `model`): R50, R101, and their DC5 variants.

The core's keys are mapped here; a head maps its own (`Head.published`). All 92 rows of the classifier are kept: ids 0..90 of
COCO and no-object; leaving some out would change the softmax.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from queryvision.errors import CheckpointError
from queryvision.head import Head
from queryvision.weights import reading

TASK = "detection"
RULES: reading.Rules = (
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
        {"state": their state dict, "model": {"name": builder, keyword arguments}, "classes": ClassMap, "config": preset}.

    Raises:
        CheckpointError: it is something else.
    """
    state = reading.open_state(source)
    needed = ("class_embed.weight", "query_embed.weight", "transformer.decoder.norm.weight", "backbone.0.body.conv1.weight")
    if any(key not in state for key in needed):
        hint = " (a panoptic one: its box model is under `detr.`)" if "detr.query_embed.weight" in state else ""
        raise CheckpointError(f"{source}: is no box checkpoint of facebookresearch/detr: it lacks `model` or {needed[0]}{hint}")
    deep = any(".layer3.22." in key for key in state)
    dilated = "dc5" in Path(source).name.lower() if dc5 is None else dc5
    queries, rows = state["query_embed.weight"].shape[0], state["class_embed.weight"].shape[0] - 1
    name = "detr_r101" if deep else "detr_r50"
    return {
        "state": state,
        "model": {"name": name, "dc5": dilated, "num_queries": queries},
        "classes": reading.class_map(rows),
        "config": f"{name}_coco",
    }


def rename(state: dict[str, Tensor], heads: dict[str, Head]) -> dict[str, Tensor]:
    """Their state dict under our names; see `reading.rename`."""
    return reading.rename(state, RULES, "detr", heads)
