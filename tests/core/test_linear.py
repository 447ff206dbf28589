"""Linear layers by oneDNN against PyTorch's own, and memory that is kept."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from queryvision.allocation import HAS_THEM, HUGE_PAGES
from queryvision.layers import linear as module
from queryvision.layers.linear import SMALL, Linear, linear, quicken

IN, OUT = 96, 160


def operands(x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = torch.randn(OUT, IN), torch.randn(OUT) if bias is None else bias
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def inputs() -> dict[str, Tensor]:
    return {
        "rows": torch.randn(300, IN),
        "sequences": torch.randn(4, 100, IN),
        "turned": torch.randn(4, IN, 100).transpose(1, 2),
        "repeated": torch.randn(1, 100, IN).expand(4, -1, -1),
        "strided": torch.randn(4, 100, 2 * IN)[..., ::2],
    }


def biases() -> dict[str, Tensor]:
    return {"plain": torch.randn(OUT), "strided": torch.randn(OUT, 2)[:, 0], "repeated": torch.randn(1).expand(OUT)}


@pytest.mark.parametrize(("name", "kind"), [*((name, "plain") for name in inputs()), ("rows", "strided"), ("rows", "repeated")])
def test_values_and_gradients_are_those_of_pytorch(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight, bias = operands(inputs()[name], biases()[kind])
    assert x.numel() * OUT >= SMALL
    calls = count_calls(monkeypatch)
    mine, usual = linear(x, weight, bias), F.linear(x, weight, bias)
    assert calls == [1] and mine.stride() == usual.stride()
    torch.testing.assert_close(mine, usual, rtol=1e-4, atol=1e-4)
    for direction in (torch.randn_like(mine), torch.ones(()).expand_as(mine)):
        own, theirs = (torch.autograd.grad(out, (x, weight, bias), direction, retain_graph=True) for out in (mine, usual))
        for a, b in zip(own, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


def test_only_what_gradients_need_is_kept() -> None:
    """A frozen layer keeps its weight alone, so that its input may change."""
    x, weight, bias = operands(torch.randn(300, IN), torch.randn(OUT))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x, weight.detach(), bias.detach())
        assert [t.shape for t in kept] == [weight.shape]
        kept.clear()
        linear(x.detach(), weight, bias)
        assert [t.shape for t in kept] == [x.shape]


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls = [0]
    once = module._Linear.apply

    def counted(*given: Tensor) -> Tensor:
        calls[0] += 1
        out: Tensor = once(*given)
        return out

    monkeypatch.setattr(module._Linear, "apply", counted)
    return calls


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    x, weight, bias = operands(torch.randn(300, IN))
    seconds = []
    for call in (linear, F.linear):
        (first,) = torch.autograd.grad(call(x, weight, bias).square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), (x, weight)))
    for a, b in zip(*seconds, strict=True):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 1 - 1e-6
        assert abs(a.norm() / b.norm() - 1) < 1e-5


def test_the_result_may_be_changed_in_place() -> None:
    x, weight, bias = operands(torch.randn(4, 100, IN))
    mine, usual = (
        torch.autograd.grad(F.relu(call(x, weight, bias), inplace=True).sum(), weight)[0] for call in (linear, F.linear)
    )
    torch.testing.assert_close(mine, usual, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("why", ["small", "double", "autocast", "meta", "no oneDNN"])
def test_what_is_left_to_pytorch(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    layer, x = Linear(IN, OUT), torch.randn(4 if why == "small" else 300, IN)
    if why == "double":
        layer, x = layer.double(), x.double()
    if why == "meta":
        layer, x = layer.to("meta"), x.to("meta")
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"),
        torch.backends.mkldnn.flags(enabled=why != "no oneDNN"),
    ):
        out = layer(x)
    assert calls == [0] and out.dtype == {"autocast": torch.bfloat16, "double": torch.float64}.get(why, torch.float32)


def test_other_programs_see_the_usual_operator() -> None:
    """Exports of any number of rows, `torch.func`, and counted work."""
    layer, x = Linear(IN, OUT), torch.randn(300, IN)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(nn.Sequential(layer), (x,), dynamic_shapes=[{0: rows}])
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.linear.default" in names and not any("queryvision" in name for name in names)
    wanted = torch.autograd.grad(F.linear(x, layer.weight, layer.bias).square().sum(), layer.weight)[0]
    found = torch.func.grad(lambda weight: linear(x, weight, layer.bias).square().sum())(layer.weight)
    torch.testing.assert_close(found, wanted)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 300 * IN * OUT


def test_wrong_shapes_are_named_as_usual() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(300, IN + 1), torch.randn(OUT, IN))


def test_bodies_of_timm_take_part() -> None:
    """In place: names, values and results stay."""
    body = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0).eval()
    names, pixels = list(body.state_dict()), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = body(pixels)
        quicken(body)
        torch.testing.assert_close(body(pixels), before, rtol=1e-4, atol=1e-4)
    assert list(body.state_dict()) == names and not any(type(m) is nn.Linear for m in body.modules())


FAULTS = """
import os, resource
from queryvision.allocation import tune_allocation
done = tune_allocation()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytes(bytearray(b"x") * (96 << 20))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(int(done), faults(), int(os.environ.get('THP_MEM_ALLOC_ENABLE', -1)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_freed_memory_is_kept_unless_the_environment_decides() -> None:
    """Pages of 96 MB need not be made twice."""
    names = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", HUGE_PAGES)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    found = []
    for told in ({}, {"MALLOC_ARENA_MAX": "2"}, {HUGE_PAGES: "0"}):
        run = subprocess.run([sys.executable, "-c", FAULTS], env=environment | told, capture_output=True, text=True, check=True)
        found.append([int(number) for number in run.stdout.split()])
    (kept, few, huge), (left, many, untold), (again, _, refused) = found
    assert (kept, left, again) == (1, 0, 1) and few < many / 10
    assert (huge, untold, refused) == (1 if HAS_THEM.is_file() else -1, -1, 0)
