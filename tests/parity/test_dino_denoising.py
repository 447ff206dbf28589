"""What DINO's denoising queries may and may not do, and what noise they get (arXiv 2203.03605)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peers import padded_batch
from reference_dino import MAIN, boxes, close, generators, logits, of, ours
from samples import targets_of
from torch import Tensor, nn

from queryvision.criterion import Criterion
from queryvision.head import DenoisingPlan, Fit
from queryvision.matching import match
from queryvision.model.denoising import Denoising
from queryvision.structures import NONE, VOID, Queries, Targets
from queryvision.tasks.detection import BoxHead, LabelHead
from queryvision.tasks.detection.models import STEERING


def test_denoising_changes_neither_answers_nor_losses_of_the_main_queries() -> None:
    model, images, targets = ours(), padded_batch(96, 160), targets_of([[1, 4, 2], [3]])
    before = torch.get_rng_state()
    with_it, without = model(images, targets, generators=generators()), model(images)
    assert torch.equal(torch.get_rng_state(), before), "noise has generators of its own"
    assert [(r.queries, r.proposals) for r in with_it.rounds] == [("main", True), ("main", False), ("denoising", False)]
    criterion = Criterion(model.heads.heads(), STEERING)
    losses = [criterion(o, targets).stages for o in (with_it, without)]
    for proposals, (mine, alone) in zip((True, False), zip(*losses, strict=False), strict=True):
        close(logits(of(with_it, "main", proposals)), logits(of(without, "main", proposals)), 1e-6)
        close(boxes(of(with_it, "main", proposals)), boxes(of(without, "main", proposals)), 1e-6)
        for name, value in alone.items():
            torch.testing.assert_close(mine[name], value, atol=1e-6, rtol=1e-6)


def test_who_sees_whom() -> None:
    """By what reaches whom: state of a query that enters -> answer of a query at the last layer."""
    model, targets = ours(), targets_of([[1, 4], [3, 0]])
    states: list[Tensor] = []

    def leaf(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        queries = inputs[0]
        states.append(queries.states.detach().requires_grad_())
        return (Queries(**{**vars(queries), "states": states[0]}), *inputs[1:])

    model.decoder.register_forward_pre_hook(leaf)
    outputs = model(padded_batch(96, 160), targets, generators=generators())
    plan = model.denoising.plan(targets.counts)
    group = torch.cat((torch.full((MAIN,), -1), plan.group))
    assert plan.group.tolist() == [0] * 4 + [1] * 4
    last = torch.cat([logits(of(outputs, name))[-1] for name in ("main", "denoising")], 1)
    for asked, sees in ((-1, {-1}), (0, {-1, 0}), (1, {-1, 1})):
        (gradient,) = torch.autograd.grad(last[:, group == asked].square().sum(), states, retain_graph=True)
        strength = gradient.abs().amax((0, 2, 3))
        assert {g for g in (-1, 0, 1) if strength[group == g].min() > 0} == sees
        assert all(strength[group == g].max() == 0 for g in {-1, 0, 1} - sees)


def test_denoising_queries_do_not_notice_the_fillers_beside_them() -> None:
    """The second image has one object in both batches; in the first batch nothing must be filled up for it."""
    model, images = ours(denoising=1, label_noise=0.0, box_noise=0.0), padded_batch(96, 160)
    alone, beside = (
        of(model(images, targets_of(labels, [[[0.5, 0.5, 0.2, 0.2]] * len(row) for row in labels])), "denoising")
        for labels in ([[2], [3]], [[2, 2, 2], [3]])
    )
    assert beside.real[1].tolist() == [True, False, False] * 2 and alone.real is None
    close(logits(beside)[:, 1, [0, 3]], logits(alone)[:, 1], 1e-5)
    close(boxes(beside)[:, 1, [0, 3]], boxes(alone)[:, 1], 1e-5)


@pytest.mark.parametrize("labels", [[[], []], [[], [3, 1]], [[2], [0, 4, 1, 1, 2, 3]], [[1, 4], [3, 0]]])
def test_every_mix_of_counts_trains_with_known_pairs(labels: list[list[int]]) -> None:
    model = ours()
    targets = targets_of(labels)
    outputs = model(padded_batch(96, 160), targets, generators=generators())
    round = of(outputs, "denoising")
    fullest = max(1, *targets.counts)
    groups = max(1, 5 // fullest) if any(targets.counts) else 1
    assert round.repeats == groups and round.shape == (3, 2, 2 * groups * fullest)
    wanted = [
        [*row, *[VOID] * (fullest - len(row)), *[NONE] * len(row), *[VOID] * (fullest - len(row))] * groups
        for row in (list(range(count)) for count in targets.counts)
    ]
    assert round.pins.tolist() == wanted
    found = match(outputs.rounds, model.heads.heads(), targets)[0][-1]
    pairs = sorted(zip(*(x.tolist() for x in (found.stage, found.image, found.query, found.target)), strict=True))
    assert pairs == sorted((s, i, q, t) for s in range(3) for i in range(2) for q, t in enumerate(wanted[i]) if t >= 0)
    losses = Criterion(model.heads.heads(), STEERING)(outputs, targets)
    assert losses.total.isfinite()
    losses.total.backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()}
    if sum(targets.counts):
        assert silent == set()
    else:  # nothing has a box
        assert all(n.startswith(("heads.boxes.", "heads.labels.embedding", "decoder.positions")) for n in silent)


@pytest.mark.parametrize("count", [1, 3, 7, 40, 100, 130])
def test_number_of_groups_is_the_published_one(count: int) -> None:
    """DINO:models/dino/dn_components.py: twice the number of queries, positives and negatives, over twice the objects."""
    assert Denoising(100, 8).num_groups([count, 1]) == max(1, 2 * 100 // (2 * count))


def many(groups: int = 40) -> tuple[Targets, DenoisingPlan]:
    targets = targets_of([[i % 5 for i in range(50)]])
    targets.values["boxes"][..., 2:] *= 0.4  # so that no corner leaves the image
    return targets, Denoising(50 * groups, 8).plan(targets.counts)


@pytest.mark.parametrize("box_noise", [0.4, 1.0])
def test_corners_move_less_than_half_a_size_or_between_one_and_two_of_it(box_noise: float) -> None:
    """Shares of `box_noise` times half the size: 0 to 1 of positive queries, 1 to 2 of negative ones, either way."""
    targets, plan = many()
    head = BoxHead(Fit(8, anchors=4, denoising=True), box_noise=box_noise)
    wanted = plan.of(targets["boxes"])
    moved = head.noise(targets, plan, [torch.Generator().manual_seed(0)]).anchors
    kept = (moved[..., 2:] > 0).all(-1)  # far corners may pass each other
    assert kept[plan.positive].all()

    def corners(boxes: Tensor) -> Tensor:
        return torch.cat((boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2), -1)

    shift = (corners(moved) - corners(wanted)) / (wanted[..., 2:].repeat(1, 1, 2) / 2 * box_noise)
    for positive, low, high in ((True, 0.0, 1.0), (False, 1.0, 2.0)):
        mine = shift[kept & (plan.positive == positive)]
        size = mine.abs()
        assert low - 1e-3 <= size.min() and size.max() <= high + 1e-3
        if positive or box_noise < 0.5:  # otherwise only those are left whose corners did not pass each other
            assert size.min() < low + 0.01 and size.max() > high - 0.01 and abs(size.mean() - (low + high) / 2) < 0.02
            assert abs((mine > 0).float().mean() - 0.5) < 0.03
            assert (mine.sign().prod(-1) < 0).float().mean() > 0.4, "corners move independently"


def test_corners_that_pass_each_other_leave_no_box_or_change_places() -> None:
    """DINO and RT-DETR cut at 0, D-FINE mirrors (D-FINE:src/zoo/dfine/denoising.py): sides of negative queries are its own."""
    targets, plan = many()
    anchors = {}
    for distributions in (False, True):
        fit = Fit(8, anchors=4, denoising=True, distributions=distributions)
        noise = BoxHead(fit, box_noise=1.0).noise(targets, plan, [torch.Generator().manual_seed(0)])
        assert noise.anchors is not None
        anchors[distributions] = noise.anchors[~plan.positive]
    cut, mirrored = anchors[False], anchors[True]
    crossed = cut[:, 2:] == 0
    assert abs(crossed.float().mean() - 0.25) < 0.02, "both corners move inwards, a quarter of the time on either axis"
    assert torch.equal(mirrored[:, :2], cut[:, :2]) and torch.equal(mirrored[:, 2:][~crossed], cut[:, 2:][~crossed])
    wanted = plan.of(targets["boxes"])[~plan.positive][:, 2:][crossed]
    assert (mirrored[:, 2:][crossed] <= wanted + 1e-6).all() and (mirrored[:, 2:][crossed] > 0).float().mean() > 0.99


@pytest.mark.parametrize(("share", "changed"), [(0.5, 0.2), (1.0, 0.4), (0.0, 0.0)])
def test_half_the_share_of_labels_is_drawn_at_random(share: float, changed: float) -> None:
    """Of those drawn among 5 classes a fifth stays what it was."""
    targets, plan = many()
    head = LabelHead(Fit(8, denoising=True), 5, loss="focal", label_noise=share)
    content = head.noise(targets, plan, [torch.Generator().manual_seed(0)]).content
    labels = (content[:, :, None] == head.embedding.weight).all(-1).float().argmax(-1)
    other = labels != plan.of(targets["labels"])
    assert abs(other.float().mean() - changed) < 0.02
    if changed:
        assert torch.bincount(labels[other], minlength=5).min() > 0.8 * other.sum() / 5
        assert abs(other[plan.positive].float().mean() - other[~plan.positive].float().mean()) < 0.03
