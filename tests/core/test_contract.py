"""The contract of heads, by toy heads that are not detection: slots, prompts, silence, the union of pairs."""

from __future__ import annotations

import pytest
import torch
from toys import (
    CLASSES,
    WIDTH,
    GroundingHead,
    LaneHead,
    TinyBackbone,
    Witness,
    detection_heads,
    images,
    make_targets,
    silent_parameters,
    tiny_model,
    vary,
)

from queryvision.criterion import Criterion
from queryvision.head import Fit, Steering
from queryvision.matching import match
from queryvision.model import builders
from queryvision.model.builders import dense
from queryvision.tasks.detection import BoxHead, LabelHead

LAZY = {"decoder.layers.0.self_attn.in_proj_weight"}  # DETR's first layer attends over states that are all zero


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------------------------------------- slots
@pytest.fixture
def build(monkeypatch):
    """`builders.detr` on a tiny backbone."""
    monkeypatch.setattr(dense, "make_backbone", lambda *_, **__: TinyBackbone())
    numbers = {"width": WIDTH, "num_queries": 5, "encoder_layers": 1, "num_heads": 4, "ffn_width": 64, "dropout": 0.0}

    def make(heads):
        torch.manual_seed(0)
        return builders.detr(heads, **numbers, decoder_layers=2)

    return make


def lane_heads(fit: Fit):
    return [LabelHead(fit, CLASSES), LaneHead(fit.width, 4)]


def lane_targets(lacks=()):
    return make_targets([2, 1], lacks=lacks, lanes=torch.rand(2, 2, 4, generator=torch.Generator().manual_seed(1)))


def test_lanes_train(build) -> None:
    model, targets = vary(build(lane_heads)).train(), lane_targets()
    outputs = model(images())
    (round,) = outputs.rounds
    assert round.answers["lanes"]["x"].shape == (2, 2, 5, 4)
    losses = Criterion(model.heads.heads(), model.steering)(outputs, targets)
    assert set(losses.terms) == {"labels.class", "lanes.l1"}
    losses.total.backward()
    assert silent_parameters(model) == set()


def test_lanes_learn(build) -> None:
    model, targets, batch = build(lane_heads).train(), lane_targets(), images()
    criterion = Criterion(model.heads.heads())
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    history = []
    for _ in range(100):
        losses = criterion(model(batch), targets)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append(losses.terms["lanes.l1"].item())
    assert history[0] > 0.3 and history[-1] < 0.15


def test_lanes_predict(build) -> None:
    model, batch = vary(build(lane_heads)), images()
    trained = model.train()(batch).final()
    with torch.no_grad():
        outputs = model.eval()(batch)
    assert [set(r.answers) for r in outputs.rounds] == [{"lanes"}, {"labels", "lanes"}], "only who steers runs before the last"
    final = outputs.final()
    close(final.answers["lanes"]["x"], trained.answers["lanes"]["x"])
    heads = model.heads.heads()
    picks = heads["labels"].pick(final, 3)
    lanes = heads["lanes"].decode(final, picks, torch.tensor([[100, 200], [50, 60]]))["lanes"]
    assert lanes.shape == (2, 3, 4, 2)
    query = picks.queries[1, 2]
    close(lanes[1, 2, :, 0], final.answers["lanes"]["x"][0, 1, query] * 60)
    close(lanes[1, 2, :, 1], heads["lanes"].rows * 50)


def test_slots_move_their_own_points(build) -> None:
    spied = LaneHead(WIDTH, 4)
    views, forward = [], spied.forward
    spied.forward = lambda view: (views.append(view), forward(view))[1]
    tiny_model([LabelHead(WIDTH, CLASSES), spied], layers=3).train()(images())
    assert views[0].points is None and views[0].slots.shape == (2, 5, 4, WIDTH)
    for before, view in zip(views[:-1], views[1:], strict=True):
        said = forward(before)["x"]
        close(view.points[..., 0], said)
        close(view.previous["x"], said)
        assert not view.points.requires_grad and view.points_base.requires_grad


@pytest.mark.parametrize("two_stage", [False, True])
def test_heads_with_slots_get_their_own_spans(two_stage: bool) -> None:
    silent_first = Witness("quiet", 3, 0.3, speaks=lambda stage: stage.index > 0)
    heads = [Witness("mute", 1), silent_first, LabelHead(WIDTH, CLASSES), BoxHead(WIDTH), Witness("loud", 2, 0.7)]
    steering = Steering(rank="labels", first="boxes", later="boxes") if two_stage else None
    seen = []
    model = tiny_model(heads, steering, layers=3, two_stage=two_stage).eval()
    model.decoder.norm.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        model(images())
    assert seen[0].shape == (2, 5, 1 + 6, WIDTH)
    for head, start in ((heads[0], 1), (silent_first, 2), (heads[4], 5)):
        views = [view for view in head.views if view.stage.kind == "layer"]
        assert len(views) == 3
        for view, normed in zip(views, seen, strict=True):
            close(view.slots, normed[:, :, start : start + head.slots])
            close(view.state, normed[:, :, 0])
    loud, quiet, mute = (
        [v.points for v in head.views if v.stage.kind == "layer"] for head in (heads[4], silent_first, heads[0])
    )
    assert all(bool((points == 0.7).all()) and points.shape[2] == 2 for points in loud[1:])
    assert bool((quiet[2] == 0.3).all()) and quiet[2].shape[2] == 3
    assert all(p is None or p.shape[2] == 1 for p in mute), "who says nothing keeps a place of its own"
    assert quiet[1].shape[2] == 3 and not bool((quiet[1] == 0.7).any())


