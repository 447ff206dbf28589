"""The criterion: what is taught and what is not, by gradients; and what training promises: accumulation, padding, precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toys import (
    CLASSES,
    WIDTH,
    CostHead,
    GivenFeatures,
    JudgeHead,
    LaneHead,
    Witness,
    detection_heads,
    images,
    make_round,
    make_targets,
    tiny_model,
)

from queryvision.criterion import Criterion
from queryvision.head import Steering
from queryvision.matching import match
from queryvision.structures import Features, ImageBatch, Match, Outputs, Targets
from queryvision.tasks.detection import LabelHead

LOSSES = ("softmax", "focal", "varifocal", "mal")
HEADS = {loss: {head.name: head for head in detection_heads(loss)} for loss in LOSSES}
both_losses = pytest.mark.parametrize("loss", LOSSES)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def some_round(loss: str, batch: int = 2, queries: int = 6, stages: int = 2, seed: int = 0, queries_name: str = "main"):
    """Random logits and boxes that ask for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shape = (stages, batch, queries)
    logits = torch.randn(*shape, CLASSES + (loss == "softmax"), generator=generator).requires_grad_()
    drawn = torch.rand(*shape, 4, generator=generator)
    boxes = torch.cat((0.3 + 0.4 * drawn[..., :2], 0.1 + 0.3 * drawn[..., 2:]), -1).requires_grad_()
    return make_round({"labels": {"logits": logits}, "boxes": {"boxes": boxes}}, queries_name), logits, boxes


def gradients(loss: str, targets: Targets, **more):
    """Gradients of logits and boxes, and the pairs."""
    round, logits, boxes = some_round(loss, **more)
    losses = Criterion(HEADS[loss])(Outputs([round]), targets)
    (found,), _ = match([round], HEADS[loss], targets)
    return *torch.autograd.grad(losses.total, [logits, boxes]), found, losses


def rows(match: Match) -> set[tuple[int, ...]]:
    """Stage, image, query, target of every pair."""
    return set(zip(*(x.tolist() for x in (match.stage, match.image, match.query, match.target)), strict=True))


# ---------------------------------------------------------------------------------------------------- missing annotations
@both_losses
def test_a_target_without_annotations_changes_no_assignment(loss: str) -> None:
    full, lacking = make_targets([4, 3]), make_targets([4, 3], lacks=[("labels", 0, 1), ("boxes", 0, 1)])
    round, *_ = some_round(loss)
    cost = sum(head.cost(round, lacking, None) for head in HEADS[loss].values())
    assert not cost[:, 0, :, 1].any() and cost[:, 0, :, [0, 2, 3]].all()
    rest = [0, 2, 3]
    values = {name: value.clone() for name, value in full.values.items()}
    for value in values.values():
        value[0, :3] = value[0, rest]
    removed = replace(full, values=values, counts=(3, 3), valid=torch.tensor([[True] * 3 + [False]] * 2))
    (found,), _ = match([round], HEADS[loss], lacking)
    (wanted,), _ = match([round], HEADS[loss], removed)
    expected = {(s, i, q, rest[t] if i == 0 else t) for s, i, q, t in rows(wanted)}
    assert {row for row in rows(found) if (row[1], row[3]) != (0, 1)} == expected


@both_losses
def test_a_target_without_annotations_teaches_neither_class_nor_background_nor_box(loss: str) -> None:
    by_logits, by_boxes, found, _ = gradients(loss, make_targets([4, 3], lacks=[("labels", 0, 1), ("boxes", 0, 1)]))
    blank = (found.image == 0) & (found.target == 1)
    assert int(blank.sum()) == 2
    assert not found.predicted(by_logits)[blank].any() and not found.predicted(by_boxes)[blank].any()
    assert found.predicted(by_logits)[~blank].all() and found.predicted(by_boxes)[~blank].any(-1).all()


