"""Dropout against its plain form with the same elements dropped, and what it keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from queryvision.layers.attention import Attention, FeedForward
from queryvision.model.folding import fold
from queryvision.ops import dropout as module
from queryvision.ops.dropout import attend, dropout, relu_dropout

P = 0.3


def drawn(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) >= P


@pytest.fixture
def same_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same elements are dropped in every call."""
    monkeypatch.setattr(module, "_draw", lambda x, p: drawn(tuple(x.shape)))


def plain(x: Tensor) -> Tensor:
    return x * drawn(tuple(x.shape)) / (1 - P)


def scores_and_values() -> tuple[Tensor, Tensor]:
    scores = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    scores[0, :, :, 4:] = -torch.inf
    return scores.requires_grad_(), torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", ["dropout", "relu_dropout", "attend"])
def test_values_and_gradients_are_those_of_the_plain_form(name: str, same_draw: None) -> None:
    scores, values = scores_and_values()
    given = (values,) if name != "attend" else (scores, values)
    forms: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "dropout": (lambda x: dropout(x, P, True), plain),
        "relu_dropout": (lambda x: relu_dropout(x, P, True), lambda x: plain(x.relu())),
        "attend": (lambda s, v: attend(s, v, P), lambda s, v: plain(s.softmax(-1)) @ v),
    }
    mine, usual = (form(*given) for form in forms[name])
    torch.testing.assert_close(mine, usual, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(mine)
    for a, b in zip(*(torch.autograd.grad(out, given, direction) for out in (mine, usual)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_share_that_is_dropped() -> None:
    x = torch.ones(400, 500)
    for out in (dropout(x, P, True), relu_dropout(x, P, True), attend(torch.zeros(400, 500), torch.eye(500), P) * 500):
        assert abs((out == 0).double().mean().item() - P) < 0.01
        torch.testing.assert_close(out[out > 0], torch.full_like(out[out > 0], 1 / (1 - P)))
    for p, training in ((0.0, True), (0.4, False)):
        assert torch.equal(dropout(x, p, training), x) and torch.equal(relu_dropout(x.clone(), p, training), x)
    assert not dropout(x, 1.0, True).any() and not relu_dropout(x.clone(), 1.0, True).any()


def test_the_seed_decides_what_is_dropped() -> None:
    """So a checkpoint's random numbers bring it back; every draw differs from the one before, and from its neighbours."""
    x = torch.ones(64, 101)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append([dropout(x, 0.5, True) for _ in range(2)])
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    first, second, other = draws[0][0], draws[0][1], draws[2][0]
    for a, b in ((first, second), (first, other), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        assert abs((a == b).double().mean().item() - 0.5) < 0.03


def kept(call: Callable[[], Tensor]) -> list[Tensor]:
    """What a call keeps for the backward pass, each piece of memory once."""
    seen = {}

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call()
    assert out.requires_grad
    return list(seen.values())


def test_little_is_kept() -> None:
    """One number for each hidden channel and each attention weight; no copy of a convolution's weights."""
    x = torch.randn(2, 10, 16)
    ffn, attention = FeedForward(16, 48, P).train(), Attention(16, 2, P).train()
    assert sum(each.numel() == 2 * 10 * 48 for each in kept(lambda: ffn(x))) == 1
    assert sum(each.numel() == 2 * 2 * 10 * 10 for each in kept(lambda: attention(x, x, x))) == 1
    norm = nn.BatchNorm2d(6).eval().requires_grad_(False)
    body, image = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), norm), torch.randn(1, 3, 8, 8, requires_grad=True)
    fold(body, lambda: [body(image)])
    weights = [each for each in kept(lambda: body(image)) if each.shape == (6, 3, 3, 3)]
    assert [each.data_ptr() for each in weights] == [body[0].weight.data_ptr()]


def test_autocast() -> None:
    """Gradients have their parameters' types, near those of float32."""
    torch.manual_seed(0)
    ffn, attention = FeedForward(16, 48, 1e-9).train(), Attention(16, 2, 1e-9).train()  # drops nothing, in the way that drops
    x, grads = torch.randn(2, 10, 16), []
    parameters = [*ffn.parameters(), *attention.parameters()]
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = ffn(x)
            out = attention(y, y, y)
        grads.append(torch.autograd.grad(out.float().square().sum(), parameters))
    for exact, rough, parameter in zip(*grads, parameters, strict=True):
        assert rough.dtype == parameter.dtype
        if exact.norm() > 1e-3:  # biases of keys move nothing
            assert torch.cosine_similarity(exact.flatten(), rough.flatten(), 0) > 0.99
