"""Metrics that several tasks share."""

from queryvision.evaluation.coco import CocoEvaluator, coco_records, evaluate
from queryvision.evaluation.panoptic import PanopticEvaluator
from queryvision.evaluation.panoptic_files import write_panoptic

__all__ = ["CocoEvaluator", "PanopticEvaluator", "coco_records", "evaluate", "write_panoptic"]