def test_an_image_without_a_field_teaches_the_others_as_if_alone() -> None:
    lanes = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0))
    targets = make_targets([3, 2], lanes=lanes, lacks=[("lanes", 1, 0), ("lanes", 1, 1)])
    head = LaneHead(WIDTH, 2)
    x = torch.rand(1, 2, 5, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    losses = Criterion({"lanes": head})(Outputs([make_round({"lanes": {"x": x}})]), targets)
    (gradient,) = torch.autograd.grad(losses.total, x)
    assert not gradient[:, 1].any()
    alone = make_round({"lanes": {"x": x[:, :1]}})
    close(losses.total, Criterion({"lanes": head})(Outputs([alone]), make_targets([3], lanes=lanes[:1])).total)


@both_losses
def test_classes_that_are_not_covered_are_not_taught(loss: str) -> None:
    covers = torch.ones(2, CLASSES, dtype=torch.bool)
    targets = make_targets([3, 2])
    other = [c for c in range(CLASSES) if c not in targets["labels"][0, :3]][:1]
    assert other, "the first image holds too many classes"
    covers[0, other] = False
    by_logits, by_boxes, found, losses = gradients(loss, make_targets([3, 2], covers=covers))
    if loss == "softmax":  # an unmatched query may be one of them, so never loses its score
        assert (by_logits[:, 0, :, other] <= 0).all()
        assert not by_logits[found.stage, found.image, found.query][found.image == 0][:, other].any()
    else:
        assert not by_logits[:, 0, :, other].any()
    rest = [c for c in range(by_logits.shape[-1]) if c not in other]
    assert by_logits[:, 0][..., rest].all() and by_logits[:, 1].all() and by_boxes.any() and losses.total.isfinite()


def test_a_query_that_is_sure_of_a_class_without_labels_is_left_in_peace() -> None:
    head, logits = LabelHead(WIDTH, CLASSES, loss="softmax"), torch.zeros(1, 2, 3, CLASSES + 1)
    logits[..., 2] = 12.0
    logits.requires_grad_()
    covers = torch.ones(2, CLASSES, dtype=torch.bool)
    covers[0, 2] = False
    round = make_round({"labels": {"logits": logits}})
    losses = Criterion({"labels": head})(Outputs([round]), make_targets([0, 0], covers=covers))
    (gradient,) = torch.autograd.grad(losses.total, logits)
    assert gradient[:, 0].abs().max() < 1e-4 * gradient[:, 1].abs().max()
    none_or_unlabelled = logits[0, 0].softmax(-1)[:, [2, CLASSES]].sum(-1)
    none = logits[0, 1].softmax(-1)[:, CLASSES]
    close(losses.total, -head.no_object_weight * (none_or_unlabelled.log().sum() + none.log().sum()))


@both_losses
def test_what_lies_in_a_crowd_is_not_background(loss: str) -> None:
    crowd = torch.tensor([[[0.5, 0.5, 1.0, 1.0]], [[0.0, 0.0, 0.0, 0.0]]])  # all of the first image; padding in the second
    by_logits, _, found, _ = gradients(loss, make_targets([3, 2], ignore=crowd))
    matched = torch.zeros(by_logits.shape[:3], dtype=torch.bool)
    matched[found.stage, found.image, found.query] = True
    assert not by_logits[:, 0][~matched[:, 0]].any(), "unmatched: nothing"
    assert by_logits[:, 0][matched[:, 0]].all(), "matched: its class"
    assert by_logits[:, 1].all(), "no crowd: class or background"


# ---------------------------------------------------------------------------------------------------- quality
def test_quality_comes_from_the_first_that_knows() -> None:
    witness, first, second = Witness(), JudgeHead("first", 0.2, [0]), JudgeHead("second", 0.6, [0, 1])
    heads = {head.name: head for head in (witness, first, second)}
    state = torch.zeros(2, 1, 5, 3)
    outputs = Outputs([make_round({name: {"x": state} for name in heads})])
    for order, wanted in (
        (("first", "second"), {0: 0.2, 1: 0.6, 2: 1.0}),
        (("second", "first"), {0: 0.6, 1: 0.6, 2: 1.0}),
        (("first",), {0: 0.2, 1: 1.0, 2: 1.0}),
        ((), {0: 1.0, 1: 1.0, 2: 1.0}),
    ):
        Criterion(heads, Steering(quality=order))(outputs, make_targets([3]))
        _, found, facts = witness.told.pop()
        close(facts.quality, torch.tensor([wanted[t] for t in found.target.tolist()]))
        asked = {t for name in order for t in heads[name].knows.tolist()}
        assert facts.known.tolist() == [t in asked for t in found.target.tolist()]


def test_quality_of_a_head_that_did_not_answer_is_not_asked() -> None:
    heads = {"witness": Witness(), "first": JudgeHead("first", 0.2, [0])}
    outputs = Outputs([make_round({"witness": {"x": torch.zeros(1, 1, 4, 2)}})])
    Criterion(heads, Steering(quality=("first",)))(outputs, make_targets([2]))
    assert not heads["witness"].told[0][2].known.any()


def test_iou_is_the_quality_of_boxes() -> None:
    round, _, boxes = some_round("focal")
    heads = {**HEADS["focal"], "witness": Witness()}
    round.answers["witness"] = {"x": torch.zeros(2, 2, 6, 1)}
    targets = make_targets([3, 2], lacks=[("boxes", 0, 0)])
    with torch.no_grad():
        boxes[:, :, :3] = targets["boxes"]
    Criterion(heads, Steering(quality=("boxes",)))(Outputs([round]), targets)
    _, found, facts = heads["witness"].told[0]
    unknown = (found.image == 0) & (found.target == 0)
    exact = (found.query == found.target) & ~unknown
    assert exact.any() and (facts.quality[exact] > 1 - 1e-6).all() and (facts.quality[unknown] == 1).all()
    assert torch.equal(facts.known, ~unknown)


# ---------------------------------------------------------------------------------------------------- sums
@both_losses
@pytest.mark.parametrize("counts", [(3, 0), (0, 0)])
def test_images_without_targets_give_finite_losses(loss: str, counts) -> None:
    by_logits, by_boxes, _, losses = gradients(loss, make_targets(counts))
    assert losses.total.isfinite() and by_logits.isfinite().all() and by_boxes.isfinite().all()
    assert by_logits[:, 1].all() and not by_boxes[:, 1].any(), "all background"


@both_losses
def test_normalisers_divide(loss: str) -> None:
    round, *_ = some_round(loss)
    targets, criterion = make_targets([3, 2]), Criterion(HEADS[loss])
    counts = criterion.counts(targets, {"main": (6, 1)})
    once = criterion(Outputs([round]), targets, counts)
    twice = criterion(Outputs([round]), targets, {key: 2 * value for key, value in counts.items()})
    close(once.total, criterion(Outputs([round]), targets).total)
    close(once.total, 2 * twice.total)
    for name in once.terms:
        close(once.terms[name], 2 * twice.terms[name])


def test_stages_groups_and_weights_add_up() -> None:
    main, *_ = some_round("focal")
    other, *_ = some_round("focal", seed=1, queries_name="many")
    targets = make_targets([3, 2])
    alone = [Criterion(HEADS["focal"])(Outputs([r]), targets) for r in (main, other)]
    both = Criterion(HEADS["focal"], round_weights={"many": 0.5})(Outputs([main, other]), targets)
    close(both.total, alone[0].total + 0.5 * alone[1].total)
    assert set(both.terms) == {f"{group}{t}" for group in ("", "many/") for t in ("labels.class", "boxes.l1", "boxes.giou")}
    close(both.terms["many/boxes.l1"], 0.5 * alone[1].terms["many/boxes.l1"])
    for name, value in alone[0].terms.items():
        close(alone[0].stages[0][name][-1], value)
    heavier = {**HEADS["focal"], "boxes": type(HEADS["focal"]["boxes"])(WIDTH, l1=10.0)}
    close(Criterion(heavier)(Outputs([main]), targets).terms["boxes.l1"], 2 * alone[0].terms["boxes.l1"])


def test_a_cost_alone_makes_no_loss() -> None:
    head = CostHead()
    head.weights = {}
    with pytest.raises(NotImplementedError, match=r"CostHead.*loss"):
        Criterion({"costs": head})(Outputs([make_round({"costs": {"cost": torch.zeros(1, 1, 3, 2)}})]), make_targets([2]))


# ---------------------------------------------------------------------------------------------------- a whole model
def part(targets: Targets, index: slice) -> Targets:
    """Some images of a batch, with no more padding than they need."""
    counts = targets.counts[index]
    most = max(counts)
    return replace(
        targets,
        values={name: value[index, :most] for name, value in targets.values.items()},
        has={name: value[index, :most] for name, value in targets.has.items()},
        num_with={name: value[index] for name, value in targets.num_with.items()},
        counts=counts,
        valid=targets.valid[index, :most],
        covers=targets.covers[index],
        sizes=targets.sizes[index],
        ignore_boxes=targets.ignore_boxes[index],
    )


@both_losses
def test_two_micro_batches_equal_one_batch(loss: str) -> None:
    batch, targets = images(4), make_targets([4, 1, 0, 2])
    found = []
    for cuts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        model = tiny_model(detection_heads(loss)).train().double()  # so that rounding is no excuse
        criterion = Criterion(model.heads.heads())
        parts = [part(targets, cut) for cut in cuts]
        normalisers: dict = {}
        for some in parts:
            for key, value in criterion.counts(some, model.group_sizes(some.counts)).items():
                normalisers[key] = normalisers.get(key, 0.0) + value
        for cut, some in zip(cuts, parts, strict=True):
            micro = ImageBatch(batch.pixels[cut].double(), batch.padding[cut], False, batch.sizes[cut])
            criterion(model(micro), some, normalisers).total.backward()
        found.append([p.grad for p in model.parameters()])
    scale = max(g.abs().max().item() for g in found[0])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one / scale, two / scale, atol=1e-6, rtol=0.0)


