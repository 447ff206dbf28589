"""Box detection: heads for anybody's research code, the task, and the named wholes."""

from queryvision.tasks.detection.boxes import BoxHead
from queryvision.tasks.detection.labels import LabelHead
from queryvision.tasks.detection.models import detr_r50, detr_r101, detr_small
from queryvision.tasks.detection.task import TASK

__all__ = ["TASK", "BoxHead", "LabelHead", "detr_r50", "detr_r101", "detr_small"]
