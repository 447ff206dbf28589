"""Frozen batch norms folded into the convolutions before them.

A frozen norm is a constant scale and shift, so the convolution can do its work: exact, also for gradients, and neither a pass
over the map nor a copy for the backward pass is needed. Folding happens at each call; names and values of all weights stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame, conv2d_same
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.ops import FrozenBatchNorm2d


class FoldedConv(nn.Conv2d):
    """A convolution that does the work of the norm behind it, too. Not for `nn.DataParallel`, whose copies share that norm."""

    norm: tuple[Any]  # in a tuple, so that it is no part of this module

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scale, shift = _scale_and_shift(self.norm[0])
        if _is_plain(self, weight, shift):
            return _convolve(self, x, weight, scale, shift, self.padding)  # type: ignore[arg-type]
        out: Tensor = super()._conv_forward(x, *_folded(weight, bias, scale, shift))
        return out


class FoldedConvSame(Conv2dSame):
    """The same with TensorFlow's padding."""

    norm: tuple[Any]

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,out,ceil(H / stride),ceil(W / stride))."""
        scale, shift = _scale_and_shift(self.norm[0])
        if _is_plain(self, self.weight, shift):
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]
            return _convolve(self, x, self.weight, scale, shift, (0, 0))
        weight, bias = _folded(self.weight, self.bias, scale, shift)
        out: Tensor = conv2d_same(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]
        return out


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def _folded(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return _scaled(weight, scale), shift if bias is None else shift + bias * scale


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return weight * scale[:, None, None, None]


def _is_plain(conv: nn.Conv2d, weight: Tensor, shift: Tensor) -> bool:
    """Whether it is trained, as ResNets have it, so that less need be kept; a compiler decides itself."""
    usual = conv.bias is None and conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and not shift.requires_grad
    learning = weight.requires_grad and torch.is_grad_enabled()
    return usual and learning and not torch.compiler.is_compiling()


def _convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, padding: tuple[int, int]) -> Tensor:
    kind, dtype = x.device.type, None
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    how = (conv.stride, padding, conv.dilation, conv.groups)
    return _FoldedConvolution.apply(x if dtype is None else x.to(dtype), weight, scale, shift, dtype, how)  # type: ignore[no-any-return]


class _FoldedConvolution(torch.autograd.Function):
    """The scaled weights are made again in the backward pass instead of kept; `dtype`: of autocast. Differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype | None, how: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        ctx.dtype, ctx.how = dtype, how
        return F.conv2d(x, _scaled(weight, scale).to(dtype or weight.dtype), shift.to(dtype or shift.dtype), *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        wanted = (ctx.needs_input_grad[0], True, False)
        folded = _scaled(weight, scale).to(ctx.dtype or weight.dtype)
        to_x, to_folded, _ = torch.ops.aten.convolution_backward(
            grad, x, folded, None, stride, padding, dilation, False, (0, 0), groups, wanted
        )
        return to_x, _scaled(to_folded, scale).to(weight.dtype), None, None, None, None


class FoldedNorm(nn.Module):
    """A frozen norm whose work is done; no batch norm any more, so that nothing takes it for one that could be trained."""

    def forward(self, x: Tensor) -> Tensor:
        """Nothing is left to do."""
        return x


class FoldedNormAct(FoldedNorm):
    """A frozen norm of timm's with an activation, of which only that is left to do."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """The activation."""
        out: Tensor = self.act(self.drop(x))
        return out


class FoldedFrozenNorm(FrozenBatchNorm2d):  # type: ignore[misc]
    """A frozen norm of torchvision's whose work is done."""

    def forward(self, x: Tensor) -> Tensor:
        """Nothing is left to do."""
        return x


CONVOLUTIONS = {nn.Conv2d: FoldedConv, Conv2dSame: FoldedConvSame}
NORMS = {nn.BatchNorm2d: FoldedNorm, BatchNormAct2d: FoldedNormAct, FrozenBatchNorm2d: FoldedFrozenNorm}


def fold(body: nn.Module, run: Callable[[], Sequence[Tensor]]) -> None:
    """Folds, in place, every frozen norm that alone reads the output of a convolution.

    Args:
        body: its norms that have no trained weights are folded; they must not be trained later.
        run: calls the body on a small image that wants a gradient, without moving statistics, and returns all maps it is for.
    """
    frozen = {norm for norm in body.modules() if type(norm) in NORMS and not getattr(norm.weight, "requires_grad", True)}
    if not frozen:
        return
    made: dict[int, tuple[nn.Module, Tensor, Any, int]] = {}
    pairs: list[tuple[Any, Any, Any]] = []
    calls: Counter[nn.Module] = Counter()

    def after(conv: nn.Module, _: Any, out: Tensor) -> None:
        calls[conv] += 1
        made[id(out)] = conv, out, out.grad_fn, out._version

    def before(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        calls[norm] += 1
        x = given[0]
        if id(x) in made:
            conv, _, node, version = made[id(x)]
            if x.grad_fn is node and x._version == version:
                pairs.append((conv, norm, node))

    hooks = [module.register_forward_hook(after) for module in body.modules() if type(module) in CONVOLUTIONS]
    hooks += [norm.register_forward_pre_hook(before) for norm in frozen]
    try:
        with torch.enable_grad():
            maps = run()
    finally:
        for hook in hooks:
            hook.remove()
    readers = Counter(reader for node in graph_nodes(maps) for reader, _ in node.next_functions)
    readers.update(m.grad_fn for m in maps)
    for conv, norm, node in pairs:
        if calls[conv] == calls[norm] == 1 and readers[node] == 1:
            conv.__class__, norm.__class__ = CONVOLUTIONS[type(conv)], NORMS[type(norm)]
            conv.norm = (norm,)


def graph_nodes(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """Every node of the graph behind the outputs, once."""
    seen, waiting = set(), [out.grad_fn for out in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(before for before, _ in node.next_functions)
