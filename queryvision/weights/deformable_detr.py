"""Reader of the checkpoints of fundamentalvision/Deformable-DETR: R50 on four levels, plain, refining, two-stage.

The core's keys are mapped here; a head maps its own (`Head.published`). All 91 rows of the classifier are kept: ids 0..90 of
COCO, each its own yes or no.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from queryvision.errors import CheckpointError
from queryvision.head import Head
from queryvision.weights import reading

TASK = "detection"
PARTS: reading.Rules = (
    (r"^backbone\.0\.body\.", "backbone.body."),
    (r"^input_proj\.", "neck.levels."),
    (r"^transformer\.level_embed$", "encoder.levels"),
    (r"^transformer\.(encoder|decoder)\.layers\.(\d+)\.(linear[12])\.", r"\1.layers.\2.ffn.\3."),
    (r"^transformer\.decoder\.layers\.(\d+)\.cross_attn\.", r"decoder.layers.\1.cross_attn.attention."),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm1\.", r"decoder.layers.\1.norm2."),  # theirs are numbered as they are written,
    (r"^transformer\.decoder\.layers\.(\d+)\.norm2\.", r"decoder.layers.\1.norm1."),  # ours as they are used
    (r"^transformer\.(encoder|decoder)\.layers\.", r"\1.layers."),
    (r"^transformer\.enc_output\.", "queries.project."),
    (r"^transformer\.enc_output_norm\.", "queries.norm."),
)
"""What DINO has, too."""
RULES: reading.Rules = (
    *PARTS,
    (r"^query_embed\.", "queries."),
    (r"^transformer\.reference_points\.", "queries.reference_points."),
    (r"^transformer\.pos_trans\.", "queries.start.project."),
    (r"^transformer\.pos_trans_norm\.", "queries.start.norm."),
)
IN_DECODER: reading.Rules = ((r"^transformer\.decoder\.((?:class|bbox)_embed\.)", r"\1"),)
"""Heads that the decoder holds once more."""
OF_LAYERS: reading.Rules = ((r"^((?:class|bbox)_embed)\.\d+\.", r"\1.0."),)
"""Heads that all layers share."""


def read(source: str) -> dict[str, Any]:
    """Reads a published file; which variant it is is told by its tensors.

    Args:
        source: path or URL.

    Returns:
        {"state": their state dict, "model": {"name": builder, keyword arguments}, "classes": ClassMap, "config": preset}.

    Raises:
        CheckpointError: it is something else.
    """
    state = reading.open_state(source)
    if "transformer.tgt_embed.weight" in state:
        raise CheckpointError(f"{source}: is a DINO checkpoint; read it with --from dino")
    refine, two_stage = _variant(state)
    needed = ("transformer.level_embed", "class_embed.0.weight", *(() if two_stage else ("query_embed.weight",)))
    missing = [key for key in needed if key not in state]
    if missing:
        raise CheckpointError(f"{source}: is no checkpoint of fundamentalvision/Deformable-DETR, it lacks {missing[0]}")
    reading.check_resnet50(source, state)
    levels = state["transformer.level_embed"].shape[0]
    if levels != 4:
        raise CheckpointError(f"{source}: is made for {levels} level(s); only checkpoints for 4 can be read")
    # the number of proposals is not in the weights; all published ones have 300
    queries = 300 if two_stage else state["query_embed.weight"].shape[0]
    variant = "_two_stage" if two_stage else "_refine" if refine else ""
    return {
        "state": state,
        "model": {"name": "deformable_detr_r50", "refine": refine, "two_stage": two_stage, "num_queries": queries},
        "classes": reading.class_map(state["class_embed.0.weight"].shape[0]),
        "config": f"deformable_detr_r50{variant}_coco",
    }


def _variant(state: Mapping[str, Tensor]) -> tuple[bool, bool]:
    """Whether layers refine the boxes of the one before, and whether queries are proposals."""
    return any(key.startswith("transformer.decoder.bbox_embed.") for key in state), "transformer.enc_output.weight" in state


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict with every tensor once and of our shapes, still under their names.

    The last set of a two-stage model's heads, which answers proposals, gets the name that it has in DINO. Of its class rows
    only the first is kept: proposals are ranked by it and by no other.

    Raises:
        CheckpointError: what the published model shares differs.
    """
    refine, two_stage = _variant(state)
    state = reading.without_copies(state, IN_DECODER)
    if not refine:
        state = reading.without_copies(state, OF_LAYERS)
    if "query_embed.weight" in state:
        positions, states = state["query_embed.weight"][:, None].chunk(2, -1)
        state = {k: v for k, v in state.items() if k != "query_embed.weight"}
        state |= {"query_embed.positions": positions, "query_embed.states": states}
    return _proposals(state) if two_stage else dict(state)


def _proposals(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    last = max(int(key.split(".")[1]) for key in state if key.startswith("class_embed."))
    named = {}
    for key, value in state.items():
        new = re.sub(rf"^(class|bbox)_embed\.{last}\.", r"transformer.enc_out_\1_embed.", key)
        named[new] = value[:1] if new.startswith("transformer.enc_out_class_embed.") else value
    return named


def rename(state: Mapping[str, Tensor], heads: Mapping[str, Head]) -> dict[str, Tensor]:
    """Their state dict under our names and of our shapes.

    Raises:
        CheckpointError: a key belongs to nothing, or what the published model shares differs.
    """
    return reading.rename(translate(state), RULES, "deformable_detr", heads)
