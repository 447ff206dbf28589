"""Panoptic segmentation: a segment for every pixel, things and stuff from the same queries; semantic maps fall out."""

from queryvision.tasks.panoptic.attention_masks import AttentionMaskHead
from queryvision.tasks.panoptic.merging import merge, semantic
from queryvision.tasks.panoptic.task import TASK

__all__ = ["TASK", "AttentionMaskHead", "merge", "semantic"]
