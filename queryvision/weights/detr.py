"""Reader of the checkpoints of facebookresearch/detr (a dict with `model`): R50, R101, their DC5 variants, boxes or panoptic.

The core's keys are mapped here; a head maps its own (`Head.published`). All 92 rows of the classifier are kept: ids 0..90 of
COCO and no-object; leaving some out would change the softmax. Panoptic ones have 251 rows, for ids 0..249.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from queryvision.errors import CheckpointError
from queryvision.head import Head
from queryvision.weights import reading

TASK = "detection"
PREFIX = "detr."
"""Of the box model in a panoptic checkpoint."""
MASKS = ("bbox_attention.q_linear.weight", "mask_head.out_lay.weight")
"""What a panoptic checkpoint has beside it."""
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
        {"state": their state dict, "model": {"name": builder, keyword arguments}, "classes": ClassMap, "config": preset,
        "task": detection or panoptic}.

    Raises:
        CheckpointError: it is something else.
    """
    state = reading.open_state(source)
    panoptic = "detr.query_embed.weight" in state
    inner = {key.removeprefix(PREFIX): value for key, value in state.items()} if panoptic else state
    needed = ("class_embed.weight", "query_embed.weight", "transformer.decoder.norm.weight", "backbone.0.body.conv1.weight")
    missing = [key for key in (*needed, *(MASKS if panoptic else ())) if key not in inner]
    if missing:
        kind = "panoptic" if panoptic else "box"
        raise CheckpointError(f"{source}: is no {kind} checkpoint of facebookresearch/detr: it lacks `model` or {missing[0]}")
    deep = any(".layer3.22." in key for key in state)
    dilated = "dc5" in Path(source).name.lower() if dc5 is None else dc5
    queries, rows = inner["query_embed.weight"].shape[0], inner["class_embed.weight"].shape[0] - 1
    depth = "r101" if deep else "r50"
    name = f"detr_masks_{depth}" if panoptic else f"detr_{depth}"
    return {
        "state": inner,
        "model": {"name": name, "dc5": dilated, "num_queries": queries},
        "classes": reading.class_map(rows),
        "config": "detr_r50_panoptic_coco" if panoptic else f"{name}_coco",
        "task": "panoptic" if panoptic else TASK,
    }


def rename(state: dict[str, Tensor], heads: dict[str, Head]) -> dict[str, Tensor]:
    """Their state dict under our names; see `reading.rename`."""
    return reading.rename(state, RULES, "detr", heads)
