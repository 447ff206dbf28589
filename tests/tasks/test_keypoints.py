"""The keypoint head against plain computations and pycocotools' similarity, and its task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from samples import targets_of
from torch import Tensor

from queryvision.criterion import Criterion
from queryvision.data.classes import ClassMap
from queryvision.data.skeletons import Skeleton
from queryvision.errors import ConfigError, DataError
from queryvision.head import DenoisingPlan, Fit, View
from queryvision.model import builders
from queryvision.ops.oks import keypoint_similarity
from queryvision.registry import resolve_task
from queryvision.results import Result
from queryvision.structures import VOID, Facts, ImageBatch, Match, Picks, Round, Stage, Targets
from queryvision.tasks.keypoints import TASK, KeypointHead
from queryvision.tasks.keypoints.task import KeypointEvaluator

FACE = Skeleton(("left_eye", "right_eye", "mouth"), ((0, 2), (1, 2)), ((0, 1),), (0.025, 0.03, 0.07))
HAND = Skeleton(("wrist", "thumb"), ((0, 1),), (), (0.06, 0.05))
SKELETONS = (FACE, None, HAND)
OVERFIT_STEPS = 100


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def targets(dtype: torch.dtype = torch.float32) -> Targets:
    """Two images of 80 x 120; a face with a hidden mouth, a thing without keypoints, a hand; a face with nothing labelled."""
    found = targets_of([[0, 1, 2], [0]], num_classes=3)
    points = torch.rand(2, 3, 3, 3, generator=generator(1), dtype=dtype)
    seen = torch.zeros(2, 3, 3, dtype=torch.bool)
    seen[0, 0] = torch.tensor([True, True, False])
    seen[0, 2] = torch.tensor([True, True, False])
    points[..., 2] = 2.0 * seen
    found.values |= {"keypoints": points * seen[..., None], "areas": torch.full((2, 3), 400.0, dtype=dtype)}
    found.has["keypoints"] = seen
    found.num_with["keypoints"] = (2, 0)
    return replace(found, sizes=torch.tensor([[80, 120], [80, 120]]))


def rounds(head: KeypointHead, dtype: torch.dtype = torch.float32) -> Round:
    points = torch.rand(2, 2, 4, head.num_points, 2, generator=generator(2), dtype=dtype, requires_grad=True)
    findable = torch.randn(2, 2, 4, head.num_points, generator=generator(3), dtype=dtype, requires_grad=True)
    stages = (Stage("layer", 0), Stage("layer", 1, last=True))
    return Round("main", stages, {"keypoints": {"points": points, "findable": findable}}, {}, {})


def coco_similarity(found: np.ndarray, truth: np.ndarray, area: float, sigmas: tuple[float, ...]) -> float:
    """pycocotools' own similarity of keypoints (K,2) and labelled ones (K,3), in pixels."""
    gt = COCO()
    row = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": area, "bbox": [0, 0, 50, 50], "num_keypoints": 2}
    gt.dataset = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "face"}],
        "annotations": [{**row, "keypoints": truth.ravel().tolist()}],
    }
    gt.createIndex()
    points = np.concatenate([found, np.ones((len(found), 1))], 1).ravel().tolist()
    scoring = COCOeval(gt, gt.loadRes([{"image_id": 1, "category_id": 1, "keypoints": points, "score": 1.0}]), "keypoints")
    scoring.params.kpt_oks_sigmas = np.array(sigmas)
    scoring._prepare()
    return float(scoring.computeOks(1, 1)[0, 0])


def test_similarity_is_that_of_pycocotools() -> None:
    draw = np.random.default_rng(0)
    for _ in range(5):
        truth = np.concatenate([draw.uniform(0, 100, (3, 2)), [[2], [0], [1]]], 1)
        found = draw.uniform(-8, 8, (3, 2)) + truth[:, :2]
        ours = keypoint_similarity(
            torch.tensor(found), torch.tensor(truth[:, :2]), torch.tensor(truth[:, 2] > 0),
            torch.tensor(FACE.sigmas).double(), torch.tensor(900.0).double(),
        )  # fmt: skip
        assert ours.item() == pytest.approx(coco_similarity(found, truth, 900.0, FACE.sigmas), abs=1e-6)


