"""Recomputed parts: the same numbers, less memory."""

from __future__ import annotations

import copy
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from toys import detection_heads, images, make_targets

from queryvision.criterion import Criterion
from queryvision.engine.optimisation import freeze
from queryvision.engine.recomputation import recompute
from queryvision.errors import ConfigError
from queryvision.model.builders import builder
from queryvision.model.query_model import QueryModel


def model(name: str = "detr", **more: object) -> QueryModel:
    torch.manual_seed(0)
    sizes = {"width": 32, "num_heads": 4, "ffn_width": 64, "encoder_layers": 2, "decoder_layers": 2, "num_queries": 6}
    return builder(name)(lambda fit: detection_heads(), None, backbone="resnet18", **sizes, **more).train()


class Held:
    """A tensor that the graph holds."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def gradients(model: QueryModel, height: int = 64) -> tuple[dict[str, Tensor], int]:
    """Of a step with dropout, and the bytes that are kept for the backward pass, parameters apart."""
    held: WeakSet[Held] = WeakSet()

    def keep(value: Tensor) -> Held:
        held.add(one := Held(value))
        return one

    torch.manual_seed(1)
    targets = make_targets((2, 3))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.value):
        losses = Criterion(model.heads.heads(), model.steering)(model(images(2, height, 64), targets), targets)
    storages = {one.value.untyped_storage().data_ptr(): one.value.untyped_storage().nbytes() for one in held}
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    model.zero_grad()
    losses.total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sum(storages.values())


def test_recomputed_blocks_change_nothing_but_memory() -> None:
    plain = model()
    light = copy.deepcopy(plain)
    recompute(light, ["backbone", "encoder"], [])
    assert list(light.state_dict()) == list(plain.state_dict())
    wanted, all_bytes = gradients(plain)
    found, some_bytes = gradients(light)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    assert some_bytes < 0.65 * all_bytes, (some_bytes, all_bytes)


def test_norms_that_would_count_twice_are_refused() -> None:
    live = model(frozen_norm=False)
    with pytest.raises(ConfigError, match="'backbone' keep statistics"):
        recompute(live, ["backbone"], [])
    recompute(live, ["backbone"], freeze(live, ["backbone"]))


def test_a_part_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"train\.recompute: the model has no part 'encodr'; did you mean 'encoder'"):
        recompute(model(), ["encodr"], [])
