"""Dropout that does not spend a tenth of a CPU's training step on random numbers, and keeps little for its backward pass.

What was dropped is told from what is left: by the zeros behind a ReLU, by the sign of attention weights, by a byte elsewhere.
PyTorch keeps a number for every element, beside what it multiplied. A compiler takes the draw as it is and fuses the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`F.dropout`; on a CPU one draw of 64 bits decides about four elements, with p rounded to 1/65536.

    Args:
        x: any shape.
        p: share of elements set to zero, 0..1.
        training: otherwise `x` is returned as it is.

    Returns:
        The shape of `x`, what is kept divided by 1 - p.
    """
    if not training or p in (0, 1) or x.device.type != "cpu":
        return F.dropout(x, p, training)
    return _Dropout.apply(x, p)  # type: ignore[no-any-return]


def relu_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`dropout` of a ReLU; only the result is kept, as its gradient is zero where that is. Shapes as there; `x` may change."""
    if not training or p in (0, 1):
        return dropout(F.relu(x, inplace=True), p, training)
    return _ReluDropout.apply(x, p)  # type: ignore[no-any-return]


def attend(scores: Tensor, values: Tensor, p: float) -> Tensor:
    """Softmax of scores, dropout of these weights, and what they make of the values. Keeps one number a weight.

    Args:
        scores: (...,Q,N), -inf where a query does not look.
        values: (...,N,D).
        p: share of weights set to zero, above 0 and below 1.

    Returns:
        (...,Q,D).
    """
    return _Attend.apply(scores, values, p)  # type: ignore[no-any-return]


torch.library.define("queryvision::draw", "(Tensor x, float p) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def _draw(x: Tensor, p: float) -> Tensor:
    """1 for elements that are kept, else 0, uint8, the shape of `x`, on a CPU; one operator for a compiler."""
    kept: Tensor = torch.ops.queryvision.draw(x, p)
    return kept


@torch.library.impl("queryvision::draw", "cpu")
def _draw_now(x: Tensor, p: float) -> Tensor:
    count = x.numel()
    source = np.random.SFC64(int(torch.randint(2**62, ())))  # twice as quick as PyTorch's
    bits = torch.from_numpy(source.random_raw((count + 3) // 4)).view(torch.int16)
    return (bits[:count].view(x.shape) >= round(p * 65536) - 32768).view(torch.uint8)  # bool is slow in a compiler's loops


@torch.library.register_fake("queryvision::draw")  # type: ignore[untyped-decorator]
def _draw_shape(x: Tensor, p: float) -> Tensor:
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        kept = _draw(x, p)
        ctx.save_for_backward(kept)
        ctx.p = p
        return x * kept.to(x.dtype).mul_(1 / (1 - p))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return grad * kept.to(grad.dtype).mul_(1 / (1 - ctx.p)), None


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        out = F.relu(x)
        out = out.mul_(_draw(x, p).to(x.dtype).mul_(1 / (1 - p))) if x.device.type == "cpu" else F.dropout(out, p)
        ctx.save_for_backward(out)
        ctx.p = p
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        if torch.compiler.is_compiling() and grad.device.type == "cpu":  # else it keeps truth values, a slow loop there
            return grad * out.sign() * (1 / (1 - ctx.p)), None
        return torch.ops.aten.threshold_backward(grad, out, 0).mul_(1 / (1 - ctx.p)), None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, values: Tensor, p: float) -> Tensor:
        weights = scores.softmax(-1)
        signed = weights.copysign_(_draw(weights, p).to(weights.dtype).sub_(0.5))  # negative: dropped
        ctx.save_for_backward(signed, values)
        ctx.p, ctx.dtype = p, scores.dtype
        return (signed.clamp_min(0) @ values).mul_(1 / (1 - p))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        signed, values = ctx.saved_tensors
        grad = grad * (1 / (1 - ctx.p))
        to_values = signed.clamp_min(0).to(grad.dtype).transpose(-2, -1) @ grad
        to_left = (grad @ values.to(grad.dtype).transpose(-2, -1)).to(signed.dtype)
        to_weights = torch.ops.aten.threshold_backward(to_left, signed, 0)
        to_scores = torch.ops.aten._softmax_backward_data(to_weights, signed.abs(), -1, signed.dtype)
        return to_scores.to(ctx.dtype), to_values.to(values.dtype), None