def plain(round: Round, found: Targets, s: int, b: int, q: int, t: int) -> tuple[float, float]:
    """L1 sum of a pair, and pycocotools' similarity."""
    label = int(found["labels"][b, t])
    skeleton = SKELETONS[label]
    assert skeleton is not None
    first = 0 if label == 0 else 3
    points = round.answers["keypoints"]["points"][s, b, q, first : first + len(skeleton)].detach().numpy()
    truth = found["keypoints"][b, t, : len(skeleton)].numpy()
    seen = found.has["keypoints"][b, t, : len(skeleton)].numpy()
    pixels = np.array([120, 80])
    truth_pixels = np.concatenate([truth[:, :2] * pixels, 2.0 * seen[:, None]], 1)
    alike = coco_similarity(points * pixels, truth_pixels, 400.0, skeleton.sigmas)
    return float((np.abs(points - truth[:, :2]).sum(1) * seen).sum()), alike


def test_cost_and_loss_are_those_of_every_pair() -> None:
    head, found = KeypointHead(8, SKELETONS, l1_cost=3.0, oks_cost=2.0), targets(torch.float64)
    round = rounds(head, torch.float64)
    cost = head.cost(round, found, None)
    for s, q, t in ((0, 1, 0), (1, 3, 2), (1, 0, 0)):
        distance, oks = plain(round, found, s, 0, q, t)
        assert cost[s, 0, q, t].item() == pytest.approx(3 * distance + 2 * (1 - oks), abs=1e-6)
    assert not cost[:, 0, :, 1].any() and not cost[:, 1].any()  # nothing labelled: no opinion
    index = torch.tensor
    match = Match(index([0, 1, 1, 1]), index([0, 0, 0, 1]), index([1, 3, 2, 0]), index([0, 2, 1, 0]), 2, (3, 1))
    terms = head.loss(round, match, found, Facts(2.0, torch.ones(4), torch.ones(4, dtype=torch.bool), None))
    for s, q, t in ((0, 1, 0), (1, 3, 2)):
        distance, oks = plain(round, found, s, 0, q, t)
        assert terms["l1"][s].item() == pytest.approx(distance / 2, abs=1e-6)
        assert terms["oks"][s].item() == pytest.approx((1 - oks) / 2, abs=1e-6)
        logits = round.answers["keypoints"]["findable"].detach()[s, 0, q, slice(0, 3) if t == 0 else slice(3, 5)]
        there = torch.tensor([1.0, 1.0, 0.0] if t == 0 else [1.0, 1.0]).double()
        right = torch.where(there > 0, logits, -logits).sigmoid()
        assert terms["findable"][s].item() == pytest.approx(float(-right.log().mean()) / 2, abs=1e-6)
    quality, known = head.quality(round, match, found)
    assert known.tolist() == [True, True, False, False]
    assert quality[0].item() == pytest.approx(plain(round, found, 0, 0, 1, 0)[1], abs=1e-6)
    sum(term.sum() for term in terms.values()).backward()
    moved = round.answers["keypoints"]["points"].grad
    assert moved is not None
    touched = {tuple(row) for row in moved.abs().sum(-1).nonzero().tolist()}
    assert touched <= {(0, 0, 1, 0), (0, 0, 1, 1), (1, 0, 3, 3), (1, 0, 3, 4)}  # unlabelled points move nothing
    assert {(0, 0, 1, 0), (1, 0, 3, 4)} <= touched


def test_points_start_in_the_middle_of_the_box() -> None:
    head = KeypointHead(Fit(8, 2, anchors=4), SKELETONS)
    anchors = torch.tensor([[[0.3, 0.4, 0.2, 0.1]]])
    answer = head(View(torch.randn(1, 1, 8), anchors=anchors))
    assert answer is not None
    assert torch.allclose(answer["points"], torch.tensor([0.3, 0.4]).expand(1, 1, 5, 2))
    assert head(View(torch.randn(1, 1, 8), anchors=anchors, stage=Stage("proposal"))) is None


def test_without_anchors_points_are_told_from_the_box_just_answered() -> None:
    head, state = KeypointHead(Fit(8, 2), SKELETONS), torch.randn(1, 1, 8)
    box = torch.tensor([[[0.3, 0.4, 0.2, 0.1]]], requires_grad=True)
    twice, alone = box * torch.tensor([1, 1, 2, 2]), head(View(state))
    answers = [head(View(state, answers={"boxes": {"boxes": boxes}})) for boxes in (box, twice)]
    assert alone is not None and answers[0] is not None and answers[1] is not None
    once, wide = (answer["points"] - box[..., None, :2] for answer in answers)
    assert torch.allclose(2 * once, wide, atol=1e-6) and once.any() and not torch.equal(alone["points"], answers[0]["points"])
    assert torch.autograd.grad(answers[0]["points"].sum(), box, allow_unused=True) == (None,)  # the box is not pulled


