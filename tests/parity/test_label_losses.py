"""Losses that teach the quality of a pair: varifocal against transformers' RT-DETR, MAL against its formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peers import peer_targets
from torch import Tensor

from queryvision.criterion import Criterion
from queryvision.data.collate import collate
from queryvision.data.sample import Annotations, Sample
from queryvision.errors import ConfigError
from queryvision.head import Fit, Steering
from queryvision.matching import match
from queryvision.ops.boxes import box_iou, cxcywh_to_xyxy
from queryvision.structures import Outputs, Round, Stage, Targets
from queryvision.tasks.detection import BoxHead, LabelHead

CLASSES = 5


def some_targets(covers: Tensor | None = None) -> Targets:
    import numpy as np

    samples = []
    for image, labels in enumerate(([1, 2, 2, 0], [4])):
        corners = np.array([[4 + 9 * i, 6 + 5 * i, 40 + 11 * i, 50 + 6 * i] for i in range(len(labels))], np.float32)
        ids = np.arange(len(labels))
        objects = Annotations(labels=np.array(labels), boxes=corners, areas=np.full(len(labels), 900, np.float32), ids=ids)
        samples.append(Sample(np.zeros((96, 96, 3), np.uint8), objects, image_id=image, original_size=(96, 96)))
    targets = collate(samples, CLASSES, ("labels", "boxes")).targets
    return targets if covers is None else replace(targets, covers=covers, covers_all=bool(covers.all()))


def some_round(targets: Targets, classes: int = CLASSES, **more: object) -> tuple[Round, Tensor]:
    """Two stages; some boxes lie on targets, so that qualities differ."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 2, 12, classes, generator=generator).requires_grad_()
    boxes = 0.2 + 0.4 * torch.rand(2, 2, 12, 4, generator=generator)
    boxes[:, 0, :4] = targets["boxes"][0] + 0.05 * torch.randn(2, 4, 4, generator=generator)
    boxes[:, 1, 7] = targets["boxes"][1, 0] + 0.02
    answers = {"labels": {"logits": logits}, "boxes": {"boxes": boxes.clamp(0.02, 0.98)}}
    stages = (Stage("layer", 0), Stage("layer", 1, last=True))
    return Round("main", stages, answers, {}, {}, **more), logits  # type: ignore[arg-type]


def class_losses(head: LabelHead, targets: Targets, round: Round) -> Tensor:
    """Of each stage, (S,)."""
    heads = {"labels": head, "boxes": BoxHead(8)}
    return Criterion(heads, Steering(quality=("boxes",)))(Outputs([round]), targets).stages[0]["labels.class"]


def test_varifocal_is_that_of_rt_detr() -> None:
    from transformers import RTDetrConfig
    from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher, RTDetrLoss

    config = RTDetrConfig(num_labels=CLASSES, matcher_class_cost=2.0, matcher_bbox_cost=5.0, matcher_giou_cost=2.0)
    judge = RTDetrLoss(config)
    assert isinstance(judge.matcher, RTDetrHungarianMatcher)
    targets = some_targets()
    round, logits = some_round(targets)
    mine = class_losses(LabelHead(8, CLASSES, loss="varifocal"), targets, round)
    theirs = []
    rows = peer_targets(targets)
    for stage in range(2):
        outputs = {"logits": logits[stage], "pred_boxes": round.answers["boxes"]["boxes"][stage]}
        pairs = judge.matcher(outputs, rows)
        theirs.append(judge.loss_labels_vfl(outputs, rows, pairs, 5)["loss_vfl"])
    torch.testing.assert_close(mine, torch.stack(theirs), atol=1e-5, rtol=1e-5)
    (by_mine,), (by_theirs,) = (torch.autograd.grad(x, logits, retain_graph=True) for x in (mine.sum(), sum(theirs)))
    torch.testing.assert_close(by_mine, by_theirs, atol=1e-6, rtol=1e-5)


