"""Builders: plain arguments in, a model out. The published numbers stand here, as defaults.

A builder takes `heads` and `steering` first; its keyword arguments are the settings `model.*` of a configuration.
"""

from __future__ import annotations

from collections.abc import Callable

from queryvision.errors import ConfigError, nearest
from queryvision.model.builders.checks import HeadParts
from queryvision.model.builders.contrastive import dino, dino_r50, dino_small, dino_vit
from queryvision.model.builders.deformable import deformable_detr, deformable_detr_r50
from queryvision.model.builders.dense import detr, detr_masks_r50, detr_masks_r101, detr_r50, detr_r101, detr_small
from queryvision.model.builders.distributional import dfine, dfine_l, dfine_m, dfine_s, dfine_small
from queryvision.model.builders.hybrid import rtdetrv2, rtdetrv2_r18, rtdetrv2_r50
from queryvision.model.builders.mask_dino import maskdino, maskdino_r50
from queryvision.model.builders.masked import mask2former, mask2former_r50, mask2former_small
from queryvision.model.query_model import QueryModel

BUILDERS: tuple[Callable[..., QueryModel], ...] = (
    detr,
    detr_r50,
    detr_r101,
    detr_masks_r50,
    detr_masks_r101,
    detr_small,
    deformable_detr,
    deformable_detr_r50,
    dino,
    dino_r50,
    dino_vit,
    dino_small,
    rtdetrv2,
    rtdetrv2_r18,
    rtdetrv2_r50,
    dfine,
    dfine_s,
    dfine_m,
    dfine_l,
    dfine_small,
    mask2former,
    mask2former_r50,
    mask2former_small,
    maskdino,
    maskdino_r50,
)

__all__ = [
    "BUILDERS",
    "HeadParts",
    "builder",
    "deformable_detr",
    "deformable_detr_r50",
    "detr",
    "detr_masks_r50",
    "detr_masks_r101",
    "detr_r50",
    "detr_r101",
    "detr_small",
    "dfine",
    "dfine_l",
    "dfine_m",
    "dfine_s",
    "dfine_small",
    "dino",
    "dino_r50",
    "dino_small",
    "dino_vit",
    "mask2former",
    "mask2former_r50",
    "mask2former_small",
    "maskdino",
    "maskdino_r50",
    "rtdetrv2",
    "rtdetrv2_r18",
    "rtdetrv2_r50",
]


def builder(name: str) -> Callable[..., QueryModel]:
    """The builder of a name.

    Raises:
        ConfigError: there is none; the valid names are listed.
    """
    known = {build.__name__: build for build in BUILDERS}
    if name not in known:
        raise ConfigError(f"model.name: there is no builder '{name}'; {nearest(name, known)}")
    return known[name]
