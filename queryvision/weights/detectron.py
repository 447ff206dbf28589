"""What checkpoints of projects on detectron2 share: Mask2Former's and Mask DINO's, with ResNet-50.

Legend: L levels of the pixel decoder, H attention heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from queryvision.errors import CheckpointError
from queryvision.weights import reading
from queryvision.weights.pickles import read_pickle
from queryvision.weights.sources import fetch

HEADS = 8
"""H of all published ones."""
PIXELS = "sem_seg_head.pixel_decoder."
PREDICTOR = "sem_seg_head.predictor."
_STAGES = tuple((f"res{number}", f"layer{number - 1}") for number in (2, 3, 4, 5))
PARTS: reading.Rules = (
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.body.bn1."),
    (r"^backbone\.stem\.conv1\.", "backbone.body.conv1."),
    *(
        rule
        for theirs, ours in _STAGES
        for rule in (
            (rf"^backbone\.{theirs}\.(\d+)\.conv(\d)\.norm\.", rf"backbone.body.{ours}.\1.bn\2."),
            (rf"^backbone\.{theirs}\.(\d+)\.conv(\d)\.", rf"backbone.body.{ours}.\1.conv\2."),
            (rf"^backbone\.{theirs}\.(\d+)\.shortcut\.norm\.", rf"backbone.body.{ours}.\1.downsample.1."),
            (rf"^backbone\.{theirs}\.(\d+)\.shortcut\.", rf"backbone.body.{ours}.\1.downsample.0."),
        )
    ),
    (rf"^{re.escape(PIXELS)}input_proj\.", "neck.levels."),
    (rf"^{re.escape(PIXELS)}transformer\.level_embed$", "encoder.levels"),
    (rf"^{re.escape(PIXELS)}transformer\.encoder\.layers\.(\d+)\.(linear[12])\.", r"encoder.layers.\1.ffn.\2."),
    (rf"^{re.escape(PIXELS)}transformer\.encoder\.layers\.", "encoder.layers."),
    (rf"^{re.escape(PIXELS)}mask_features\.", "pixels.project."),
    (rf"^{re.escape(PIXELS)}adapter_1\.norm\.", "pixels.lateral.norm."),
    (rf"^{re.escape(PIXELS)}adapter_1\.", "pixels.lateral.conv."),
    (rf"^{re.escape(PIXELS)}layer_1\.norm\.", "pixels.output.norm."),
    (rf"^{re.escape(PIXELS)}layer_1\.", "pixels.output.conv."),
)
"""Backbone and pixel decoder."""


def open_state(source: str) -> dict[str, Tensor]:
    """The state dict of a `.pkl` of numpy arrays or of a `.pth`, under the present names; older ones lacked a part of some.

    Args:
        source: path or URL.

    Returns:
        The state dict without what belongs to the loss; empty where the file holds none.

    Raises:
        CheckpointError: the file is missing, damaged, or could run code.
    """
    path = fetch(source)
    if path.suffix == ".pkl":
        content = read_pickle(path)
        found = content.get("model") if isinstance(content, dict) else None
        state = found if isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values()) else {}
    else:
        state = reading.open_state(source)
    named = {}
    for key, value in state.items():
        key = re.sub(r"^sem_seg_head\.(?!pixel_decoder\.|predictor\.)", PIXELS, key)
        key = key.replace(f"{PREDICTOR}static_query.", f"{PREDICTOR}query_feat.")
        if not key.startswith("criterion.") and key not in ("pixel_mean", "pixel_std"):
            named[key] = value
    return named


def check(source: str, state: Mapping[str, Tensor], project: str, needed: tuple[str, ...]) -> None:
    """Raises a CheckpointError where needed tensors are missing, or the backbone is no ResNet-50."""
    missing = [key for key in needed if key not in state]
    if missing:
        raise CheckpointError(f"{source}: is no checkpoint of {project}, it lacks {missing[0]}")
    blocks = {key.split(".")[2] for key in state if key.startswith("backbone.res4.")}
    if len(blocks) != 6 or "backbone.res2.0.conv3.weight" not in state:
        kind = "a Swin transformer" if any(key.startswith("backbone.patch_embed.") for key in state) else "another one"
        raise CheckpointError(f"{source}: its backbone is {kind}; only checkpoints with ResNet-50 can be read")


def task_of(rows: int) -> str:
    """The task of a checkpoint with so many classes: COCO's 133 are things and stuff, others are taken for objects."""
    return "panoptic" if rows == 133 else "instance"


def other_way_round(value: Tensor, num_levels: int) -> Tensor:
    """Weight or bias (H*L*..., ...) of what places or weighs deformable attention's points, its levels in reverse order."""
    return value.view(HEADS, num_levels, -1, *value.shape[1:]).flip(1).reshape(value.shape)