def test_results_have_the_keypoints_of_their_class() -> None:
    head = KeypointHead(8, SKELETONS)
    final = rounds(head)
    final.answers["keypoints"] = {name: value[-1:] for name, value in final.answers["keypoints"].items()}
    picks = Picks(torch.tensor([[2, 1], [0, 3]]), torch.tensor([[0, 2], [1, 0]]), torch.ones(2, 2))
    got = head.decode(final, picks, torch.tensor([[50, 100], [60, 60]]))["keypoints"]
    points = final.answers["keypoints"]["points"][0]
    assert torch.allclose(got[0, 0, :, :2], points[0, 2, :3] * torch.tensor([100.0, 50.0]))
    assert torch.allclose(got[0, 1, :2, :2], points[0, 1, 3:] * torch.tensor([100.0, 50.0]))
    assert not got[0, 1, 2].any() and not got[1, 0].any()
    untold = KeypointHead(8, SKELETONS, findable=0.0).decode(final, picks, torch.tensor([[50, 100], [60, 60]]))["keypoints"]
    assert (untold[0, 0, :, 2] == 1).all() and not untold[0, 1, 2].any()


@pytest.mark.parametrize("grouped", [False, True])
def test_keypoints_without_a_label_move_nothing_but_what_says_findable(grouped: bool) -> None:
    torch.manual_seed(0)
    make = TASK.make_heads(
        ClassMap((1, 2, 3), ("face", "thing", "hand"), (True,) * 3, SKELETONS), {"keypoints": {"grouped": grouped}}
    )
    model = builders.builder("dfine_small")(
        make, TASK.steering, backbone="resnet18", width=32, num_queries=8, denoising=4, ffn_width=32, decoder_layers=2
    )
    found, heads = targets(), model.heads.heads()
    mlp = heads["keypoints"].mlp
    for layer in [*mlp.layers, *([mlp.proposals] if grouped else [])]:
        torch.nn.init.normal_(layer.last.weight, std=0.1)  # zero at first, and nothing behind it would be moved
    images = ImageBatch(torch.randn(2, 3, 80, 120, generator=generator()), torch.zeros(2, 80, 120).bool(), False, found.sizes)

    def moved(found: Targets, **weights: float) -> dict[str, Tensor]:
        """Gradients of the keypoints' terms with these weights, by parameter."""
        for each in heads.values():
            each.weights.update(dict.fromkeys(each.weights, 0.0))
        heads["keypoints"].weights.update(weights)
        model.zero_grad()
        torch.manual_seed(1)
        Criterion(heads, model.steering)(model.train()(images, found), found).total.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    said = moved(found, findable=1.0)
    assert said and all(".findable." in name for name in said)
    once = moved(found, l1=1.0, oks=1.0)
    assert any("backbone" in name for name in once) and not any(".findable." in name for name in once)
    hidden = replace(found, values={**found.values, "keypoints": found["keypoints"] + ~found.has["keypoints"][..., None] * 0.4})
    again = moved(hidden, l1=1.0, oks=1.0)
    assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)


def test_a_head_needs_a_skeleton() -> None:
    with pytest.raises(ConfigError, match="no class has keypoints"):
        TASK.make_heads(3, {})(Fit(8))


def result_of(classes: ClassMap, rows: list[tuple[int, Tensor]], size: tuple[int, int]) -> Result:
    keypoints = torch.zeros(len(rows), 3, 3)
    for index, (_, points) in enumerate(rows):
        keypoints[index, : len(points)] = points
    labels = torch.tensor([label for label, _ in rows], dtype=torch.long)
    boxes = torch.tensor([[0.0, 0.0, 50.0, 50.0]]).expand(len(rows), 4)
    return Result(torch.ones(len(rows)), labels, classes, size, {"boxes": boxes, "keypoints": keypoints})


