"""Box detection: heads for anybody's research code, the task, and the named wholes."""

from queryvision.tasks.detection.boxes import BoxHead
from queryvision.tasks.detection.labels import LabelHead
from queryvision.tasks.detection.models import (
    deformable_detr_r50,
    detr_r50,
    detr_r101,
    detr_small,
    dfine_l,
    dfine_m,
    dfine_s,
    dfine_small,
    dino_r50,
    dino_small,
    dino_vit,
    rtdetrv2_r18,
    rtdetrv2_r50,
)
from queryvision.tasks.detection.task import TASK

__all__ = [
    "TASK",
    "BoxHead",
    "LabelHead",
    "deformable_detr_r50",
    "detr_r50",
    "detr_r101",
    "detr_small",
    "dfine_l",
    "dfine_m",
    "dfine_s",
    "dfine_small",
    "dino_r50",
    "dino_small",
    "dino_vit",
    "rtdetrv2_r18",
    "rtdetrv2_r50",
]
