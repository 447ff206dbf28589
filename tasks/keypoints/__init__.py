"""Keypoints: the head for anybody's research code, and the task."""

from queryvision.tasks.keypoints.keypoints import KeypointHead
from queryvision.tasks.keypoints.task import TASK

__all__ = ["TASK", "KeypointHead"]
