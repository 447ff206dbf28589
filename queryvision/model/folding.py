"""Frozen batch norms folded into the convolutions before them.

A frozen norm is a constant scale and shift, so the convolution can do its work: exact, also for gradients, and neither a pass
over the map nor its copy for the backward pass is needed. Folding happens at each call; nothing is stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


class FoldedConv(nn.Conv2d):
    """A convolution that does the work of the norm behind it, too; its weights keep their name and their values."""

    norm: tuple[Any]  # in a tuple, so that it is no part of this module

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (norm,) = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if bias is not None:
            shift = shift + bias * scale
        out: Tensor = super()._conv_forward(x, weight * scale[:, None, None, None], shift)
        return out


class FoldedNorm(FrozenBatchNorm2d):  # type: ignore[misc]
    """A frozen norm whose work is done."""

    def forward(self, x: Tensor) -> Tensor:
        """Nothing is left to do."""
        return x


class FoldedNormAct(FrozenBatchNormAct2d):
    """A frozen norm with an activation, of which only the second is left to do."""

    def forward(self, x: Tensor) -> Tensor:
        """The activation."""
        out: Tensor = self.act(self.drop(x))
        return out


FOLDED = {FrozenBatchNorm2d: FoldedNorm, FrozenBatchNormAct2d: FoldedNormAct}


def fold(body: nn.Module, run: Callable[[], Sequence[Tensor]]) -> None:
    """Folds, in place, every frozen norm that alone reads the output of a convolution.

    Args:
        body: whose norms are `FrozenBatchNorm2d` or timm's `FrozenBatchNormAct2d`; others stay as they are.
        run: calls the body on a small image that wants a gradient, and returns the maps.
    """
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: list[tuple[nn.Conv2d, Any, Tensor]] = []
    calls: Counter[nn.Module] = Counter()

    def after(conv: nn.Module, _: Any, out: Tensor) -> None:
        made[id(out)] = conv, out  # type: ignore[assignment]

    def before(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        calls[norm] += 1
        if id(given[0]) in made:
            conv, out = made[id(given[0])]
            calls[conv] += 1
            pairs.append((conv, norm, out))

    hooks = [module.register_forward_hook(after) for module in body.modules() if type(module) is nn.Conv2d]
    hooks += [module.register_forward_pre_hook(before) for module in body.modules() if type(module) in FOLDED]
    try:
        maps = run()
    finally:
        for hook in hooks:
            hook.remove()
    readers = Counter(before for node in graph_nodes(maps) for before, _ in node.next_functions)
    for conv, norm, out in pairs:
        if calls[conv] == calls[norm] == 1 and readers[out.grad_fn] == 1:
            conv.__class__, norm.__class__ = FoldedConv, FOLDED[type(norm)]
            conv.norm = (norm,)  # type: ignore[assignment]


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