def test_classes_with_the_same_names_and_other_sigmas_are_scored_apart() -> None:
    names = {"keypoints": list(FACE.names)}
    categories: list[dict[str, Any]] = [
        {"id": 1, "name": "face", **names},
        {"id": 2, "name": "mask", **names, "sigmas": [0.5] * 3},
    ]
    points = torch.tensor([[10.0, 10, 2], [30, 10, 2], [20, 30, 1]])
    row = {"image_id": 7, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 0, "keypoints": points.flatten().tolist()}
    annotations = [{**row, "id": i, "category_id": i, "num_keypoints": 3} for i in (1, 2)]
    truth = {"images": [{"id": 7, "height": 60, "width": 60}], "categories": categories, "annotations": annotations}
    classes = ClassMap.from_categories(categories)
    evaluator = TASK.evaluator(truth, classes, "auto")
    evaluator.add(7, result_of(classes, [(0, points), (1, points)], (60, 60)))
    assert sorted(r["category_id"] for r in evaluator.records) == [1, 2] and evaluator.compute()["AP"] == pytest.approx(1)


def test_skeletons_are_drawn_where_the_points_are() -> None:
    """Limbs between points that are more likely in the picture than not; others, and their limbs, are left out."""
    classes = ClassMap((1,), ("face",), (True,), (FACE,))
    points = torch.tensor([[60.0, 40, 0.9], [90, 40, 0.4], [60, 80, 0.8]])
    result = replace(result_of(classes, [(0, points)], (120, 120)), scores=torch.ones(1))
    drawn = np.asarray(TASK.draw(Image.new("RGB", (120, 120)), result))
    lit = drawn.any(-1)
    assert lit[40, 60] and lit[80, 60] and lit[60, 60], "left eye, mouth, and half-way on the limb"
    assert not lit[40, 90] and not lit[60, 75], "right eye, and half-way from it to the mouth"


def test_a_row_without_keypoints_is_not_written() -> None:
    classes = ClassMap.from_categories([{"id": 1, "name": "face", "keypoints": list(FACE.names)}, {"id": 2, "name": "car"}])
    assert TASK.records is not None
    face, car = TASK.records(result_of(classes, [(0, torch.ones(3, 3)), (1, torch.ones(0, 3))], (60, 60)), 7)
    assert face["keypoints"] == [1.0] * 9 and car == {}


def test_evaluator_scores_each_skeleton_with_its_own_sigmas() -> None:
    categories: list[dict[str, Any]] = [
        {"id": 1, "name": "face", "keypoints": list(FACE.names), "flip_pairs": [[0, 1]], "sigmas": list(FACE.sigmas)},
        {"id": 2, "name": "car"},
        {"id": 3, "name": "hand", "keypoints": list(HAND.names), "sigmas": list(HAND.sigmas)},
    ]
    face, hand = torch.tensor([[10.0, 10, 2], [30, 10, 2], [20, 30, 1]]), torch.tensor([[5.0, 5, 2], [25, 25, 2]])
    row = {"image_id": 7, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 0}
    truth = {
        "images": [{"id": 7, "height": 60, "width": 60}],
        "categories": categories,
        "annotations": [
            {**row, "id": 1, "category_id": 1, "keypoints": face.flatten().tolist(), "num_keypoints": 3},
            {**row, "id": 2, "category_id": 3, "keypoints": hand.flatten().tolist(), "num_keypoints": 2},
            {**row, "id": 3, "category_id": 2},
        ],
    }
    classes = ClassMap.from_categories(categories)
    evaluator = KeypointEvaluator(truth, classes, "auto")
    evaluator.add(7, result_of(classes, [(0, face), (2, hand + torch.tensor([30.0, 0, 0]))], (60, 60)))
    metrics = evaluator.compute()
    assert metrics["AP"] == pytest.approx(0.5) and metrics["AP/face"] == pytest.approx(1.0)
    assert metrics["AP/hand"] == pytest.approx(0.0) and "box_AP" in metrics
    assert {len(row["keypoints"]) for row in evaluator.records} == {9, 6}
    absent = {**categories[0], "id": 4, "name": "statue"}  # nothing of it here: the mean is that over face and hand
    more = ClassMap.from_categories([*categories, absent])
    evaluator = KeypointEvaluator({**truth, "categories": [*categories, absent]}, more, "auto")
    evaluator.add(7, result_of(more, [(0, face), (2, hand + torch.tensor([30.0, 0, 0]))], (60, 60)))
    assert evaluator.compute()["AP"] == pytest.approx(0.5)
    with pytest.raises(DataError, match="not the model's"):
        KeypointEvaluator({**truth, "categories": [{**categories[0], "keypoints": ["a", "b", "c"]}]}, classes, "auto")
    with pytest.raises(DataError, match="no category has keypoints"):
        KeypointEvaluator({**truth, "categories": categories[1:2]}, classes, "auto")


