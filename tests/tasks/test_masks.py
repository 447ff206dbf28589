"""The mask head and what it stands on, against plain computations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from queryvision.criterion import Criterion
from queryvision.data.classes import ClassMap
from queryvision.engine.evaluation import results_of
from queryvision.errors import ConfigError
from queryvision.head import Fit, Scene, Steering, View
from queryvision.layers.deformable import DeformableAttention
from queryvision.masks import Masks, SegmentMasks
from queryvision.model import builders
from queryvision.model.deformable_encoder import DeformableEncoderLayer
from queryvision.model.pixel_decoder import light_pixels
from queryvision.model.query_model import QueryModel
from queryvision.ops.boxes import mask_boxes
from queryvision.ops.points import pairwise_mask_cost, sample_bits, sample_maps, uncertain_points
from queryvision.structures import Facts, Features, ImageBatch, Match, Memory, PixelMap, Round, Stage, Targets
from queryvision.tasks.detection import LabelHead
from queryvision.tasks.instance import TASK, MaskHead
from queryvision.tasks.instance import masks as masks_module
from queryvision.tasks.instance.masks import Canvas

CLASSES = 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(batch: int, targets: int, height: int, width: int) -> Tensor:
    """Smooth random masks, (B,T,H,W) bool."""
    coarse = torch.randn(batch, targets, 4, 5, generator=generator(5))
    return F.interpolate(coarse, (height, width), mode="bilinear") > 0.2


def targets_of(masks: Tensor, counts: tuple[int, ...], sizes: Tensor) -> Targets:
    batch, most = masks.shape[:2]
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    values = {
        "labels": torch.arange(batch * most).view(batch, most) % CLASSES,
        "boxes": torch.rand(batch, most, 4, generator=generator(7)) * 0.4 + 0.3,
        "areas": torch.ones(batch, most),
        "masks": masks & valid[..., None, None],
    }
    return Targets(
        values, counts, valid, {name: valid.clone() for name in values}, dict.fromkeys(values, counts),
        torch.ones(batch, CLASSES, dtype=torch.bool), True, sizes, torch.zeros(batch, 0, 4),
    )  # fmt: skip


def scene(head: MaskHead, counts: tuple[int, ...] = (3, 2)) -> tuple[Round, Targets]:
    """Two images of 40 x 56 and 32 x 48 on a map of stride 4, two stages, five queries."""
    sizes = torch.tensor([[40, 56], [32, 48]])
    pixels = torch.randn(2, 8, 10, 14, generator=generator(1), requires_grad=True)
    embedding = torch.randn(2, 2, 5, 8, generator=generator(2), requires_grad=True)
    canvas = Canvas(PixelMap(pixels, sizes.flip(-1) / 4, 4), [])
    stages = (Stage("layer", 0), Stage("layer", 1, last=True))
    round = Round("main", stages, {"masks": {"embedding": embedding}}, {"masks": canvas}, {})
    return round, targets_of(blobs(2, 3, 40, 56), counts, sizes)


def all_pairs(counts: tuple[int, ...], stages: int = 2) -> Match:
    rows = [(s, b, 4 - t, t) for s in range(stages) for b, n in enumerate(counts) for t in range(n)]
    stage, image, query, target = torch.tensor(rows, dtype=torch.long).view(-1, 4).T
    return Match(stage, image, query, target, stages, tuple(stages * n for n in counts))


# ---------------------------------------------------------------------------------------------------- points
def test_bits_are_sampled_as_grid_sample_would() -> None:
    masks = blobs(2, 3, 17, 23)
    points = torch.rand(6, 50, 2, generator=generator()) * 1.2 - 0.1  # some outside
    wanted = sample_maps(masks.view(6, 1, 17, 23).float(), points)[:, 0]
    torch.testing.assert_close(sample_bits(masks, torch.arange(6), points), wanted, atol=1e-5, rtol=0)
    same = sample_bits(masks, torch.arange(6), points[:1])
    torch.testing.assert_close(same[0], wanted[0], atol=1e-5, rtol=0)


def test_pairwise_cost_is_the_loss_of_every_pair() -> None:
    logits, wanted = 3 * torch.randn(2, 4, 30, generator=generator()), torch.rand(3, 30, generator=generator(1))
    cost = pairwise_mask_cost(logits, wanted, 2.0, 3.0)
    for s, q, t in ((0, 0, 0), (1, 3, 2), (0, 2, 1)):
        x, y = logits[s, q], wanted[t]
        p = x.sigmoid()
        dice = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
        plain = 2 * F.binary_cross_entropy_with_logits(x, y) + 3 * dice
        torch.testing.assert_close(cost[s, q, t], plain, atol=1e-5, rtol=1e-5)


def test_points_are_where_masks_are_unsure_and_never_in_padding() -> None:
    ramp = torch.linspace(-8, 8, 40).expand(2, 30, 40).contiguous()
    extent = torch.tensor([[[1.0, 1.0]], [[0.75, 0.5]]])
    points = uncertain_points(ramp, 200, 3.0, 0.75, lambda n: torch.rand(2, n, 2, generator=generator(n)), extent)
    assert points.shape == (2, 200, 2)
    chosen = points[0, :150, 0]
    assert (chosen - 0.5).abs().max() < 0.2, "three quarters lie around the border"
    assert bool((points[1] <= extent[1]).all())


# ---------------------------------------------------------------------------------------------------- the head
def test_quality_is_the_iou_on_the_cells() -> None:
    head = MaskHead(Fit(8, pixels=8), points=64)
    round, targets = scene(head)
    targets["masks"][1, :, 32:] = targets["masks"][1, :, :, 48:] = False  # padding
    match = all_pairs((3, 2))
    iou, known = head.quality(round, match, targets)
    canvas = round.contexts["masks"].pixels
    for row in range(len(match.query)):
        s, b, q, t = (int(v[row]) for v in (match.stage, match.image, match.query, match.target))
        found = torch.einsum("e,ehw->hw", round.answers["masks"]["embedding"][s, b, q], canvas.map[b]) > 0
        wanted = targets["masks"][b, t, 2::4, 2::4]
        height, width = (10, 14) if b == 0 else (8, 12)  # the second image is smaller than the map
        if b == 1:
            assert found[8:].any() or found[:, 12:].any(), "padding would count"
        found, wanted = found[:height, :width], wanted[:height, :width]
        plain = (found & wanted).sum() / (found | wanted).sum().clamp(min=1)
        assert float(iou[row]) == pytest.approx(float(plain), abs=1e-6)
    assert bool(known.all())


def test_loss_is_the_mean_over_points_and_reaches_embedding_and_map() -> None:
    head = MaskHead(Fit(8, pixels=8), points=4000, uncertain=0.0)
    round, targets = scene(head)
    match = all_pairs((3, 2))
    facts = Facts(5.0, torch.ones(10), torch.ones(10, dtype=torch.bool), None)
    torch.manual_seed(0)
    terms = head.loss(round, match, targets, facts)
    canvas = round.contexts["masks"].pixels
    masks = torch.einsum("sbqe,behw->sbqhw", round.answers["masks"]["embedding"], canvas.map)
    plain = torch.zeros(2)
    for s, b, q, t in zip(match.stage, match.image, match.query, match.target, strict=True):
        height, width = targets.sizes[b].tolist()
        full = F.interpolate(masks[s, b, q][None, None], (40, 56), mode="bilinear")[0, 0, :height, :width]
        truth = targets["masks"][b, t, :height, :width].float()
        plain[s] += F.binary_cross_entropy_with_logits(full, truth).detach() / 5
    torch.testing.assert_close(terms["entropy"].detach(), plain, atol=0, rtol=0.05)
    sum(term.sum() for term in terms.values()).backward()
    assert round.answers["masks"]["embedding"].grad.any() and canvas.map.grad.any()


def test_a_target_without_a_mask_costs_and_teaches_nothing() -> None:
    head = MaskHead(Fit(8, pixels=8), points=64)
    round, targets = scene(head)
    targets.has["masks"][0, 1] = False
    targets.num_with["masks"] = (2, 2)
    assert head.count(targets, 5) == 4.0
    cost = head.cost(round, targets, None)
    assert not cost[:, 0, :, 1].any() and cost[:, 0, :, 0].all() and not cost[:, 1, :, 2].any()
    match = all_pairs((3, 2))
    facts = Facts(1.0, torch.ones(10), torch.ones(10, dtype=torch.bool), None)
    torch.manual_seed(0)
    before = head.loss(round, match, targets, facts)
    targets["masks"][0, 1] = ~targets["masks"][0, 1]
    torch.manual_seed(0)
    after = head.loss(round, match, targets, facts)
    torch.testing.assert_close(before["dice"], after["dice"], atol=1e-6, rtol=0)


def test_points_belong_to_their_image() -> None:
    head = MaskHead(Fit(8, pixels=8), points=64)
    round, targets = scene(head)
    cost = head.cost(round, targets, [generator(3), generator(4)])
    other = head.cost(round, targets, [generator(9), generator(4)])
    torch.testing.assert_close(cost[:, 1], other[:, 1], atol=0, rtol=0)
    assert not torch.equal(cost[:, 0], other[:, 0])


def test_no_pairs_keep_everything_in_the_graph() -> None:
    head = MaskHead(Fit(8, pixels=8), points=64)
    round, targets = scene(head, counts=(0, 0))
    said = round.answers["masks"]
    said["prior"] = torch.zeros(2, 2, 5, 2, 3, requires_grad=True)
    facts = Facts(1.0, torch.ones(0), torch.ones(0, dtype=torch.bool), None)
    terms = head.loss(round, all_pairs((0, 0)), targets, facts)
    assert terms["entropy"].tolist() == [0.0, 0.0]
    sum(term.sum() for term in terms.values()).backward()
    for part in (round.contexts["masks"].pixels.map, *said.values()):
        assert part.grad is not None and not part.grad.any()


def test_a_box_prior_is_the_same_in_loss_cost_and_result(monkeypatch: pytest.MonkeyPatch) -> None:
    head = MaskHead(Fit(8, 2, anchors=4, pixels=8), points=40, uncertain=0.0, oversample=1.0, box_prior=True)
    round, targets = scene(head)
    draw = generator(9)
    weights = torch.randn(2, 2, 5, 2, 3, generator=draw, requires_grad=True)
    around = torch.rand(2, 2, 5, 4, generator=draw) * 0.5 + 0.2
    round.answers["masks"] |= {"prior": weights, "around": around}

    def plain(stage: int, image: int, query: int) -> Tensor:
        extents = round.contexts["masks"].pixels.extents[image]
        cx, cy, w, h = around[stage, image, query]
        x, y = (torch.arange(14) + 0.5) / extents[0], (torch.arange(10) + 0.5) / extents[1]
        total = torch.einsum(
            "e,ehw->hw", round.answers["masks"]["embedding"][stage, image, query], round.contexts["masks"].pixels.map[image]
        )
        for u, k in (
            ((x - cx) / w * 2, weights[stage, image, query, 0]),
            ((y[:, None] - cy) / h * 2, weights[stage, image, query, 1]),
        ):
            outside = torch.where(u.abs() > 1, u.abs().log(), 0.0)
            total = total + k[0] * u.clamp(-1, 1) + k[1] * u.clamp(-1, 1) ** 2 - k[2] * outside
        return total

    match = all_pairs(targets.counts)
    logits = head._logits(round, match.by_image())
    pairs = match.by_image()
    for row, (s, b, q) in enumerate(zip(pairs.stage.tolist(), pairs.image.tolist(), pairs.query.tolist(), strict=True)):
        torch.testing.assert_close(logits[row], plain(s, b, q), atol=1e-4, rtol=1e-4)

    final = replace(round, answers={"masks": {name: value[-1:] for name, value in round.answers["masks"].items()}})
    queries = torch.tensor([[4, 0], [1, 1]])
    sources = head.masks_of(final, queries, targets.sizes)
    torch.testing.assert_close(sources[0].logits()[0], plain(1, 0, 4), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sources[1][torch.tensor([1])].logits()[0], plain(1, 1, 1)[:8, :12], atol=1e-4, rtol=1e-4)
    for image, seen in enumerate((plain(1, 0, 0), plain(1, 1, 1)[:8, :12])):  # padding is left out
        certain = seen[seen > 0].sigmoid().mean()
        torch.testing.assert_close(head.certainty(final, queries)[image, 1], certain, atol=1e-4, rtol=1e-4)
    assert (plain(1, 1, 1) > 0)[8:].any(), "padding would count"

    generators = [generator(1), generator(2)]
    cost = head.cost(round, targets, generators)
    points = [torch.rand(40, 2, generator=generator(n)) for n in (1, 2)]
    places = points[1] * round.contexts["masks"].shares[1]
    found = sample_maps(plain(0, 1, 2)[None, None], places[None])[0]
    wanted = sample_bits(
        targets["masks"][1], torch.tensor([1]), round.contexts["masks"].on_targets(places[None], targets["masks"])
    )
    # between two cells the prior is not linear, so a cost on points differs a little from the map's
    torch.testing.assert_close(cost[0, 1, 2, 1], pairwise_mask_cost(found, wanted, 5.0, 5.0)[0, 0], atol=0.3, rtol=0.05)

    with monkeypatch.context() as patch:
        patch.setattr(masks_module, "LARGEST", 1)
        one_by_one = head.cost(round, targets, [generator(1), generator(2)])
    torch.testing.assert_close(cost, one_by_one, atol=1e-5, rtol=1e-5)

    terms = head.loss(round, match, targets, Facts(1.0, torch.ones(10), torch.ones(10, dtype=torch.bool), None))
    sum(term.sum() for term in terms.values()).backward()
    assert weights.grad is not None and weights.grad[:, :, 3:].abs().amax(-1).min() > 0  # queries of pairs


def test_a_box_prior_needs_boxes() -> None:
    for fit in (Fit(8), Fit(8, anchors=4, hides=True), Fit(8, anchors=2)):
        with pytest.raises(ConfigError, match="box_prior"):
            MaskHead(fit, box_prior=True)


@pytest.mark.parametrize("loss", ["softmax", "focal"])
def test_a_query_may_give_several_results(loss: str) -> None:
    """Of all (query, class) pairs the best, as published; detection with softmax labels has one of each query."""
    masks, labels = MaskHead(Fit(8, pixels=8), points=64), LabelHead(8, CLASSES, loss=loss)
    round, _ = scene(masks)
    logits = 2 * torch.randn(1, 2, 5, CLASSES + labels.softmax, generator=generator(8))
    embedding = torch.randn(1, 2, 5, 8, generator=generator(9))
    round = replace(round, answers={"labels": {"logits": logits}, "masks": {"embedding": embedding}})
    likely = logits[0].softmax(-1)[..., :-1] if labels.softmax else logits[0].sigmoid()
    certain = masks.certainty(round, torch.arange(5).expand(2, -1)).detach()
    picks = TASK.pick({"labels": labels, "masks": masks}, round, 9)
    for image in range(2):
        best = sorted(((float(likely[image, q, c]), q, c) for q in range(5) for c in range(CLASSES)), reverse=True)[:9]
        wanted = sorted(((p * float(certain[image, q]), q, c) for p, q, c in best), reverse=True)
        assert picks.queries[image].tolist() == [q for _, q, _ in wanted]
        assert picks.classes[image].tolist() == [c for _, _, c in wanted]
        assert picks.scores[image].tolist() == pytest.approx([row[0] for row in wanted], abs=1e-6)
    if labels.softmax:
        assert all(sorted(row) == list(range(5)) for row in labels.pick(round, 9).queries.tolist())


def test_a_model_without_a_pixel_map_is_refused() -> None:
    memory = Memory(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8), ((2, 2),), None, torch.ones(1, 1, 2))
    with pytest.raises(ConfigError, match="pixel map"):
        MaskHead(8).prepare(Scene(memory, None, None))  # type: ignore[arg-type]


def test_boxes_around_masks() -> None:
    masks = torch.zeros(1, 2, 10, 14, dtype=torch.bool)
    masks[0, 0, 2:5, 3:9] = True
    boxes = mask_boxes(masks, torch.tensor([[14.0, 10.0]]))
    torch.testing.assert_close(boxes[0, 0], torch.tensor([3 / 14, 0.2, 9 / 14, 0.5]))
    assert not boxes[0, 1].any()


def test_first_anchors_are_those_of_the_image_alone() -> None:
    """Whatever the masks say of padding, whose cells no loss looks at."""
    head = MaskHead(Fit(8, pixels=8))
    sizes = torch.tensor([[40, 56], [30, 45]])  # the last cells show part of the image
    maps = torch.full((2, 8, 10, 14), -1.0)
    maps[:, :, 2:5, 3:9] = 1.0
    maps[1, :, 8:], maps[1, :, :, 12:] = 50.0, 50.0  # padding
    embedding = torch.rand(2, 5, 8, generator=generator(2)) + 0.1

    def anchors(rows: slice, height: int, width: int) -> Tensor:
        canvas = Canvas(PixelMap(maps[rows, :, :height, :width], sizes[rows].flip(-1) / 4, 4), [])
        view = View(torch.zeros(0), stage=Stage("proposal"), context=canvas)
        found = head.feedback({"embedding": embedding[rows]}, view).anchors
        assert found is not None
        return found

    both = anchors(slice(0, 2), 10, 14)
    assert torch.equal(both[0], anchors(slice(0, 1), 10, 14)[0])
    assert torch.equal(both[1], anchors(slice(1, 2), 8, 12)[0])
    torch.testing.assert_close(both[1, 0], torch.tensor([24 / 45, 14 / 30, 24 / 45, 12 / 30]))


# ---------------------------------------------------------------------------------------------------- masks of a result
def test_masks_are_built_for_what_is_kept_and_as_large_as_the_picture() -> None:
    pixels = torch.randn(8, 10, 14, generator=generator())
    masks = Masks(torch.randn(5, 8, generator=generator(1)), pixels, (10.0, 14.0), (80, 112))
    whole = F.interpolate(masks.logits()[None], (80, 112), mode="bilinear")[0] > 0
    assert torch.equal(masks.build(), whole)
    keep = torch.tensor([True, False, True, False, False])
    assert torch.equal(masks[keep].build(), whole[keep])
    assert masks[keep][:0].build().shape == (0, 80, 112)
    padded = replace(masks, pixels=F.pad(pixels, (0, 3, 0, 2), value=9.0))
    assert torch.equal(padded.logits(), masks.logits())


def test_segments_are_counted_over_those_that_are_kept() -> None:
    segments = SegmentMasks(torch.tensor([2, 5]), torch.tensor([[0, 2, 5], [5, 2, 7]], dtype=torch.int32))
    assert segments.rows().tolist() == [[0, 1, 2], [2, 1, 0]]
    assert segments[torch.tensor([False, True])].rows().tolist() == [[0, 0, 1], [1, 0, 0]]
    assert segments.build()[0].tolist() == [[False, True, False], [False, True, False]]


def edges(mask: Tensor) -> list[float]:
    """x1, y1, x2, y2 of a mask (H,W) bool; 0 of an empty one."""
    ys, xs = mask.nonzero().T
    return [float(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)] if len(xs) else [0.0] * 4


def test_boxes_of_masks_and_segments_are_those_of_their_pixels() -> None:
    masks = Masks(torch.randn(20, 8, generator=generator(1)), blobs(1, 8, 10, 14)[0].float() - 0.6, (9.3, 13.5), (77, 115))
    masks.embeddings[3] = 0.0  # an empty one
    assert masks.boxes().tolist() == [edges(mask) for mask in masks.build()]
    assert masks[torch.zeros(20, dtype=torch.bool)].boxes().shape == (0, 4)
    numbers = torch.arange(12) * 2 + 1
    segments = SegmentMasks(numbers, torch.randint(0, 20, (9, 7), generator=generator(3), dtype=torch.int32))
    assert segments.boxes().tolist() == [edges(mask) for mask in segments.build()]
    assert segments[torch.zeros(12, dtype=torch.bool)].boxes().shape == (0, 4)


# ---------------------------------------------------------------------------------------------------- whole models
SMALL = {
    "dfine_small": {"backbone": "tf_efficientnet_lite0", "num_queries": 12, "denoising": 6},
    "mask2former_small": {"num_queries": 12},
    "maskdino": {
        "backbone": "resnet18", "width": 64, "num_queries": 12, "denoising": 6, "encoder_layers": 1, "decoder_layers": 2,
        "ffn_width": 64,
    },
}  # fmt: skip


def model_of(name: str, **changes: object) -> QueryModel:
    heads = {"masks": {"points": 128}, **({} if name.startswith("mask2former") else {"labels": {"loss": "mal"}})}
    torch.manual_seed(0)
    return builders.builder(name)(TASK.make_heads(CLASSES, heads), TASK.steering, **{**SMALL[name], **changes})


def batch() -> tuple[ImageBatch, Targets]:
    sizes = torch.tensor([[96, 130], [80, 100]])
    padding = torch.ones(2, 96, 130, dtype=torch.bool)
    for image, (height, width) in enumerate(sizes.tolist()):
        padding[image, :height, :width] = False
    pixels = torch.randint(0, 255, (2, 3, 96, 130), dtype=torch.uint8, generator=generator(4))
    return ImageBatch(pixels, padding, True, sizes), targets_of(blobs(2, 3, 96, 130), (3, 2), sizes)


@pytest.mark.parametrize("name", SMALL)
def test_every_part_learns_and_losses_are_finite(name: str) -> None:
    model, (images, targets) = model_of(name).train(), batch()
    for parameter in model.parameters():  # what starts at zero would pass no gradient on
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    losses = Criterion(model.heads.heads(), model.steering)(model(images, targets), targets)
    assert losses.total.isfinite()
    losses.total.backward()
    silent = {n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert silent == set()


@torch.no_grad()
def test_padding_changes_nothing_in_the_pixel_map() -> None:
    """Neither the backbone's cells there nor the encoder's tokens, also where a cell lies between two of them."""
    torch.manual_seed(0)
    decoder = light_pixels(6, 8, 8, 4, 2).eval()  # published group norms count padding, too
    fine, tokens = torch.randn(1, 6, 9, 12), torch.randn(1, 8, 5, 6)
    extents = torch.tensor([[[12.0, 9.0]]])

    def seen(height: int, width: int) -> Tensor:
        around, below = 9 * torch.randn(1, 6, 2 * height, 2 * width), 9 * torch.randn(1, 8, height, width)
        paddings = [torch.ones(1, *maps.shape[-2:], dtype=torch.bool) for maps in (around, below)]
        for maps, own, padding in zip((around, below), (fine, tokens), paddings, strict=True):
            maps[..., : own.shape[2], : own.shape[3]] = own
            padding[..., : own.shape[2], : own.shape[3]] = False
        memory = Memory(below.flatten(2).mT, torch.zeros(()), ((height, width),), paddings[1].flatten(1), torch.ones(1, 1, 2))
        whole = decoder(Features([around], [paddings[0]], None, extents), memory).pixels
        assert whole is not None
        return whole.map[..., :9, :12]

    first = seen(5, 6)  # the last row of the finer map is padding, as its sides are odd
    torch.testing.assert_close(seen(8, 7), first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["maskdino", "mask2former_small"])
def test_an_architecture_of_masks_wants_a_head_for_them(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.name = {name.removesuffix('_small')}: no head of this task predicts masks"):
        builders.builder(name)([LabelHead(Fit(64), 3)], Steering(), **SMALL[name])


@pytest.mark.parametrize("name", SMALL)
def test_an_image_without_objects_is_an_ordinary_image(name: str) -> None:
    model, (images, _) = model_of(name).train(), batch()
    empty = targets_of(torch.zeros(2, 0, 96, 130, dtype=torch.bool), (0, 0), images.sizes)
    assert Criterion(model.heads.heads(), model.steering)(model(images, empty), empty).total.isfinite()


def test_mask_dino_starts_from_the_boxes_of_its_first_masks() -> None:
    model, (images, _) = model_of("maskdino").train(), batch()
    model.denoising = None
    proposals, layers = model(images).rounds
    masks = torch.einsum("bqe,behw->bqhw", proposals.answers["masks"]["embedding"][0], proposals.contexts["masks"].pixels.map)
    masks = masks.detach()
    masks[1, :, 20:], masks[1, :, :, 25:] = -1.0, -1.0  # padding
    corners = mask_boxes(masks > 0, proposals.contexts["masks"].pixels.extents)
    first = layers.answers["boxes"]["boxes"][0]
    assert layers.stages[0].kind == "initial" and len(layers.stages) == 3
    torch.testing.assert_close(first[..., 2:], corners[..., 2:] - corners[..., :2], atol=1e-5, rtol=0)


def test_mask_dino_norms_twice_what_classes_and_masks_come_from() -> None:
    """At its layers, as published; boxes come from states that are normed once, and are refined from such as are not."""
    model, (images, _) = model_of("maskdino").train(), batch()
    model.denoising = None
    norm, heads = model.decoder.norm, model.heads.heads()
    boxes, labels, masks = heads["boxes"].mlp.layers[0], heads["labels"].linear.layers[0], heads["masks"].mlp.layers[0]
    for weight in (norm.weight, norm.bias, boxes.last.weight):
        torch.nn.init.normal_(weight, std=0.5)
    begun: list[Tensor] = []
    raw: list[Tensor] = []
    model.decoder.layers[0].register_forward_pre_hook(lambda _, given: begun.append(given[0][:, :, 0]))
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda _, __, out: raw.append(out[:, :, 0]))
    _, said = model(images).rounds

    close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    anchors = said.answers["boxes"]["boxes"][0]
    assert (anchors > 0.9999).any(), "where it matters how logits are bounded"
    for stage, state in enumerate([norm(begun[0]), *(norm(norm(x)) for x in raw)]):
        close(said.answers["labels"]["logits"][stage], labels(state))
        close(said.answers["masks"]["embedding"][stage], masks(state))
    for stage, x in enumerate(raw, 1):
        bounded = torch.log(anchors.clamp(min=1e-5) / (1 - anchors).clamp(min=1e-5))
        close(said.answers["boxes"]["boxes"][stage], (boxes(norm(x)) + bounded).sigmoid())
        anchors = (boxes(x) + bounded).sigmoid()


@torch.no_grad()
def test_boxes_come_from_masks_where_no_head_has_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the pixel, and no mask is built at full size but those whose boxes are read."""
    full, counts = masks_module.Masks.full_logits, list[int]()

    def counted(self: Masks, *given: int) -> Iterator[Tensor]:
        for part in full(self, *given):
            counts.append(len(part))
            yield part

    monkeypatch.setattr(Masks, "full_logits", counted)
    model, (images, _) = model_of("mask2former_small").eval(), batch()
    sizes, classes = torch.tensor([[192, 261], [160, 200]]), ClassMap((1, 2, 3, 4), ("a", "b", "c", "d"), (True,) * 4)
    results = results_of(model, TASK, classes, images, sizes, 12, ["", ""])
    kept = [result.above(float(result.scores[9])) for result in results]
    assert counts == [] and [len(result) for result in kept] == [10, 10]
    boxes = [result.boxes for result in kept]
    assert counts == [8, 2, 8, 2]
    for result, found in zip(kept, boxes, strict=True):
        assert found.tolist() == [edges(mask) for mask in result.masks]
    fewer = results[0].without_overlaps(0.3)
    assert 0 < len(fewer) < 12 and fewer.boxes.tolist() == [edges(mask) for mask in fewer.masks]

    truth = {
        "images": [{"id": 7, "height": 192, "width": 261}],
        "categories": [{"id": id_, "name": name} for id_, name in zip(classes.ids, classes.names, strict=True)],
        "annotations": [],
    }
    evaluator = TASK.evaluator(truth, classes, "auto")
    counts.clear()
    evaluator.add(7, kept[0])
    assert counts == [8, 2], "masks are built once for both metrics"
    x, y, w, h = evaluator.boxes.records[0]["bbox"]
    assert [x, y, x + w, y + h] == boxes[0][0].tolist()


def test_recomputing_changes_no_number() -> None:
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        attention = DeformableAttention(16, 2, 1, 2)
        layer = DeformableEncoderLayer(attention, 16, 32, 0.1, recompute)
        tokens = torch.randn(2, 12, 16, generator=generator(1), requires_grad=True)
        memory = Memory(tokens, torch.zeros_like(tokens), ((3, 4),), None, torch.ones(2, 1, 2))
        torch.manual_seed(1)
        out = layer(tokens, memory, torch.full((2, 12, 1, 2), 0.5))
        out.square().sum().backward()
        found.append([out.detach(), tokens.grad, *(parameter.grad for parameter in layer.parameters())])
    for plain, lean in zip(*found, strict=True):
        assert torch.equal(plain, lean)


def test_steering_names_only_heads_that_are_there() -> None:
    assert model_of("mask2former_small").steering == Steering(hidden="masks", quality=("masks",))
    assert list(model_of("mask2former_small").heads) == ["labels", "masks"]
