"""Compiled parts: the same numbers, and never quietly run as they were."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from test_recomputation import gradients, model
from torch import nn

from queryvision.engine.compilation import compile_parts
from queryvision.errors import ConfigError
from queryvision.layers import linear

PARTS = ["backbone", "encoder", "decoder.layers"]


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SMALL", 0)


def compared(name: str, *heights: int) -> None:
    """Gradients of images of some sizes, compiled and not, where the same is dropped and every linear layer is oneDNN's."""
    plain = model(name, dropout=0.1)
    with torch.no_grad():  # else places lie exactly on the borders of cells, where the last digit decides about the slope
        for key, value in plain.named_parameters():
            if "sampling_offsets" in key:
                value.add_(0.1 * torch.randn_like(value))
    quick = copy.deepcopy(plain)
    compile_parts(quick, PARTS)
    assert list(quick.state_dict()) == list(plain.state_dict())
    for height in heights:
        wanted, found = gradients(plain, height)[0], gradients(quick, height)[0]
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():
            assert (value - found[key]).norm() <= 1e-4 * max(value.norm(), 1e-3), key


def test_parts_are_traced_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler behind it, which is what takes its time."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compared("deformable_detr", 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detr", "deformable_detr"])
def test_compiled_parts_give_the_same_numbers(name: str) -> None:
    compared(name, 64, 96)


def test_what_cannot_be_compiled_is_one_line() -> None:
    class Doubting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    whole = nn.ModuleDict({"doubting": Doubting()})
    compile_parts(whole, ["doubting"])
    with pytest.raises(ConfigError, match="'doubting' cannot be compiled in one piece"):
        whole["doubting"](torch.ones(2))
    with pytest.raises(ConfigError, match="train.compile: the model has no part 'doubt'"):
        compile_parts(whole, ["doubt"])


def test_a_part_that_is_never_called_is_refused() -> None:
    """It would quietly run as it was."""
    whole = model("detr", dropout=0.0)
    uncalled = compile_parts(whole, ["heads", "backbone.body"])
    gradients(whole, 64)
    with pytest.raises(ConfigError, match="train.compile: 'backbone.body' is never called as a whole"):
        uncalled.refuse()


def test_too_many_shapes_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", dynamic=False))
    monkeypatch.setattr("queryvision.engine.compilation.MOST", 2)
    with torch._dynamo.config.patch(recompile_limit=2):  # monkeypatch would delete the setting afterwards
        part = nn.ModuleDict({"linear": nn.Linear(2, 2)})
        uncalled = compile_parts(part, ["linear"])
        for rows in (2, 3):
            part["linear"](torch.ones(rows, 2))
        uncalled.refuse()
        with pytest.raises(ConfigError, match="'linear' met more than 2 shapes of batches; set data.multiple"):
            part["linear"](torch.ones(4, 2))
