"""Reader of the checkpoints of IDEA-Research/MaskDINO with ResNet-50, instance and panoptic.

The core's keys are mapped here; a head maps its own (`Head.published`). Their encoder's levels go from fine to coarse, as ours
do; only their decoder sees them from coarse to fine, so its cross-attention is turned round.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from queryvision.errors import CheckpointError
from queryvision.head import Head
from queryvision.weights import detectron, reading
from queryvision.weights.detectron import PIXELS, PREDICTOR

TASK = "instance"
_QUERIES = rf"^{re.escape(PREDICTOR)}"
RULES: reading.Rules = (
    *detectron.PARTS,
    (rf"{_QUERIES}enc_output\.", "queries.project."),
    (rf"{_QUERIES}enc_output_norm\.", "queries.norm."),
    (rf"{_QUERIES}decoder_norm\.", "decoder.norm."),
    (rf"{_QUERIES}decoder\.ref_point_head\.", "decoder.positions.anchors."),
    (rf"{_QUERIES}decoder\.layers\.(\d+)\.(linear[12])\.", r"decoder.layers.\1.ffn.\2."),
    (rf"{_QUERIES}decoder\.layers\.(\d+)\.cross_attn\.", r"decoder.layers.\1.cross_attn.attention."),
    (rf"{_QUERIES}decoder\.layers\.(\d+)\.norm1\.", r"decoder.layers.\1.norm2."),  # theirs are numbered as they are written,
    (rf"{_QUERIES}decoder\.layers\.(\d+)\.norm2\.", r"decoder.layers.\1.norm1."),  # ours as they are used
    (rf"{_QUERIES}decoder\.layers\.", "decoder.layers."),
)
COPIES: reading.Rules = (
    (rf"{_QUERIES}(?:decoder\.)?bbox_embed\.\d+\.", f"{PREDICTOR}_bbox_embed."),
    (rf"{_QUERIES}decoder\.norm\.", f"{PREDICTOR}decoder_norm."),
)
"""The box head is there once more for each layer, twice; so is the decoder's norm."""
LEVELS = f"{PIXELS}transformer.level_embed"
NEEDED = (
    f"{PREDICTOR}enc_output.weight",
    f"{PREDICTOR}_bbox_embed.layers.0.weight",
    f"{PREDICTOR}class_embed.weight",
    f"{PREDICTOR}label_enc.weight",
    f"{PIXELS}input_proj.0.0.weight",
    f"{PIXELS}transformer.encoder.layers.0.linear1.weight",
    LEVELS,
)
"""What tells these checkpoints from others."""


def read(source: str) -> dict[str, Any]:
    """Reads a published file.

    That the first anchors are masks' boxes is not in the weights: published instance checkpoints have it, panoptic ones not.

    Args:
        source: path or URL.

    Returns:
        {"state": their state dict, "model": {"name": builder, keyword arguments}, "classes": ClassMap, "config": preset,
        "task": panoptic with COCO's 133 classes, else instance}.

    Raises:
        CheckpointError: it is something else.
    """
    state = detectron.open_state(source)
    detectron.check(source, state, "IDEA-Research/MaskDINO", NEEDED)
    levels, finest = len(state[LEVELS]), state[f"{PIXELS}input_proj.0.0.weight"].shape[1]
    if (levels, finest) != (4, 512):
        raise CheckpointError(
            f"{source}: has {levels} levels, the first of {finest} channels; only 4 from stride 8 on are read"
        )
    rows, embedded = len(state[f"{PREDICTOR}class_embed.weight"]), len(state[f"{PREDICTOR}label_enc.weight"])
    if rows != embedded:
        raise CheckpointError(
            f"{source}: has {rows} classes, but {embedded} in denoising; one for semantic maps cannot be read"
        )
    task = detectron.task_of(rows)
    model = {
        "name": "maskdino_r50",
        "num_queries": 300,  # of all published ones; not in the weights
        "encoder_ffn_width": len(state[f"{PIXELS}transformer.encoder.layers.0.linear1.weight"]),
        "mask_anchors": task == "instance",
    }
    classes = reading.dense_class_map(rows)
    return {"state": state, "model": model, "classes": classes, "config": "maskdino_r50_coco", "task": task}


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict with every tensor once and levels from fine to coarse, still under their names.

    Raises:
        CheckpointError: what the published model shares differs.
    """
    levels, turned = len(state[LEVELS]), {}
    for key, value in reading.without_copies(state, COPIES).items():
        placed = re.search(r"\.cross_attn\.(sampling_offsets|attention_weights)\.", key)
        turned[key] = detectron.other_way_round(value, levels) if placed else value
    return turned


def rename(state: Mapping[str, Tensor], heads: Mapping[str, Head]) -> dict[str, Tensor]:
    """Their state dict under our names and in our order.

    Raises:
        CheckpointError: a key belongs to nothing, or what the published model shares differs.
    """
    return reading.rename(translate(state), RULES, "maskdino", heads)
