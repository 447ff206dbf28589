"""Backbones in checkpoints of `transformers`: RT-DETR's ResNets and HGNet-v2, told by their tensors, under timm's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from queryvision.errors import CheckpointError

PREFIX = "model.backbone.model."
RESNETS: Mapping[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18vd",
    (False, (3, 4, 6, 3)): "resnet34vd",
    (True, (3, 4, 6, 3)): "resnet50d",
    (True, (3, 4, 23, 3)): "resnet101d",
}
"""By whether blocks are bottlenecks, and blocks a stage."""
HGNETS: Mapping[tuple[int, int, tuple[int, ...]], str] = {
    (16, 3, (1, 1, 2, 1)): "hgnetv2_b0",
    (32, 3, (1, 1, 2, 1)): "hgnetv2_b1",
    (32, 4, (1, 1, 3, 1)): "hgnetv2_b2",
    (32, 5, (1, 1, 3, 1)): "hgnetv2_b3",
    (48, 6, (1, 1, 3, 1)): "hgnetv2_b4",
    (64, 6, (1, 2, 5, 2)): "hgnetv2_b5",
    (96, 6, (2, 3, 6, 3)): "hgnetv2_b6",
}
"""By channels and layers of the first block, and blocks a stage."""


def backbone_of(state: Mapping[str, Tensor], source: str) -> tuple[str, list[int]]:
    """Its name, and the channels of its four stages.

    Raises:
        CheckpointError: it is none of those that are known.
    """
    inner = {key.removeprefix(f"{PREFIX}encoder."): v for key, v in state.items() if key.startswith(PREFIX)}
    part = "blocks" if "stages.0.blocks.0.layers.0.convolution.weight" in inner else "layers"
    blocks = tuple(count(inner, rf"^stages\.{stage}\.{part}\.(\d+)\.") for stage in range(4))
    if part == "blocks":
        first = len(inner["stages.0.blocks.0.layers.0.convolution.weight"])
        name = HGNETS.get((first, count(inner, r"^stages\.0\.blocks\.0\.layers\.(\d+)\."), blocks))
        last = "blocks.0.aggregation.1"
    else:
        name = RESNETS.get(("stages.0.layers.0.layer.2.convolution.weight" in inner, blocks))
        last = f"layers.0.layer.{count(inner, r'^stages.0.layers.0.layer.([0-9]).convolution') - 1}"
    if name is None:
        raise CheckpointError(f"{source}: its backbone is none of {', '.join([*RESNETS.values(), *HGNETS.values()])}")
    return name, [len(inner[f"stages.{stage}.{last}.convolution.weight"]) for stage in range(4)]


def timm_key(key: str) -> str:
    """A tensor of the backbone under timm's name, behind the same prefix; other keys as they are."""
    if not key.startswith(PREFIX):
        return key
    key = key.removeprefix(PREFIX)
    if "embedder.embedder." in key or re.match(r"encoder\.stages\.\d+\.layers\.", key):
        return PREFIX + _resnet_name(key)
    key = re.sub(r"^(embedder|encoder)\.", lambda m: "stem." if m[1] == "embedder" else "", key)
    return PREFIX + key.replace(".convolution.", ".conv.").replace(".normalization.", ".bn.")


def _resnet_name(key: str) -> str:
    key = key.replace("embedder.embedder.2.normalization.", "bn1.")
    key = re.sub(r"^embedder\.embedder\.(\d)\.(c|n)\w+", lambda m: f"conv1.{3 * int(m[1]) + (m[2] == 'n')}", key)
    key = re.sub(r"^encoder\.stages\.(\d)\.layers\.", lambda m: f"layer{int(m[1]) + 1}.", key)
    key = re.sub(r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}", key)
    key = re.sub(r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}", key)
    return re.sub(r"shortcut\.(?:1\.)?(c|n)\w+", lambda m: f"downsample.{1 if m[1] == 'c' else 2}", key)


def count(state: Mapping[str, Any], pattern: str) -> int:
    """How many numbers the first group of a pattern takes."""
    return len({found[1] for found in (re.search(pattern, key) for key in state) if found})
