"""A model so small that a step takes a tenth of a second, and how commands are run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass

TINY = (
    "--set", "model.name=detr", "--set", "model.backbone=resnet18", "--set", "model.width=32", "--set", "model.num_heads=4",
    "--set", "model.ffn_width=64", "--set", "model.encoder_layers=1", "--set", "model.decoder_layers=2",
    "--set", "model.num_queries=12", "--image-size", "64", "--batch-size", "4", "--weights", "none",
)  # fmt: skip
"""Flags of a model that trains a step in a tenth of a second."""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


Call = Callable[..., Done]
