"""Batch norm and SiLU in one step that keeps less for its backward pass.

Autograd keeps a map for the norm, what it was given, and one for the SiLU, what the norm made of it. The second is made again
from the first here, in one pass. Legend: B images, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

GIVEN = 6  # tensors of a branch: map, weight, bias, running mean and variance, batches seen
KEPT = 5  # map, weight, bias, mean of the batch, (variance + eps) ** -0.5


def norm_silu(maps: Sequence[Tensor], norms: Sequence[nn.Module]) -> Tensor:
    """SiLU of the sum of normed maps.

    Args:
        maps: (B,C,H,W), one or more of the same shape.
        norms: a norm for each map. Less is kept where all are plain batch norms in training mode; a compiler decides itself.

    Returns:
        (B,C,H,W).
    """
    if not all(map(_is_plain, maps, norms)) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        first, *others = [norm(x) for x, norm in zip(maps, norms, strict=True)]
        return F.silu(sum(others, first))
    parts: list[Any] = []
    for x, norm in zip(maps, norms, strict=True):
        parts += [x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked]
    constants = [(norm.momentum, norm.eps) for norm in norms]
    return _NormSilu.apply(constants, *parts)  # type: ignore[no-any-return]


def _is_plain(x: Tensor, norm: nn.Module) -> bool:
    """A batch norm with weights and statistics that learns, of more than one value a channel."""
    usual = type(norm) is nn.BatchNorm2d and norm.training and norm.affine and norm.track_running_stats
    return usual and norm.momentum is not None and x.numel() > x.shape[1]


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, constants: list[tuple[float, float]], *parts: Tensor) -> Tensor:
        """`parts` as `GIVEN` says, of every branch -> (B,C,H,W). Running statistics move."""
        total, kept = None, []
        for i, (momentum, eps) in enumerate(constants):
            x, weight, bias, running_mean, running_var, seen = parts[GIVEN * i : GIVEN * (i + 1)]
            seen.add_(1)
            normed, mean, spread = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
            kept += [x, weight, bias, mean, spread]
            total = normed if total is None else total.add_(normed)
        assert total is not None
        ctx.save_for_backward(*kept)
        ctx.spreads = [eps for _, eps in constants]
        return F.silu(total, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of maps, weights and biases."""
        kept = ctx.saved_tensors
        branches = [(*kept[KEPT * i : KEPT * (i + 1)], eps) for i, eps in enumerate(ctx.spreads)]
        total = None
        for x, weight, bias, mean, spread, eps in branches:
            normed = F.batch_norm(x, mean, spread.pow(-2) - eps, weight, bias, False, 0.0, eps)
            total = normed if total is None else total.add_(normed)
        grad = torch.ops.aten.silu_backward(grad, total)
        found: list[Tensor | None] = [None]
        for i, (x, weight, _, mean, spread, eps) in enumerate(branches):
            wanted = list(ctx.needs_input_grad[1 + GIVEN * i : 4 + GIVEN * i])
            grads = torch.ops.aten.native_batch_norm_backward(grad, x, weight, None, None, mean, spread, True, eps, wanted)
            found += [*grads, None, None, None]
        return tuple(found)
