"""Linear layers in float32 on a CPU by oneDNN.

PyTorch leaves these products to MKL, which reaches half of what an AMD processor can do. Exports, `torch.func`, subclasses of
tensors (DTensor) and other types get PyTorch's own operator. There are no forward-mode derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]
from torch.utils.flop_counter import register_flop_formula

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
    if not _suits_onednn(x, weight, bias) or x.numel() * weight.shape[0] < SMALL:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return]


def quicken(body: nn.Module) -> None:
    """Makes every plain `nn.Linear` of a module a `Linear`, in place; names and values stay."""
    for module in body.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def _suits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    ours = all(type(each) in (Tensor, nn.Parameter) for each in (x, weight)) and x.device.type == "cpu" and ONEDNN
    single = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    fits = weight.ndim == 2 and x.shape[-1:] == weight.shape[1:] and (bias is None or bias.shape == weight.shape[:1])
    if not (ours and single and fits):
        return False
    if torch.compiler.is_compiling():
        return not getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()  # torch 2.7
    usual = is_tracing() or torch._C._are_functorch_transforms_active()  # type: ignore[no-untyped-call]
    return not usual and torch._C._get_mkldnn_enabled()


torch.library.define("queryvision::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("queryvision::linear", "cpu")
def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One operator for a compiler, too; its result may be changed in place, so it is no view."""
    dense = None if bias is None else bias.contiguous()  # its strides are not looked at
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # else it takes thousand times as long
    out = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight, dense, "none", [], "")
    shaped: Tensor = torch.ops.aten._unsafe_view(out, (*x.shape[:-1], weight.shape[0]))
    return shaped


@torch.library.register_fake("queryvision::linear")  # type: ignore[untyped-decorator]
def _shaped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@register_flop_formula(torch.ops.queryvision.linear)
def _flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * weight[0]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        out: Tensor = torch.ops.queryvision.linear(x, weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grads = grad.reshape(-1, grad.shape[-1])
        to_weight = None
        if x is not None:  # the first operand is copied when it is turned: the smaller one
            rows = x.reshape(-1, x.shape[-1])
            wide = grads.shape[-1] > rows.shape[-1]
            to_weight = _Linear.apply(rows.t(), grads.t(), None).t() if wide else _Linear.apply(grads.t(), rows.t(), None)
        to_x = None if weight is None else _Linear.apply(grad, weight.t(), None)
        return to_x, to_weight, grads.sum(0) if ctx.needs_input_grad[2] else None