def test_grouped_points_are_refined_around_their_own() -> None:
    head = KeypointHead(Fit(8, 2, per_layer=True, anchors=4, proposals="all"), SKELETONS, grouped=True)
    assert head.slots == 5
    anchors, slots = torch.tensor([[[0.3, 0.4, 0.2, 0.1]]]), torch.randn(1, 1, 5, 8)
    first = head(View(torch.randn(1, 1, 8), anchors=anchors, stage=Stage("proposal")))
    assert first is not None and torch.allclose(first["points"], torch.tensor([0.3, 0.4]).expand(1, 1, 5, 2))
    points = torch.rand(1, 1, 5, 2, generator=generator()) * 0.8 + 0.1
    answer = head(View(torch.randn(1, 1, 8), slots=slots, anchors=anchors, points=points))
    assert answer is not None and torch.allclose(answer["points"], points, atol=1e-5)
    torch.nn.init.normal_(head.mlp.layers[0].last.weight)
    moved = head(View(torch.randn(1, 1, 8), slots=slots, anchors=anchors, points=points))
    assert moved is not None and (moved["points"] - points).abs().amin() > 0


def test_points_look_forward_twice_where_the_architecture_does() -> None:
    """An answer starts from the points with their gradient; what goes on to the next layer carries its own layer's alone."""
    fit = Fit(8, 2, per_layer=True, anchors=4, proposals="all", look_twice=True, eps=1e-2)
    head = KeypointHead(fit, SKELETONS, grouped=True)
    torch.nn.init.normal_(head.mlp.layers[0].last.weight)
    base = (torch.rand(1, 1, 5, 2, generator=generator()) * 0.8 + 0.1).requires_grad_()
    view = View(torch.randn(1, 1, 8), slots=torch.randn(1, 1, 5, 8), points=base.detach(), points_base=base)
    answer = head(view)
    assert answer is not None
    further = head.feedback(answer, view).points
    assert further is not None and torch.equal(further, answer["points"])
    assert torch.autograd.grad(answer["points"].sum(), base, retain_graph=True)[0].abs().min() > 0
    assert torch.autograd.grad(further.sum(), base, allow_unused=True) == (None,)
    edge = head(replace(view, points_base=torch.zeros(1, 1, 5, 2), slots=torch.zeros(1, 1, 5, 8)))
    assert edge is not None and not edge["points"].le(2e-3).any(), "a point at the border can move"


def test_grouped_keypoints_on_mask_dino() -> None:
    """Whose proposals answer as its layers do: there a state says all keypoints, in a layer each its own."""
    sizes = {"width": 32, "num_queries": 6, "num_heads": 4, "ffn_width": 32, "encoder_ffn_width": 32, "encoder_layers": 1,
             "decoder_layers": 2, "backbone": "resnet18", "denoising": 6}  # fmt: skip
    classes = ClassMap((1, 2, 3), ("face", "thing", "hand"), (True,) * 3, SKELETONS)
    joint = resolve_task("instance+keypoints")
    model = builders.builder("maskdino")(
        joint.make_heads(classes, {"keypoints": {"grouped": True}, "masks": {"points": 32}}), joint.steering, **sizes
    ).train()
    given = targets()
    masks = torch.zeros(*given["labels"].shape, 64, 64, dtype=torch.bool)
    masks[..., 8:40, 8:40] = True
    given = replace(
        given, values={**given.values, "masks": masks}, has={**given.has, "masks": given.valid},
        num_with={**given.num_with, "masks": given.counts},
    )  # fmt: skip
    count = len(given.counts)
    pixels, sizes_px = torch.rand(count, 3, 64, 64), torch.full((count, 2), 64)
    outputs = model(ImageBatch(pixels, torch.zeros(count, 64, 64, dtype=torch.bool), False, sizes_px), given)
    Criterion(model.heads.heads(), model.steering)(outputs, given).total.backward()
    head = model.heads.heads()["keypoints"]
    assert all(p.grad is not None for p in head.parameters())


