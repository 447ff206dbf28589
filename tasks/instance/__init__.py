"""Instance segmentation: the mask head for anybody's research code, the task, and the named wholes."""

from queryvision.tasks.instance.masks import MaskHead
from queryvision.tasks.instance.task import TASK

__all__ = ["TASK", "MaskHead"]
