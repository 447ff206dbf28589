"""Where queries come from and who sees whom: carried ones, proposals, denoising."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toys import (
    CLASSES,
    WIDTH,
    GivenFeatures,
    Witness,
    detection_heads,
    images,
    make_targets,
    silent_parameters,
    tiny_model,
)

from queryvision.criterion import Criterion
from queryvision.head import Fit, Noise, Steering, View
from queryvision.matching import match
from queryvision.model.denoising import Denoising
from queryvision.model.groups import unseen
from queryvision.model.proposals import grid_anchors
from queryvision.model.queries import Carried, carry
from queryvision.structures import FREE, NONE, VOID, Features, QueryGroup
from queryvision.tasks.detection import BoxHead, LabelHead

STEERING = Steering(rank="labels", first="boxes", later="boxes", quality=("boxes",))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------------------------------------- carried
PINS = torch.tensor([[1, NONE, VOID, FREE], [VOID, 0, FREE, NONE]])  # carried queries are 5, 6, 7, 8


def carried(slots: int = 0, seed: int = 0) -> Carried:
    generator = torch.Generator().manual_seed(seed)
    states, positions = (torch.randn(2, 4, 1 + slots, WIDTH, generator=generator) for _ in range(2))
    return Carried(states, PINS, positions)


def test_pinned_queries_get_their_target_and_nobody_else_does() -> None:
    model = tiny_model(detection_heads(), layers=3).train()
    (round,) = model(images(), carried=carried()).rounds
    targets = make_targets([4, 2])
    (found,), _ = match([round], model.heads.heads(), targets)
    for stage in range(3):
        for image, (pinned, empty, others) in enumerate([({5: 1}, {6, 7}, {0, 2, 3}), ({6: 0}, {5, 8}, {1})]):
            mine = (found.stage == stage) & (found.image == image)
            pairs = dict(zip(found.query[mine].tolist(), found.target[mine].tolist(), strict=True))
            assert {q: t for q, t in pairs.items() if q in pinned} == pinned
            assert not empty & set(pairs)
            assert sorted(t for q, t in pairs.items() if q not in pinned) == sorted(others)


@pytest.mark.parametrize("loss", ["softmax", "focal"])  # the others teach a bad pair to be unsure
def test_none_is_taught_as_background_and_void_is_taught_nothing(loss: str) -> None:
    model = tiny_model(detection_heads(loss)).train()
    outputs = model(images(), carried=carried())
    said = outputs.rounds[0].answers
    logits, boxes = said["labels"]["logits"], said["boxes"]["boxes"]
    total = Criterion(model.heads.heads(), STEERING)(outputs, make_targets([4, 2])).total
    by_logits, by_boxes = torch.autograd.grad(total, [logits, boxes])
    for image, (pinned, none, void) in enumerate([(5, 6, 7), (6, 8, 5)]):
        assert not by_logits[:, image, void].any() and not by_boxes[:, image, void].any()
        assert not by_boxes[:, image, none].any() and by_boxes[:, image, pinned].all()
        assert (by_logits[:, image, none, :CLASSES] > 0).all(), "every class goes down"
        if loss == "softmax":
            assert (by_logits[:, image, none, -1] < 0).all(), "and no-object up"
        assert (by_logits[:, image, pinned] < 0).any(-1).all(), "the pinned target's class goes up"


@pytest.mark.parametrize("slots", [0, 2])
def test_void_is_seen_by_nobody(slots: int) -> None:
    model = tiny_model([*detection_heads(), *([Witness(slots=slots)] if slots else [])]).eval()

    def logits(column: int | None) -> torch.Tensor:
        tracks = carried(slots)
        if column is not None:
            tracks.states[0, column] += 1.0
            tracks.positions[0, column] -= 1.0
        with torch.no_grad():
            return model(images(), carried=tracks).final().answers["labels"]["logits"][0, 0]

    before, void, none = logits(None), logits(2), logits(1)
    others = [q for q in range(9) if q != 7]
    close(void[others], before[others])
    assert not torch.allclose(none[others], before[others], atol=1e-3), "others are seen"


def test_void_is_as_good_as_absent() -> None:
    model, tracks = tiny_model(detection_heads()).eval(), carried()
    tracks = Carried(tracks.states[:1], PINS[:1], tracks.positions[:1])
    rest = [0, 1, 3]
    fewer = Carried(tracks.states[:, rest], PINS[:1, rest], tracks.positions[:, rest])
    with torch.no_grad():
        more, less = (model(images(1), carried=c).final().answers["boxes"]["boxes"][0, 0] for c in (tracks, fewer))
    close(more[[0, 1, 2, 3, 4, 5, 6, 8]], less)


def test_carried_queries_bring_what_the_others_have() -> None:
    model = tiny_model(detection_heads(), STEERING, two_stage=True).train()
    bare = carried()
    with pytest.raises(ValueError, match="anchors"):
        model(images(), carried=bare)
    outputs = model(images(), carried=replace(bare, positions=None, anchors=torch.full((2, 4, 4), 0.5)))
    proposals, layers = outputs.rounds
    assert proposals.shape == (1, 2, 5) and layers.shape == (2, 2, 9)
    heads = model.heads.heads()
    heads["labels"].matched_by = "union"
    Criterion(heads, STEERING)(outputs, make_targets([4, 2])).total.backward()
    assert silent_parameters(model) == set()


def test_carried_queries_extend_everything_that_queries_have() -> None:
    heads = [*detection_heads(), Witness(slots=2, mark=0.5)]
    model = tiny_model(heads, STEERING, two_stage=True)
    memory = model.encoder(model.neck(model.backbone(images())))
    queries = model.queries(memory, model.heads, {})
    queries = replace(queries, base=queries.anchors, points_base=queries.points)
    tracks = Carried(torch.zeros(2, 4, 3, WIDTH), PINS, anchors=torch.rand(2, 4, 4), points=torch.rand(2, 4, 2, 2))
    longer = carry(queries, tracks)
    for name in ("states", "anchors", "points", "base", "points_base"):
        assert getattr(longer, name).shape[1] == 9, name
        assert torch.equal(getattr(longer, name)[:, :5], getattr(queries, name))
    assert longer.groups[0].size == 9 and longer.groups[0].pins.tolist() == [[FREE] * 5 + row for row in PINS.tolist()]
    denoised = Denoising(4, WIDTH, 2)(longer, make_targets([2, 1]), model.heads, None)
    sizes = {getattr(denoised, name).shape[1] for name in ("states", "anchors", "points", "base", "points_base")}
    assert sizes == {sum(group.size for group in denoised.groups)}


# ---------------------------------------------------------------------------------------------------- proposals
class Eastward(Witness):
    """Ranks a token by how far right and down it lies, so that padding would come first."""

    def rank(self, answer):
        return answer["anchor"].sum(-1)

    def forward(self, view):
        super().forward(view)
        return {"anchor": view.anchors}

    def loss(self, round, match, targets, facts):
        return {"nothing": match.sum_per_stage(match.predicted(round.answers[self.name]["anchor"]).sum(-1))}


def padded_features(real: list[tuple[int, int]], height: int, width: int, seed: int = 0) -> Features:
    """The same contents whatever the size; what lies in the padding is noise."""
    maps = torch.randn(len(real), 16, height, width) * 9
    contents = torch.randn(len(real), 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    padding = torch.ones(len(real), height, width, dtype=torch.bool)
    for image, (h, w) in enumerate(real):
        maps[image, :, :h, :w] = contents[image, :, :h, :w]
        padding[image, :h, :w] = False
    return Features([maps], [padding])


def test_padding_is_never_selected() -> None:
    backbone, real = GivenFeatures(), [(3, 4), (2, 3), (2, 2)]
    backbone.features = padded_features(real, 4, 5)
    heads = [*detection_heads(), Eastward("east")]
    model = tiny_model(heads, replace(STEERING, rank="east"), backbone=backbone, two_stage=True).train()
    proposals, layers = model(images(3)).rounds
    assert proposals.proposals and not layers.proposals and layers.proposal_index is None
    for image, (h, w) in enumerate(real):
        row, column = proposals.proposal_index[image] // 5, proposals.proposal_index[image] % 5
        assert (row < h).all() and (column < w).all()
    # the third image has but 4 tokens for 5 queries: one is asked twice
    assert [len(set(index.tolist())) for index in proposals.proposal_index] == [5, 5, 4]
    farthest = proposals.answers["east"]["anchor"][0].sum(-1)
    assert (farthest[:, :-1] >= farthest[:, 1:])[:2].all(), "best first"


def test_selected_queries_start_from_their_proposals_without_a_gradient() -> None:
    spy = Witness()
    model = tiny_model([*detection_heads(), spy], STEERING, two_stage=True).train()
    proposals, _ = model(images()).rounds
    chosen, first, *_ = spy.views
    memory = model.encoder(model.neck(model.backbone(images())))
    grid, valid = grid_anchors(memory)
    tokens = model.queries.norm(model.queries.project(memory.tokens * valid[..., None]))
    boxes, labels = (model.heads.heads()[n](View(tokens, anchors=grid)) for n in ("boxes", "labels"))
    assert proposals.shape == (1, 2, 5)
    for image in range(2):
        best = labels["logits"][image, :, :CLASSES].amax(-1).topk(5).indices
        assert torch.equal(proposals.proposal_index[image], best)
        close(proposals.answers["boxes"]["boxes"][0, image], boxes["boxes"][image, best])
        close(first.anchors[image], boxes["boxes"][image, best])
        close(chosen.anchors[image], grid[image, best], 0)
    assert chosen.answers["boxes"]["boxes"].requires_grad and not first.anchors.requires_grad and not first.base.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_all_tokens_are_taught_as_proposals_where_the_builder_says_so(training: bool) -> None:
    model = tiny_model(detection_heads(), STEERING, two_stage=True).train(training)
    chosen = model(images()).rounds
    model.queries.teach_all = True
    everything = model(images()).rounds
    assert everything[0].shape == (1, 2, 20 if training else 5) and everything[0].proposals
    assert (everything[0].proposal_index is None) == training
    close(everything[1].answers["boxes"]["boxes"], chosen[1].answers["boxes"]["boxes"])


# ---------------------------------------------------------------------------------------------------- denoising
class NoisyLabels(LabelHead):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(Fit(WIDTH, denoising=True), *args, **kwargs)
        self.shift = {}  # {group: what is added to its content}

    def noise(self, targets, plan, generators):
        content = super().noise(targets, plan, generators).content
        for group, value in self.shift.items():
            content = content + value * (plan.group == group)[:, None]
        return Noise(content=content)


def denoising_model(loss: str = "focal", **more):
    heads = [NoisyLabels(CLASSES, loss=loss), BoxHead(WIDTH)]
    return tiny_model(heads, STEERING, two_stage=True, denoising=Denoising(7, WIDTH), **more).train()


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(2)]


def boxes_of(outputs, queries: str) -> torch.Tensor:
    return torch.cat([r.answers["boxes"]["boxes"] for r in outputs.rounds if r.queries == queries and not r.proposals])


def test_denoising_changes_nothing_for_the_main_queries() -> None:
    model, targets = denoising_model(), make_targets([3, 1])
    with_it, without = model(images(), targets, generators=generators()), model(images())
    assert [(r.queries, r.proposals) for r in with_it.rounds] == [("main", True), ("main", False), ("denoising", False)]
    close(boxes_of(with_it, "main"), boxes_of(without, "main"))
    assert {r.queries for r in model.eval()(images(), targets).rounds} == {"main"}, "only in training"


def test_denoising_groups_see_themselves_and_main_but_not_each_other() -> None:
    model, targets = denoising_model(), make_targets([3, 1])
    labels = model.heads.heads()["labels"]

    def run():
        return model(images(), targets, generators=generators())

    before = run()
    labels.shift = {1: torch.randn(WIDTH)}
    after = run()
    labels.shift = {}
    group = model.denoising.plan(targets.counts).group
    assert group.tolist() == [0] * 6 + [1] * 6
    moved = (boxes_of(after, "denoising") - boxes_of(before, "denoising")).abs().amax((0, 1, 3))
    assert (moved[group == 0] < 1e-6).all() and (moved[group == 1] > 1e-4).all()
    close(boxes_of(after, "main"), boxes_of(before, "main"))
    with torch.no_grad():
        model.queries.start.states.add_(torch.randn(WIDTH))
    assert not torch.allclose(boxes_of(run(), "denoising"), boxes_of(before, "denoising"), atol=1e-4), "main is seen"


def test_who_sees_whom_is_directed() -> None:
    groups = (QueryGroup("main", 2), QueryGroup("dn", 4, sees=("main",), blocks=2), QueryGroup("many", 2))
    hidden = unseen(groups, 2, torch.device("cpu"))
    sees = ["11......", "11......", "1111....", "1111....", "11..11..", "11..11..", "......11", "......11"]
    assert hidden.tolist() == [[[c == "." for c in row] for row in sees]]
    assert unseen((QueryGroup("main", 5),), 2, torch.device("cpu")) is None
    pins = torch.tensor([[FREE, VOID], [0, NONE]])
    hidden = unseen((QueryGroup("main", 2, pins),), 2, torch.device("cpu"))
    assert hidden.tolist() == [[[False, True], [False, False]], [[False, False], [False, False]]]


def test_denoising_queries_know_their_answer() -> None:
    model, targets = denoising_model(), make_targets([3, 1])
    outputs = model(images(), targets, generators=generators())
    round = outputs.rounds[-1]
    one = [[0, 1, 2, NONE, NONE, NONE], [0, VOID, VOID, NONE, VOID, VOID]]
    assert round.pins.tolist() == [row * 2 for row in one] and round.repeats == 2
    found = match(outputs.rounds, model.heads.heads(), targets)[0][-1]
    wanted = [(s, i, q, t) for s in range(2) for i in range(2) for q, t in enumerate(one[i] * 2) if t >= 0]
    assert sorted(zip(*(x.tolist() for x in (found.stage, found.image, found.query, found.target)), strict=True)) == wanted


def test_noise_of_several_heads_comes_together() -> None:
    class Noisy(Witness):
        def noise(self, targets, plan, generators):
            points = torch.full((*plan.target.shape, self.slots, 2), self.mark + 0.1)
            return Noise(content=torch.full((*plan.target.shape, WIDTH), self.mark), points=points)

    quiet, loud, soft = Witness("quiet", 3), Noisy("loud", 2, 0.7), Noisy("soft", 1, 0.2)
    heads = [*detection_heads(), quiet, loud, soft]
    model = tiny_model(heads, STEERING, two_stage=True, denoising=Denoising(7, WIDTH, 6)).train()
    entered = []
    model.decoder.register_forward_pre_hook(lambda _m, inputs: entered.append(inputs[0]))
    model(images(), make_targets([3, 1]))
    (queries,), slots = entered, list(model.denoising.slots)
    assert queries.states.shape == (2, 5 + 12, 7, WIDTH)
    close(queries.states[:, 5:, 0], torch.full((2, 12, WIDTH), 0.9))
    close(queries.states[:, 5:, 1:], torch.stack(slots).expand(2, 12, -1, -1))
    for rows, marks in ((slice(0, 5), (0.5, 0.7, 0.2)), (slice(5, None), (0.5, 0.8, 0.3))):
        for part, mark in zip(queries.points[:, rows].split([3, 2, 1], 2), marks, strict=True):
            close(part, torch.full_like(part, mark))


@pytest.mark.parametrize("loss", ["softmax", "focal", "varifocal", "mal"])
@pytest.mark.parametrize("counts", [(3, 1), (3, 0), (0, 0)])
def test_every_parameter_stays_in_the_graph(counts, loss: str) -> None:
    model, targets = denoising_model(loss), make_targets(counts)
    losses = Criterion(model.heads.heads(), STEERING)(model(images(), targets, generators=generators()), targets)
    assert all(torch.isfinite(value) for value in (losses.total, *losses.terms.values()))
    losses.total.backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    if all(counts):
        assert silent_parameters(model) == set()
    if not any(counts):
        assert not model.heads["labels"].embedding.weight.grad.any(), "VOID queries are taught nothing"
        assert not losses.terms["boxes.l1"].any() and losses.terms["labels.class"] > 0


@pytest.mark.parametrize("negatives", [True, False])
@pytest.mark.parametrize("counts", [(3, 2), (9, 0), (0, 0)])
def test_what_losses_are_divided_by_is_known_before_the_forward_pass(counts, negatives: bool) -> None:
    model, targets = denoising_model("softmax"), make_targets(counts)
    model.denoising.negatives = negatives
    criterion = Criterion(model.heads.heads(), STEERING)
    outputs = model(images(), targets, generators=generators())
    sizes = {r.queries: (r.shape[2], r.repeats) for r in outputs.rounds}
    assert model.group_sizes(counts) == sizes
    known = criterion(outputs, targets, criterion.counts(targets, model.group_sizes(counts)))
    close(known.total, criterion(outputs, targets).total)