def test_denoised_points_are_as_similar_as_drawn() -> None:
    head, found = KeypointHead(Fit(8, anchors=4), SKELETONS, grouped=True), targets()
    found.values["keypoints"][..., :2] = found["keypoints"][..., :2].clamp(0.4, 0.6)  # so that nothing leaves the image
    plan = DenoisingPlan(
        torch.tensor([[0, 1, 2] * 2, [0, VOID, VOID] * 2]), torch.tensor([[True] * 3 + [False] * 3] * 2),
        torch.zeros(6).long(), 1,
    )  # fmt: skip
    noise = head.noise(found, plan, [generator(1), generator(2)])
    assert noise is not None and noise.points is not None and noise.points.shape == (2, 6, 5, 2)
    for query, (low, high) in ((0, (0.5, 1.0)), (3, (0.1, 0.5))):
        for k, sigma in enumerate(FACE.sigmas[:2]):
            d = (noise.points[0, query, k] - found["keypoints"][0, 0, k, :2]) * torch.tensor([120.0, 80.0])
            alike = float((-d.square().sum() / (2 * 400.0 * (2 * sigma) ** 2)).exp())
            assert low - 1e-4 <= alike <= high + 1e-4
    middle = noise.points[0, 0, :2].mean(0)
    assert torch.allclose(noise.points[0, 0, 2:], middle.expand(3, 2))  # hidden, or of the other skeleton
    assert (noise.points[0, 1] == 0.5).all() and (noise.points[1, 0] == 0.5).all()  # nothing is labelled


@pytest.mark.parametrize("grouped", [pytest.param(False, marks=pytest.mark.slow), True])  # the tasks' own test has the other
def test_eight_figures_are_learned_by_heart(grouped: bool) -> None:
    torch.manual_seed(0)
    make = TASK.make_heads(
        ClassMap((1,), ("face",), (True,), (replace(FACE, sigmas=(0.08,) * 3),)), {"keypoints": {"grouped": grouped}}
    )
    model = builders.builder("dfine_small")(
        make, TASK.steering, backbone="resnet18", frozen_norm=False, width=32, num_queries=8, denoising=8, ffn_width=32,
        decoder_layers=2,
    )  # fmt: skip
    draw = generator(4)
    found = targets_of([[0]] * 8, num_classes=1)
    found["boxes"][..., 2:] = 0.4
    middle, size = found["boxes"][:, :, None, :2], found["boxes"][:, :, None, 2:]
    points = middle + size * torch.tensor([[-0.4, -0.3], [0.4, -0.3], [0.0, 0.45]])
    found.values |= {"keypoints": torch.cat((points, torch.full((8, 1, 3, 1), 2.0)), -1)}
    found.values["areas"] = (found["boxes"][..., 2] * found["boxes"][..., 3]) * 64 * 64
    found.has["keypoints"], found.num_with["keypoints"] = torch.ones(8, 1, 3, dtype=torch.bool), found.counts
    found = replace(found, sizes=torch.full((8, 2), 64))
    pixels = torch.zeros(8, 3, 64, 64)
    for image in range(8):
        for color, (x, y) in enumerate((points[image, 0] * 64).clamp(2, 61).long().tolist()):
            pixels[image, color, y - 2 : y + 3, x - 2 : x + 3] = 3.0
    pixels += 0.1 * torch.randn(pixels.shape, generator=draw)
    images = ImageBatch(pixels, torch.zeros(8, 64, 64, dtype=torch.bool), False, found.sizes)
    criterion = Criterion(model.heads.heads(), model.steering)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0)
    model.train()
    for step in range(OVERFIT_STEPS):
        if step == OVERFIT_STEPS * 2 // 3:
            optimizer.param_groups[0]["lr"] /= 8
        optimizer.zero_grad()
        criterion(model(images, found), found).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    final = model(images, found).final()
    head = model.heads.heads()["keypoints"]
    best = final.answers["labels"]["logits"][0, :, :, 0].argmax(1)
    match = Match(torch.zeros(8).long(), torch.arange(8), best, torch.zeros(8).long(), 1, (1,) * 8)
    quality = head.quality(final, match, found)
    assert int((quality[0] > 0.9).sum()) >= 7, quality  # so short a run may rank one image's queries wrongly
