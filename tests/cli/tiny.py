"""A model so small that a step takes a tenth of a second, and how commands are run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass

TINY = (
    "--set", "model={name: detr, backbone: resnet18, width: 32, num_heads: 4, ffn_width: 64, encoder_layers: 1, "
    "decoder_layers: 2, num_queries: 12}", "--set", "heads={}", "--image-size", "64", "--batch-size", "4", "--weights", "none",
)  # fmt: skip
"""Flags of a model that trains a step in a tenth of a second, whatever the preset's model is."""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


Call = Callable[..., Done]
