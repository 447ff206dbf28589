"""Reader of the checkpoints of IDEA-Research/DINO with ResNet-50, on four and on five levels.

The core's keys are mapped here; a head maps its own (`Head.published`). All 91 rows of the classifiers are kept: ids 0..90 of
COCO. `label_enc` has a row more than there are classes, which nothing uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from queryvision.errors import CheckpointError
from queryvision.head import Head
from queryvision.weights import reading
from queryvision.weights.deformable_detr import IN_DECODER, OF_LAYERS, PARTS

TASK = "detection"
RULES: reading.Rules = (
    *PARTS,
    (r"^transformer\.tgt_embed\.weight$", "queries.start.states"),
    (r"^transformer\.decoder\.norm\.", "decoder.norm."),
    (r"^transformer\.decoder\.ref_point_head\.", "decoder.positions.anchors."),
)
NEEDED = (
    "transformer.tgt_embed.weight",
    "transformer.enc_out_class_embed.weight",
    "transformer.level_embed",
    "class_embed.0.weight",
    "input_proj.0.0.weight",
    "label_enc.weight",
)
"""What tells these checkpoints from others."""
PRESETS = {4: "dino_r50_coco", 5: "dino_r50_5scale_coco"}
"""By the number of levels."""


def read(source: str) -> dict[str, Any]:
    """Reads a published file; averaged weights are taken where it holds any.

    Args:
        source: path or URL.

    Returns:
        {"state": their state dict, "model": {"name": builder, keyword arguments}, "classes": ClassMap, "config": preset}.

    Raises:
        CheckpointError: it is something else.
    """
    state = reading.open_state(source, ("ema_model", "model"))
    missing = [key for key in NEEDED if key not in state]
    if missing:
        raise CheckpointError(f"{source}: is no checkpoint of IDEA-Research/DINO, it lacks {missing[0]}")
    reading.check_resnet50(source, state)
    levels, finest = state["transformer.level_embed"].shape[0], state["input_proj.0.0.weight"].shape[1]
    if (levels, finest) not in ((4, 512), (5, 256)):
        raise CheckpointError(
            f"{source}: has {levels} levels, the finest of {finest} channels; only 4 (from stride 8) or 5 (from 4) can be read"
        )
    return {
        "state": state,
        "model": {"name": "dino_r50", "num_levels": levels, "num_queries": state["transformer.tgt_embed.weight"].shape[0]},
        "classes": reading.class_map(state["class_embed.0.weight"].shape[0]),
        "config": PRESETS[levels],
    }


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict with every tensor once and of our shapes, still under their names.

    Raises:
        CheckpointError: what the published model shares differs, or classes lack their row in `label_enc`.
    """
    state = reading.without_copies(reading.without_copies(state, IN_DECODER), OF_LAYERS)
    embedded, classes = state["label_enc.weight"], state["class_embed.0.weight"].shape[0]
    if len(embedded) < classes:
        raise CheckpointError(f"the checkpoint's 'label_enc.weight' has {len(embedded)} rows for {classes} classes")
    states = state["transformer.tgt_embed.weight"][:, None]
    return {**state, "label_enc.weight": embedded[:classes], "transformer.tgt_embed.weight": states}


def rename(state: Mapping[str, Tensor], heads: Mapping[str, Head]) -> dict[str, Tensor]:
    """Their state dict under our names and of our shapes.

    Raises:
        CheckpointError: a key belongs to nothing, or what the published model shares differs.
    """
    return reading.rename(translate(state), RULES, "dino", heads)