def test_permuting_queries_permutes_predictions() -> None:
    model, order = tiny_model(detection_heads()).eval(), torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        before = model(images()).final().answers
        model.queries.positions.weight.copy_(model.queries.positions.weight[order])
        after = model(images()).final().answers
    for head, name in (("labels", "logits"), ("boxes", "boxes")):
        close(after[head][name], before[head][name][:, :, order], 1e-5)
        assert not torch.allclose(after[head][name], before[head][name], atol=1e-2)


@pytest.mark.parametrize("two_stage", [False, True])
def test_more_padding_changes_nothing_from_the_features_on(two_stage: bool) -> None:
    backbone = GivenFeatures()
    steering = Steering(rank="labels", first="boxes", later="boxes") if two_stage else None
    model = tiny_model(detection_heads(), steering, backbone=backbone, two_stage=two_stage).eval()
    contents = torch.randn(2, 16, 4, 5, generator=torch.Generator().manual_seed(0))
    real = torch.zeros(2, 4, 5, dtype=torch.bool)
    real[0], real[1, :3, :4] = True, True

    def predict(height: int, width: int, batch: slice = slice(None)):
        maps, padding = torch.randn(2, 16, height, width) * 9, torch.ones(2, height, width, dtype=torch.bool)
        h, w = min(height, 4), min(width, 5)
        padding[:, :h, :w] = ~real[:, :h, :w]
        maps[:, :, :h, :w] = torch.where(real[:, None, :h, :w], contents[:, :, :h, :w], maps[:, :, :h, :w])
        none = not padding[batch].any()
        backbone.features = Features([maps[batch]], [None if none else padding[batch]])
        with torch.no_grad():
            return model(images()).final().answers

    before, wider, alone = predict(4, 5), predict(7, 6), predict(3, 4, slice(1, 2))
    assert backbone.features.paddings == [None]
    for head, name in (("labels", "logits"), ("boxes", "boxes")):
        close(wider[head][name], before[head][name], 1e-5)
        close(alone[head][name][:, 0], before[head][name][:, 1], 1e-5)


@both_losses
def test_bf16_is_finite_and_boxes_stay_float32(loss: str) -> None:
    class Multiplies(Witness):
        def loss(self, round, match, targets, facts):
            state = round.answers[self.name]["state"]
            products.append(state @ state.transpose(-1, -2))
            return super().loss(round, match, targets, facts)

    products = []
    model, targets = tiny_model([*detection_heads(loss), Multiplies()]).train(), make_targets([3, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images())
    answers = outputs.rounds[0].answers
    assert answers["labels"]["logits"].dtype == torch.bfloat16 and answers["boxes"]["boxes"].dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = Criterion(model.heads.heads())(outputs, targets)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in (losses.total, *losses.terms.values()))
    assert products[0].dtype == torch.float32, "losses are float32 under any precision"
    losses.total.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