def test_points_that_a_silent_head_keeps_keep_their_gradient() -> None:
    class Once(LaneHead):
        def forward(self, view):
            views.append(view)
            said.append(super().forward(view))
            return said[-1] if view.stage.index == 0 else None

    views, said = [], []
    tiny_model([Once(WIDTH, 2), LaneHead(WIDTH, 3, "others")], layers=3).train()(images())
    _, second, third = views
    close(third.points, second.points)
    assert not third.points.requires_grad
    (gradient,) = torch.autograd.grad(third.points_base.sum(), said[0]["x"])
    assert gradient.all()


# ---------------------------------------------------------------------------------------------------- context
def prompt(seed: int = 0):
    tokens = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(seed))
    return tokens, torch.arange(6) >= torch.tensor([[6], [4]])


def test_grounding_trains_on_a_prompt() -> None:
    model = tiny_model([GroundingHead(WIDTH), BoxHead(WIDTH, l1_cost=0.0, giou_cost=0.0)]).train()
    maps = torch.zeros(2, 2, 6)
    maps[0, 0, 1:3], maps[0, 1, 5], maps[1, 0, 3] = 1, 1, 1
    targets = make_targets([2, 1], tokens=maps)
    outputs = model(images(), extras={"prompt": prompt()})
    (round,) = outputs.rounds
    assert round.answers["tokens"]["logits"].shape == (2, 2, 5, 6)
    assert torch.equal(round.contexts["tokens"]["padding"], prompt()[1]) and round.contexts["boxes"] is None
    losses = Criterion(model.heads.heads())(outputs, targets)
    losses.total.backward()
    assert silent_parameters(model) <= LAZY
    (found,), _ = match(outputs.rounds, model.heads.heads(), targets)
    likely = round.answers["tokens"]["logits"][0, 1].sigmoid()[:, 3]
    assert found.query[(found.stage == 0) & (found.image == 1)].tolist() == [int(likely.argmax())]


def test_a_prompt_is_its_images_own_and_its_padding_says_nothing() -> None:
    model = tiny_model([GroundingHead(WIDTH)]).eval()
    (tokens, padding), batch = prompt(), images()

    def logits(tokens):
        with torch.no_grad():
            return model(batch, extras={"prompt": (tokens, padding)}).final().answers["tokens"]["logits"][0]

    before = logits(tokens)
    other, noisy = tokens.clone(), tokens.clone()
    other[1, 0] += 1
    noisy[1, 4:] = 7
    close(logits(noisy), before, 0)
    assert torch.equal(logits(other)[0], before[0]) and not torch.allclose(logits(other)[1], before[1])


# ---------------------------------------------------------------------------------------------------- rounds
def test_a_head_at_the_last_stage_only_splits_the_rounds() -> None:
    extra = Witness("extra", speaks=lambda stage: stage.last)
    model = tiny_model([*detection_heads(), extra], layers=3).train()
    outputs = model(images())
    first, last = outputs.rounds
    assert [s.index for s in first.stages] == [0, 1] and set(first.answers) == {"labels", "boxes"}
    assert [s.index for s in last.stages] == [2] and set(last.answers) == {"labels", "boxes", "extra"}
    for round in outputs.rounds:
        assert set(round.final) == set(last.answers), "the teacher is the last stage, also for earlier rounds"
        close(round.final["boxes"]["boxes"], last.answers["boxes"]["boxes"][-1], 0)
    losses = Criterion(model.heads.heads())(outputs, make_targets([2, 1]))
    assert set(losses.terms) == {"labels.class", "boxes.l1", "boxes.giou", "extra.nothing"}
    assert [set(stages) - set(losses.terms) for stages in losses.stages] == [set(), set()]
    assert [stages["labels.class"].shape[0] for stages in losses.stages] == [2, 1]
    losses.total.backward()
    assert silent_parameters(model) <= LAZY


def test_a_head_silent_in_the_middle() -> None:
    model = tiny_model([LabelHead(WIDTH, CLASSES), Witness(speaks=lambda s: s.index != 1)], layers=3).train()
    outputs = model(images())
    assert sorted([s.index for s in r.stages] for r in outputs.rounds) == [[0, 2], [1]]
    final = outputs.final()
    assert set(final.answers) == {"labels", "witness"} and [s.index for s in final.stages] == [2]
    with pytest.raises(KeyError, match="tracks"):
        outputs.final("tracks")


def test_heads_may_be_asked_before_the_first_layer() -> None:
    model = tiny_model(detection_heads(), initial="before").train()
    (round,) = model(images()).rounds
    assert [s.kind for s in round.stages] == ["initial", "layer", "layer"]
    assert [s.last for s in round.stages] == [False, False, True]


def test_union_pairs_reach_the_head_that_asks_for_them() -> None:
    own, union = Witness("own"), Witness("union", matched_by="union")
    model = tiny_model([*detection_heads(), own, union], layers=3).train()
    Criterion(model.heads.heads())(model(images()), make_targets([3, 2]))
    ((_, by_stage, _),), ((_, united, _),) = own.told, union.told

    def pairs(match, stage=None):
        keep = slice(None) if stage is None else match.stage == stage
        return set(zip(*(x[keep].tolist() for x in (match.image, match.query, match.target)), strict=True))

    assert pairs(united, 0) == pairs(united, 1) == pairs(united, 2) <= pairs(by_stage)
    assert {(i, q) for i, q, _ in pairs(united)} == {(i, q) for i, q, _ in pairs(by_stage)}
    assert len(pairs(united)) > 5, "the stages disagree, or this proves nothing"
