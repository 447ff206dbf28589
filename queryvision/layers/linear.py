"""Linear layers in float32 on a CPU by oneDNN, which PyTorch asks for convolutions only.

PyTorch leaves these products to MKL, which reaches half of what an AMD processor can do; on Intel's both are alike.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]

SMALL = 2**20
"""Multiplications below which starting oneDNN costs more than it wins."""

ONEDNN = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(...,in) -> (...,out)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: (...,in), (out,in) and (out) -> (...,out), the same to rounding."""
    if x.numel() * weight.shape[0] < SMALL or not _suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return]


def quicken(body: nn.Module) -> None:
    """Makes every plain `nn.Linear` of a module a `Linear`, in place; names and values stay."""
    for module in body.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Exports keep the operator that other programs know."""
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    exports = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.7
    return ONEDNN and plain and not exports() and not is_tracing()  # type: ignore[no-untyped-call]


torch.library.define("queryvision::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("queryvision::linear", "cpu")
def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One operator for a compiler, too; its result may be changed in place, so it is no view."""
    out = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight, bias, "none", [], "")
    shaped: Tensor = torch.ops.aten._unsafe_view(out, (*x.shape[:-1], weight.shape[0]))
    return shaped


@torch.library.register_fake("queryvision::linear")  # type: ignore[untyped-decorator]
def _shaped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out: Tensor = torch.ops.queryvision.linear(x, weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        for_x, for_weight, for_bias = ctx.needs_input_grad
        to_weight = None
        if for_weight:  # the first operand is copied when it is turned: the smaller one
            wide = grads.shape[-1] > rows.shape[-1]
            to_weight = _Linear.apply(rows.t(), grads.t(), None).t() if wide else _Linear.apply(grads.t(), rows.t(), None)
        to_x = _Linear.apply(grad, weight.t(), None) if for_x else None
        return to_x, to_weight, grads.sum(0) if for_bias else None
