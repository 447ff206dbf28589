"""Reader of the checkpoints of facebookresearch/Mask2Former with ResNet-50 (`.pkl` or `.pth`), instance and panoptic.

The core's keys are mapped here; a head maps its own (`Head.published`). Their levels go from coarse to fine, ours from fine to
coarse: whatever has a row or a block for each level is turned round.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from queryvision.head import Head
from queryvision.weights import detectron, reading
from queryvision.weights.detectron import PIXELS, PREDICTOR

TASK = "instance"
_QUERIES = rf"^{re.escape(PREDICTOR)}"
RULES: reading.Rules = (
    *detectron.PARTS,
    (rf"{_QUERIES}query_feat\.", "queries.states."),
    (rf"{_QUERIES}query_embed\.", "queries.positions."),
    (rf"{_QUERIES}level_embed\.weight$", "pixels.marks"),
    (rf"{_QUERIES}decoder_norm\.", "decoder.norm."),
    (rf"{_QUERIES}transformer_self_attention_layers\.(\d+)\.self_attn\.", r"decoder.layers.\1.self_attn."),
    (rf"{_QUERIES}transformer_self_attention_layers\.(\d+)\.norm\.", r"decoder.layers.\1.norm1."),
    (rf"{_QUERIES}transformer_cross_attention_layers\.(\d+)\.multihead_attn\.", r"decoder.layers.\1.cross_attn.attention."),
    (rf"{_QUERIES}transformer_cross_attention_layers\.(\d+)\.norm\.", r"decoder.layers.\1.norm2."),
    (rf"{_QUERIES}transformer_ffn_layers\.(\d+)\.(linear[12])\.", r"decoder.layers.\1.ffn.\2."),
    (rf"{_QUERIES}transformer_ffn_layers\.(\d+)\.norm\.", r"decoder.layers.\1.norm3."),
)
LEVELS = f"{PIXELS}transformer.level_embed"
NEEDED = (
    f"{PREDICTOR}query_feat.weight",
    f"{PREDICTOR}query_embed.weight",
    f"{PREDICTOR}class_embed.weight",
    f"{PREDICTOR}transformer_cross_attention_layers.0.norm.weight",
    LEVELS,
)
"""What tells these checkpoints from others."""


def read(source: str) -> dict[str, Any]:
    """Reads a published file.

    Args:
        source: path or URL.

    Returns:
        {"state": their state dict, "model": {"name": builder, keyword arguments}, "classes": ClassMap, "config": preset,
        "task": panoptic with COCO's 133 classes, else instance}.

    Raises:
        CheckpointError: it is something else.
    """
    state = detectron.open_state(source)
    detectron.check(source, state, "facebookresearch/Mask2Former", NEEDED)
    rows = len(state[f"{PREDICTOR}class_embed.weight"]) - 1  # the last is no-object
    return {
        "state": state,
        "model": {"name": "mask2former_r50", "num_queries": len(state[NEEDED[0]])},
        "classes": reading.dense_class_map(rows),
        "config": "mask2former_r50_coco",
        "task": detectron.task_of(rows),
    }


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict with levels from fine to coarse, still under their names."""
    levels, turned = len(state[LEVELS]), {}
    for key, value in state.items():
        if key in (LEVELS, f"{PREDICTOR}level_embed.weight"):
            value = value.flip(0)
        elif key.startswith(f"{PIXELS}input_proj."):
            number, rest = key.removeprefix(f"{PIXELS}input_proj.").split(".", 1)
            key = f"{PIXELS}input_proj.{levels - 1 - int(number)}.{rest}"
        elif re.search(r"\.self_attn\.(sampling_offsets|attention_weights)\.", key):
            value = detectron.other_way_round(value, levels)
        turned[key] = value
    return turned


def rename(state: Mapping[str, Tensor], heads: Mapping[str, Head]) -> dict[str, Tensor]:
    """Their state dict under our names and in our order.

    Raises:
        CheckpointError: a key belongs to nothing.
    """
    return reading.rename(translate(state), RULES, "mask2former", heads)
