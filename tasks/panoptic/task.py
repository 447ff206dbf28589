"""The panoptic task: the heads of instance segmentation, for things and stuff, and one map out of their masks; PQ and mIoU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from queryvision.data.classes import ClassMap
from queryvision.evaluation.panoptic import PanopticEvaluator
from queryvision.evaluation.panoptic_files import write_panoptic
from queryvision.head import Fit, Head
from queryvision.inference.drawing import draw_segments, segment_colors
from queryvision.masks import SegmentMasks
from queryvision.results import Result
from queryvision.structures import Picks, Round
from queryvision.task import Evaluator, Fields, HeadSpec, Task
from queryvision.tasks.detection.labels import LabelHead, pick_by_labels
from queryvision.tasks.instance.masks import MaskHead
from queryvision.tasks.instance.task import HEADS as INSTANCE_HEADS
from queryvision.tasks.instance.task import STEERING
from queryvision.tasks.panoptic.attention_masks import AttentionMaskHead
from queryvision.tasks.panoptic.merging import merge, semantic


def by_attention(fit: Fit) -> bool:
    """Whether an architecture's masks are made of attention maps."""
    return bool(fit.maps)


def by_pixels(fit: Fit) -> bool:
    """Whether they are read from a pixel map."""
    return not fit.maps


HEADS = {  # both mask heads are called `masks`: a model has one of them
    **INSTANCE_HEADS,
    "masks": replace(INSTANCE_HEADS["masks"], unless=by_attention),
    "attention_masks": HeadSpec(AttentionMaskHead, unless=by_pixels),
}


def _finish(heads: Mapping[str, Head], round: Round, results: list[Result]) -> list[Result]:
    """Merges each image's masks by the mask head's rule, and says the class of each pixel.

    With a temperature all queries take part, not only what was picked (maskdino:maskdino.py, panoptic_inference).
    """
    labels, masks = cast(LabelHead, heads["labels"]), cast(MaskHead | AttentionMaskHead, heads["masks"])
    probabilities, least = labels.probabilities(round), masks.least
    if masks.temperature:
        sharp = (probabilities / masks.temperature).softmax(-1)
        results = _by_query(heads, round, results, sharp, probabilities.amax(-1) > least)
        probabilities, least = sharp, 0.0
    everybody = torch.arange(probabilities.shape[1], device=probabilities.device).expand(len(results), -1)
    sources = masks.masks_of(round, everybody, torch.tensor([result.size for result in results]))
    finished = []
    for result, likely, source in zip(results, probabilities, sources, strict=True):
        merged = merge(result, rule=masks.merging, least=least, overlap=masks.overlap)
        finished.append(replace(merged, maps={**merged.maps, "semantic": semantic(likely, source)}))
    return finished


def _by_query(heads: Mapping[str, Head], round: Round, results: list[Result], likely: Tensor, keep: Tensor) -> list[Result]:
    """Every query as an object of its best class, best first; what is not kept has the score 0.

    Args:
        heads: of the model.
        round: the final stage.
        results: whose objects are replaced.
        likely: (B,Q,C) class probabilities.
        keep: (B,Q) bool.
    """
    scores, classes = likely.max(-1)
    scores, queries = scores.masked_fill(~keep, 0.0).sort(dim=1, descending=True, stable=True)
    picks, sizes = Picks(queries, classes.gather(1, queries), scores), torch.tensor([result.size for result in results])
    values: Fields = {}
    for name in round.answers:
        values.update(heads[name].decode(round, picks, sizes.to(scores.device)))
    return [
        replace(result, scores=scores[i], labels=picks.classes[i], values={name: value[i] for name, value in values.items()})
        for i, result in enumerate(results)
    ]


def _evaluator(ground_truth: dict[str, Any], classes: ClassMap, backend: str) -> Evaluator:
    return PanopticEvaluator(ground_truth, classes, backend)  # type: ignore[arg-type]


def _draw(picture: Image.Image, result: Result) -> Image.Image:
    segments = cast(SegmentMasks, result.values["masks"])
    labels = result.labels.tolist()
    colors = segment_colors(labels, result.classes)
    return draw_segments(picture, segments.rows().numpy(), result.names, colors)


def _records(result: Result, image_id: int) -> list[dict[str, Any]]:
    """One row for each segment; the map itself is a file of its own."""
    areas = torch.bincount(cast(SegmentMasks, result.values["masks"]).rows().flatten(), minlength=len(result) + 1)[1:]
    rows = zip(result.labels.tolist(), result.scores.tolist(), areas.tolist(), strict=True)
    return [
        {"image_id": image_id, "category_id": result.classes.ids[label], "score": score, "area": area}
        for label, score, area in rows
    ]


TASK = Task(
    name="panoptic",
    summary="one segment for every pixel, things and stuff (PQ, mIoU)",
    needs=("labels", "boxes", "masks"),
    heads=HEADS,
    steering=STEERING,
    pick=pick_by_labels,
    evaluator=_evaluator,
    draw=_draw,
    records=_records,
    main_metric="PQ",
    finish=_finish,
    source="panoptic",
    save=write_panoptic,
)
