"""Reader of the D-FINE checkpoints of `transformers` (ustc-community/dfine-small-coco ...).

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
from queryvision.weights.trunks import count

TASK = "detection"
NEEDED = (
    "model.enc_output.0.weight",
    "model.enc_score_head.weight",
    "model.encoder_input_proj.0.0.weight",
    "model.encoder.fpn_blocks.0.csp_rep1.conv1.conv.weight",
    "model.decoder.layers.0.gateway.gate.weight",
    "model.decoder.layers.0.fc1.weight",
    "model.decoder.pre_bbox_head.layers.0.weight",
    "model.decoder.bbox_embed.0.layers.2.weight",
    "model.decoder.reg_scale",
    "model.decoder.up",
)
"""What tells these checkpoints from others."""
FIXED = {**hybrid.FIXED, "top_prob_values": 4, "lqe_hidden_dim": 64, "lqe_layers": 2}
"""Settings that can be read with these values only."""
DEPTHS = {1: 0.34, 2: 0.67, 3: 1.0}
"""By the blocks of a branch: how the published settings say it."""
NAMED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dfine_s": ("hgnetv2_b0", {"decoder_layers": 3, "expansion": 0.5, "depth": 0.34}),
    "dfine_m": ("hgnetv2_b2", {"decoder_layers": 4, "depth": 0.67}),
    "dfine_l": ("hgnetv2_b4", {}),
}
"""{builder: its backbone, and where it differs from `dfine`}."""
PRESETS = {"hgnetv2_b0": "s", "hgnetv2_b1": "s", "resnet18vd": "s", "hgnetv2_b2": "m", "hgnetv2_b3": "m", "resnet34vd": "m"}
"""By the backbone; others: l."""


def read(source: str) -> dict[str, Any]:
    """Reads a file of `transformers`; which size it is is told by its tensors.

    Args:
        source: path or URL of a .safetensors file, or a folder with `model.safetensors`.

    Returns:
        {"state": their state dict, "model": {"name": builder, keyword arguments}, "heads": {"boxes": its bins}, "classes":
        ClassMap, "config": preset}.

    Raises:
        CheckpointError: it is something else, or layers follow the one that answers.
    """
    state, settings = hybrid.open_checked(source, ("d_fine",), NEEDED, FIXED)
    sizes, points = hybrid.common_sizes(state, settings, source)
    layers, answers = sizes["decoder_layers"], count(state, r"^model\.decoder\.lqe_layers\.(\d+)\.")
    last = settings.get("eval_idx", -1)
    if layers != answers or last not in (-1, layers - 1):
        raise CheckpointError(f"{source}: decoder layers follow the one that answers (eval_idx = {last}); these cannot be read")
    deep = len(state["model.encoder.fpn_blocks.0.csp_rep1.conv1.conv.weight"])
    blocks = count(state, r"^model\.encoder\.fpn_blocks\.0\.csp_rep1\.bottlenecks\.(\d+)\.")
    sizes |= {
        "num_points": tuple(points),
        "expansion": hybrid.share(deep, sizes["encoder_width"] // 2),
        "depth": DEPTHS.get(blocks, blocks / 3),
    }
    boxes = {
        "bins": len(state["model.decoder.bbox_embed.0.layers.2.weight"]) // 4 - 1,
        "bound": abs(float(state["model.decoder.up"])),
        "scale": abs(float(state["model.decoder.reg_scale"])),
    }
    return {
        "state": state,
        "model": hybrid.by_name(builders.dfine, sizes, NAMED),
        "heads": {"boxes": boxes},
        "classes": reading.classes_of(len(state["model.enc_score_head.weight"]), settings, source),
        "config": f"dfine_{PRESETS.get(sizes['backbone'].split('.')[0], 'l')}_coco",
    }


def rename(state: Mapping[str, Tensor], heads: Mapping[str, Head]) -> dict[str, Tensor]:
    """Their state dict under our names and of our shapes.

    Raises:
        CheckpointError: a key belongs to nothing, or what the published model shares differs.
    """
    renamed = {key.replace(".reg_conf.", "."): value for key, value in hybrid.translate(state).items()}
    return reading.rename(renamed, hybrid.RULES, "dfine", heads)
