"""From masks that may overlap to one map: the segments of a panoptic result, or the class of every pixel.

Both work through the masks a few at a time: all masks of an image in floating point are never there at once.

Letters: k objects, Q queries, C classes, H, W pixels of the original image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from queryvision.masks import Masks, SegmentMasks, enlarged
from queryvision.results import Result

Rule = Literal["mask2former", "detr"]
CHUNK = 8
"""Maps of (H,W) in floating point at a time."""
SMALL = 4
"""Pixels of a segment that rule `detr` still removes, as published."""


def merge(result: Result, *, rule: Rule = "mask2former", least: float = 0.8, overlap: float = 0.8) -> Result:
    """Gives each pixel to one object at most; stuff of one class becomes one segment, with the best score of its parts.

    Rule `mask2former` (arXiv 2112.01527, mask2former:maskformer_model.py, panoptic_inference): a pixel goes to the greatest
    score times probability, and stays with it where that object's own probability is at least one half. An object that wins
    too little of its mask is dropped, and its pixels are nobody's.

    Rule `detr` (arXiv 2005.12872, detr:models/segmentation.py, PostProcessPanoptic): a pixel goes to the greatest logit, so
    none stays nobody's. Segments of at most 4 pixels give theirs to the others, again and again. Where several objects are the
    same stuff all their pixels stay; the published code keeps the first object's and hands out the others' anew.

    Args:
        result: of one image, best first; `values["masks"]` is a `Masks`.
        rule: who gets a pixel and who is dropped.
        least: an object takes part if its score is above it; published are 0.8, for DETR 0.85.
        overlap: of rule `mask2former`: least number of pixels won, as a share of those with a probability of one half.

    Returns:
        The segments, best first, with a `SegmentMasks`; other values are those of a segment's best object.

    Raises:
        TypeError: the result holds no `Masks`.
    """
    masks = result.values.get("masks")
    if not isinstance(masks, Masks):
        raise TypeError(f"only masks that may overlap can be merged; this result holds {type(masks).__name__}")
    chosen = (result.scores > least).nonzero()[:, 0]
    masks, scores, labels = masks[chosen], result.scores[chosen], result.labels[chosen]
    owner = torch.zeros(masks.size, dtype=torch.int64, device=scores.device)
    kept = torch.zeros(0, dtype=torch.int64, device=scores.device)
    if len(chosen):
        kinds = _kinds(labels, result.classes.things)
        owner = _detr(masks, kinds) if rule == "detr" else _mask2former(masks, scores.float(), overlap)
        owner, kept = _united(owner, kinds)
    rows = chosen[kept]
    values = {name: value[rows] for name, value in result.values.items() if name != "masks"}
    segments = SegmentMasks(torch.arange(1, len(rows) + 1, device=rows.device), owner.int())
    return replace(result, scores=result.scores[rows], labels=result.labels[rows], values={**values, "masks": segments})


def semantic(class_probabilities: Tensor, masks: Masks) -> Tensor:
    """The class of each pixel: the greatest sum over queries of class probability times mask probability.

    This is `semantic_inference` of Mask2Former (mask2former:maskformer_model.py).

    Args:
        class_probabilities: (Q,C), without that of "no object".
        masks: Q masks of the image.

    Returns:
        (H,W) int64 class index. Sums are taken on the cells of the map and are bilinear between them.
    """
    inside = masks.logits().sigmoid()
    sums = (class_probabilities.float().T @ inside.flatten(1)).view(-1, *inside.shape[1:])
    return _argmax(enlarged(part, masks.extent, masks.size) for part in torch.split(sums, CHUNK))[1]


def _mask2former(masks: Masks, scores: Tensor, overlap: float) -> Tensor:
    """(H,W) 1 + the row that a pixel belongs to, or 0."""
    areas: list[Tensor] = []

    def weighted() -> Iterator[Tensor]:
        for logits, part in zip(masks.full_logits(CHUNK), torch.split(scores, CHUNK), strict=True):
            probability = logits.sigmoid()
            areas.append((probability >= 0.5).flatten(1).sum(1))
            yield probability * part[:, None, None]

    best, owner = _argmax(weighted())
    won, area = torch.bincount(owner.flatten(), minlength=len(masks)), torch.cat(areas)
    stays = (area > 0) & (won / area.clamp(min=1) >= overlap)
    inside = best >= 0.5 * scores[owner]  # halving is exact, so this is whether the winner's own probability reaches one half
    return torch.where(stays[owner] & inside, owner + 1, 0)


def _detr(masks: Masks, kinds: Tensor) -> Tensor:
    """As `_mask2former`."""
    same = kinds[:, None] == kinds
    left = torch.arange(len(masks), device=kinds.device)
    while len(left):
        owner = left[_argmax(masks[left].full_logits(CHUNK))[1]]
        area = torch.bincount(owner.flatten(), minlength=len(masks))
        large = (same * area).sum(1)[left] > SMALL
        if large.all():
            return owner + 1
        left = left[large]
    return torch.zeros(masks.size, dtype=torch.int64, device=kinds.device)


def _argmax(chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The greatest value at each pixel and its row, of equal ones the first: (n,H,W) at a time -> (H,W), (H,W) int64."""
    best = owner = torch.empty(0)
    start = 0
    for values in chunks:
        value, row = values.max(0)
        owner = torch.where(value > best, row + start, owner) if start else row
        best = torch.maximum(value, best) if start else value
        start += len(values)
    return best, owner


def _kinds(labels: Tensor, things: tuple[bool, ...]) -> Tensor:
    """(k,) equal for objects that are the same stuff, different otherwise."""
    is_thing = torch.tensor(things, device=labels.device)[labels]
    return torch.where(is_thing, len(things) + torch.arange(len(labels), device=labels.device), labels)


def _united(owner: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Gives all pixels of the same stuff to its first object that has any.

    Args:
        owner: (H,W) 1 + row, or 0.
        kinds: (k,), see `_kinds`.

    Returns:
        The map with 1 + the place in the list of objects that remain, and that list: their rows, ascending.
    """
    rows = torch.arange(len(kinds), device=kinds.device)
    seen = torch.bincount(owner.flatten(), minlength=len(kinds) + 1)[1:] > 0
    same = (kinds[:, None] == kinds) & seen
    first = torch.where(same, rows, len(kinds)).amin(1)
    kept = (seen & (first == rows)).nonzero()[:, 0]
    table = torch.zeros(len(kinds) + 1, dtype=torch.int64, device=kinds.device)
    table[1:][kept] = torch.arange(1, len(kept) + 1, device=kinds.device)
    table[1:][seen] = table[1:][first[seen]]
    return table[owner], kept
