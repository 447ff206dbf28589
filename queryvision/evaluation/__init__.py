"""Metrics that several tasks share."""

from queryvision.evaluation.coco import CocoEvaluator, coco_records, evaluate

__all__ = ["CocoEvaluator", "coco_records", "evaluate"]
