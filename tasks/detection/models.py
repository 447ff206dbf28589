"""The named wholes: a core builder with detection heads, published numbers inside.

Each takes `num_classes` and the keyword arguments of the builder of the same name, and gives a model of its own weights.
"""

from __future__ import annotations

from typing import Any

from queryvision.head import Head, Sizes, Steering
from queryvision.model import builders
from queryvision.model.query_model import QueryModel
from queryvision.tasks.detection.boxes import BoxHead
from queryvision.tasks.detection.labels import LabelHead

STEERING = Steering(rank="labels", first="boxes", later="boxes", quality=("boxes",))


def detr_r50(num_classes: int, **arguments: Any) -> QueryModel:
    """DETR-R50 for boxes. COCO's own checkpoints have 91 classes: all ids 0..90."""
    return builders.detr_r50(_softmax_heads(num_classes), STEERING, **arguments)


def detr_r101(num_classes: int, **arguments: Any) -> QueryModel:
    """DETR-R101 for boxes."""
    return builders.detr_r101(_softmax_heads(num_classes), STEERING, **arguments)


def detr_small(num_classes: int, **arguments: Any) -> QueryModel:
    """A DETR for laptops."""
    return builders.detr_small(_softmax_heads(num_classes), STEERING, **arguments)


def _softmax_heads(num_classes: int) -> Any:
    def make(sizes: Sizes) -> list[Head]:
        return [LabelHead(sizes.width, num_classes), BoxHead(sizes.width)]

    return make
