"""Who steers and what mistakes are told: hiding, look forward twice, names that do not fit, joining."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toys import (
    CLASSES,
    WIDTH,
    GivenFeatures,
    HidingHead,
    LaneHead,
    Witness,
    detection_heads,
    images,
    make_targets,
    tiny_model,
)

from queryvision.criterion import Criterion
from queryvision.errors import ConfigError
from queryvision.head import Feedback, Fit, Steering
from queryvision.joint import join
from queryvision.structures import Features
from queryvision.task import HeadSpec, Task
from queryvision.tasks.detection import BoxHead, LabelHead


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------------------------------------- hiding
def features(batch: int = 2, height: int = 3, width: int = 4) -> Features:
    return Features([torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(2))], [None])


@pytest.mark.parametrize("padded", [False, True])
def test_a_row_with_everything_hidden_looks_everywhere(padded: bool) -> None:
    backbone = GivenFeatures()
    backbone.features = features()
    if padded:
        backbone.features.paddings = [torch.arange(4).expand(2, 3, 4) >= torch.tensor([4, 2])[:, None, None]]
    hides = torch.zeros(2, 5, 12, dtype=torch.bool)
    hides[:, 1] = True
    hiding = HidingHead(hides)
    model = tiny_model([hiding], Steering(hidden="hiding"), backbone=backbone).eval()

    def states():
        with torch.no_grad():
            return model(images()).final().answers["hiding"]["state"]

    everything = states()
    hiding.hides = torch.zeros_like(hides)
    close(everything, states())
    if padded:
        hiding.hides = torch.arange(12).expand(2, 5, 12) % 4 < 2  # all that is no padding in the second image
        close(states()[:, 1], everything[:, 1])
        assert not torch.allclose(states()[:, 0], everything[:, 0])


def test_what_is_hidden_is_not_looked_at() -> None:
    hides = torch.zeros(2, 5, 12, dtype=torch.bool)
    hides[:, 2, 7:] = True
    backbone = GivenFeatures()
    backbone.features = features()
    model = tiny_model([HidingHead(hides)], Steering(hidden="hiding"), backbone=backbone).eval()
    cross, calls = model.decoder.layers[1].cross_attn, []
    cross.register_forward_pre_hook(lambda _m, inputs: calls.append(inputs))
    model(images())
    (states, positions, look) = calls[0]
    changed = look.memory.tokens.clone()
    changed[:, 7:] += torch.randn(WIDTH)
    other = replace(look, memory=replace(look.memory, tokens=changed))
    with torch.no_grad():
        moved = (cross(states, positions, other) - cross(states, positions, look)).abs().amax((0, 2, 3))
    assert moved[2] < 1e-6 and (moved[[0, 1, 3, 4]] > 1e-3).all()


# ---------------------------------------------------------------------------------------------------- steering
def test_look_forward_twice() -> None:
    class Spied(BoxHead):
        def forward(self, view):
            views.append(view)
            said.append(super().forward(view))
            return said[-1]

    views, said = [], []
    heads = [LabelHead(WIDTH, CLASSES), Spied(WIDTH)]
    tiny_model(heads, Steering(rank="labels", first="boxes", later="boxes"), two_stage=True, layers=3).train()(images())
    proposal, first, *later = views
    assert proposal.stage.kind == "proposal"
    assert not first.anchors.requires_grad
    for before, view in zip(said[1:], later, strict=False):
        assert not view.anchors.requires_grad and torch.equal(view.anchors, before["boxes"])
        (gradient,) = torch.autograd.grad(view.base.sum(), before["boxes"], retain_graph=True)
        assert gradient.any() and torch.equal(view.base, view.anchors)


def test_only_the_named_head_steers() -> None:
    class Stubborn(Witness):
        def feedback(self, answer, view):
            hidden = torch.zeros(*view.state.shape[:2], 20, dtype=torch.bool)
            hidden[:, :, self.mark] = True
            return Feedback(anchors=torch.zeros(*view.state.shape[:2], 4), hidden=hidden)

    steering = Steering(rank="labels", first="boxes", later="boxes", hidden="hides")
    stubborn, hides = Stubborn("stubborn", mark=3), Stubborn("hides", mark=7)
    model = tiny_model([LabelHead(WIDTH, CLASSES), BoxHead(WIDTH), hides, stubborn], steering, two_stage=True).train()
    looks = []
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(lambda _m, inputs: looks.append(inputs[2]))
    model(images())
    assert all(bool((view.anchors > 0).all()) for view in stubborn.views)
    assert looks[0].hidden is None, "proposals hide nothing"
    assert looks[1].hidden.any(1).any(0).nonzero().tolist() == [[7]]
    assert list(stubborn.views[-1].answers) == ["labels", "boxes", "hides"], "it sees those before it"


# ---------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize("part", ["rank", "first", "later", "hidden"])
def test_steering_by_a_missing_head_is_an_error(part: str) -> None:
    with pytest.raises(ConfigError, match="masks"):
        tiny_model(detection_heads(), Steering(**{part: "masks"}))
    with pytest.raises(ConfigError, match="masks"):
        tiny_model(detection_heads(), Steering(quality=("boxes", "masks")))


def test_two_heads_of_one_name_are_an_error() -> None:
    with pytest.raises(ConfigError, match="distinct"):
        tiny_model([BoxHead(WIDTH), BoxHead(WIDTH)])
    with pytest.raises(ConfigError, match="at least one"):
        tiny_model([])


@pytest.mark.parametrize("weights", [{}, {"nothing": 1.0, "more": 1.0}, {"other": 1.0}])
def test_terms_and_weights_must_agree(weights) -> None:
    head = Witness()
    head.weights = weights
    model = tiny_model([head])
    with pytest.raises(ValueError, match=r"witness.*nothing"):
        Criterion(model.heads.heads())(model(images()), make_targets([1, 0]))


def task(name: str, **heads: HeadSpec) -> Task:
    nothing = lambda *_: None  # noqa: E731
    return Task(name, f"about {name}", ("labels", name), heads, Steering(), nothing, nothing, nothing, nothing)


def test_tasks_join_over_heads_they_share() -> None:
    labels, boxes = HeadSpec(LabelHead, ("fit", "num_classes"), {"loss": "focal"}), HeadSpec(BoxHead)
    joint = join(task("a", labels=labels, boxes=boxes), task("b", labels=replace(labels), lanes=HeadSpec(LaneHead)))
    assert joint.name == "a+b" and joint.needs == ("labels", "a", "b")
    assert list(joint.heads) == ["labels", "boxes", "lanes"]
    heads = join(task("a", labels=labels), task("b", boxes=boxes)).make_heads(CLASSES, {})(Fit(WIDTH, 2))
    assert [head.name for head in heads] == ["labels", "boxes"] and not heads[0].softmax


def test_tasks_that_disagree_about_a_head_do_not_join() -> None:
    labels = HeadSpec(LabelHead, ("fit", "num_classes"))
    for change in ({"settings": {"loss": "focal"}}, {"type": BoxHead}, {"takes": ("fit",)}):
        with pytest.raises(ConfigError, match="labels"):
            join(task("a", labels=labels), task("b", labels=replace(labels, **change)))