def test_mal_is_its_formula() -> None:
    """-sum over all (query, class): cross entropy to q^g, weighted by 1 at pairs and p^g elsewhere (arXiv 2412.04234)."""
    targets = some_targets()
    round, logits = some_round(targets)
    head = LabelHead(8, CLASSES, loss="mal")
    mine = class_losses(head, targets, round)
    (found,), _ = match([round], {"labels": head, "boxes": BoxHead(8)}, targets)
    iou = box_iou(
        cxcywh_to_xyxy(found.predicted(round.answers["boxes"]["boxes"])), cxcywh_to_xyxy(found.wanted(targets["boxes"]))
    )
    assert iou.min() < 0.5 < iou.max()
    pairs = {
        (s, i, q): (t, float(u))
        for s, i, q, t, u in zip(*(x.tolist() for x in (found.stage, found.image, found.query, found.target)), iou, strict=True)
    }
    total = torch.zeros(2, dtype=torch.float64)
    for stage, image, query, kind in torch.cartesian_prod(*map(torch.arange, logits.shape)).tolist():
        p = logits[stage, image, query, kind].detach().double().sigmoid()
        target, quality = pairs.get((stage, image, query), (-1, 0.0))
        positive = target >= 0 and int(targets["labels"][image, target]) == kind
        wanted, weight = (quality**1.5, 1.0) if positive else (0.0, p**1.5)
        total[stage] += -weight * (wanted * p.log() + (1 - wanted) * (1 - p).log())
    torch.testing.assert_close(mine.double(), total / 5, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", ["focal", "varifocal", "mal"])
def test_proposals_of_one_class_are_taught_where_classes_are_missing(loss: str) -> None:
    covers = torch.ones(2, CLASSES, dtype=torch.bool)
    covers[0, 3] = False
    targets = some_targets(covers)
    round, logits = some_round(targets, classes=1, proposals=True)
    head = LabelHead(Fit(8, proposals="one", anchors=4), CLASSES, loss=loss)  # type: ignore[arg-type]
    (by_logits,) = torch.autograd.grad(class_losses(head, targets, round).sum(), logits)
    (found,), _ = match([round], {"labels": head, "boxes": BoxHead(8)}, targets)
    paired = torch.zeros(logits.shape[:3], dtype=torch.bool)
    paired[found.stage, found.image, found.query] = True
    assert bool((by_logits[..., 0][paired] != 0).all()), "pairs are objects, whatever else the image may hold"
    assert not by_logits[:, 0][~paired[:, 0]].any(), "what is no known object may be one of an unknown class"
    assert bool((by_logits[:, 1][~paired[:, 1]] > 0).all())


def test_softmax_cannot_rank_proposals() -> None:
    with pytest.raises(ConfigError, match="softmax.*set focal or mal"):
        LabelHead(Fit(8, proposals="all", anchors=4), CLASSES, loss="softmax")
    assert LabelHead(Fit(8, proposals="all", anchors=4), CLASSES).kind == "focal"
    assert LabelHead(8, CLASSES).kind == "softmax"


@pytest.mark.parametrize(
    ("head", "settings", "says"),
    [
        (LabelHead, {"gamma": -3.0}, "heads.labels.gamma = -3.0: must be at least 0"),
        (LabelHead, {"label_noise": 9.0}, "heads.labels.label_noise = 9.0: must be 0 to 1"),
        (LabelHead, {"alpha": -1.0}, "heads.labels.alpha = -1.0: must be 0 to 1"),
        (BoxHead, {"box_noise": -5.0}, "heads.boxes.box_noise = -5.0: must be at least 0"),
        (BoxHead, {"ignore_share": float("nan")}, "heads.boxes.ignore_share = nan"),
    ],
)
def test_numbers_out_of_range_are_refused(head: type, settings: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        head(8, *([CLASSES] if head is LabelHead else []), **settings)


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_embedded_classes_start_with_their_deviation(scale: float) -> None:
    torch.manual_seed(0)
    head = LabelHead(Fit(64, anchors=4, denoising=True), 200, label_scale=scale)
    assert head.embedding is not None
    assert head.embedding.weight.std().item() == pytest.approx(scale, rel=0.03)
