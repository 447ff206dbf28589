"""The named wholes: a core builder with detection heads, published numbers inside.

Each takes `num_classes` and the keyword arguments of the builder of the same name, and gives a model of its own weights.
"""

from __future__ import annotations

from typing import Any

from queryvision.head import Fit, Head, Steering
from queryvision.model import builders
from queryvision.model.builders import HeadParts
from queryvision.model.query_model import QueryModel
from queryvision.tasks.detection.boxes import BoxHead
from queryvision.tasks.detection.labels import LabelHead

STEERING = Steering(rank="labels", first="boxes", later="boxes", quality=("boxes",))


def detr_r50(num_classes: int, **arguments: Any) -> QueryModel:
    """DETR-R50 for boxes. COCO's own checkpoints have 91 classes: all ids 0..90."""
    return builders.detr_r50(_heads(num_classes), STEERING, **arguments)


def detr_r101(num_classes: int, **arguments: Any) -> QueryModel:
    """DETR-R101 for boxes."""
    return builders.detr_r101(_heads(num_classes), STEERING, **arguments)


def detr_small(num_classes: int, **arguments: Any) -> QueryModel:
    """A DETR for laptops."""
    return builders.detr_small(_heads(num_classes), STEERING, **arguments)


def deformable_detr_r50(num_classes: int, **arguments: Any) -> QueryModel:
    """Deformable DETR-R50 for boxes; `refine=True`, `two_stage=True`."""
    return builders.deformable_detr_r50(_heads(num_classes, weight=2.0), STEERING, **arguments)


def dino_r50(num_classes: int, **arguments: Any) -> QueryModel:
    """DINO-R50 for boxes."""
    return builders.dino_r50(_heads(num_classes), STEERING, **arguments)


def dino_vit(num_classes: int, **arguments: Any) -> QueryModel:
    """DINO on a plain ViT for boxes."""
    return builders.dino_vit(_heads(num_classes), STEERING, **arguments)


def dino_small(num_classes: int, **arguments: Any) -> QueryModel:
    """A DINO for laptops, with labels taught as high as their boxes are good (MAL)."""
    return builders.dino_small(_heads(num_classes, loss="mal"), STEERING, **arguments)


def rtdetrv2_r18(num_classes: int, **arguments: Any) -> QueryModel:
    """RT-DETRv2-S for boxes."""
    return builders.rtdetrv2_r18(_heads(num_classes, 1.0, loss="varifocal"), STEERING, **arguments)


def rtdetrv2_r50(num_classes: int, **arguments: Any) -> QueryModel:
    """RT-DETRv2-L for boxes."""
    return builders.rtdetrv2_r50(_heads(num_classes, 1.0, loss="varifocal"), STEERING, **arguments)


def dfine_s(num_classes: int, **arguments: Any) -> QueryModel:
    """D-FINE-S for boxes."""
    return builders.dfine_s(_heads(num_classes, 1.0, loss="varifocal"), STEERING, **arguments)


def dfine_m(num_classes: int, **arguments: Any) -> QueryModel:
    """D-FINE-M for boxes."""
    return builders.dfine_m(_heads(num_classes, 1.0, loss="varifocal"), STEERING, **arguments)


def dfine_l(num_classes: int, **arguments: Any) -> QueryModel:
    """D-FINE-L for boxes."""
    return builders.dfine_l(_heads(num_classes, 1.0, loss="varifocal"), STEERING, **arguments)


def dfine_small(num_classes: int, **arguments: Any) -> QueryModel:
    """A D-FINE for laptops, with labels taught as high as their boxes are good (MAL)."""
    return builders.dfine_small(_heads(num_classes, 1.0, loss="mal", label_scale=0.1), STEERING, **arguments)


def _heads(num_classes: int, box_noise: float = 0.4, **labels: Any) -> HeadParts:
    def make(fit: Fit) -> list[Head]:
        return [LabelHead(fit, num_classes, **labels), BoxHead(fit, box_noise=box_noise)]

    return make
