"""Reader of the RT-DETRv2 checkpoints of `transformers` (PekingU/rtdetr_v2_r18vd ...), and of RT-DETR's, which do the same.

The core's keys are mapped in `hybrid`; a head maps its own (`Head.published`). Pixels are not normalised, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from queryvision.errors import CheckpointError
from queryvision.head import Head
from queryvision.model import builders
from queryvision.weights import hybrid, reading

TASK = "detection"
NEEDED = (
    "model.enc_output.0.weight",
    "model.enc_score_head.weight",
    "model.encoder_input_proj.0.0.weight",
    "model.encoder.fpn_blocks.0.conv1.conv.weight",
    "model.decoder.layers.0.fc1.weight",
    "model.decoder.class_embed.0.weight",
)
"""What tells these checkpoints from others."""
NAMED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "rtdetrv2_r18": ("resnet18vd", {"decoder_layers": 3, "expansion": 0.5}),
    "rtdetrv2_r50": ("resnet50d", {}),
}
"""{builder: its backbone, and where it differs from `rtdetrv2`}."""


def read(source: str) -> dict[str, Any]:
    """Reads a file of `transformers`; which size it is is told by its tensors.

    Args:
        source: path or URL of a .safetensors file, or a folder with `model.safetensors`.

    Returns:
        {"state": their state dict, "model": {"name": builder, keyword arguments}, "classes": ClassMap, "config": preset}.

    Raises:
        CheckpointError: it is something else.
    """
    state, settings = hybrid.open_checked(source, ("rt_detr_v2", "rt_detr"), NEEDED)
    sizes, points = hybrid.common_sizes(state, settings, source)
    if len(set(points)) > 1:
        raise CheckpointError(f"{source}: samples {points} points on its levels; only the same number on all can be read")
    hidden, wide = state["model.encoder.fpn_blocks.0.conv1.conv.weight"].shape[0], sizes["encoder_width"]
    sizes |= {"num_points": points[0], "expansion": hybrid.share(hidden, wide)}
    return {
        "state": state,
        "model": hybrid.by_name(builders.rtdetrv2, sizes, NAMED),
        "classes": reading.classes_of(len(state["model.enc_score_head.weight"]), settings, source),
        "config": f"rtdetrv2_{'r18' if sizes['backbone'].startswith(('resnet18', 'resnet34')) else 'r50'}_coco",
    }


def rename(state: Mapping[str, Tensor], heads: Mapping[str, Head]) -> dict[str, Tensor]:
    """Their state dict under our names and of our shapes.

    Raises:
        CheckpointError: a key belongs to nothing, or what the published model shares differs.
    """
    return reading.rename(hybrid.translate(state), hybrid.RULES, "rtdetrv2", heads)
