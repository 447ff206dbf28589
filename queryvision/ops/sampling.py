"""Weighted bilinear sampling from feature maps of several levels (Deformable DETR, arXiv 2010.04159).

Two ways with one result. `grid_sample` holds every sample before their weighted sum: one (B*H,C,Q,K) block a level. On a CPU
that traffic is most of the time; so there the samples are rows of a table, which `embedding_bag` sums while it reads them.

Legend: B images, N = sum of H_l*W_l values, Q queries, H heads, C channels of a head, L levels, K_l points of a level, P =
their sum, S = 4*P table rows of a sum, G = B*Q*H sums, R rows of the table.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.jit import is_tracing  # type: ignore[attr-defined]

Shapes = tuple[tuple[int, int], ...]


def sample_levels(
    values: Tensor,
    shapes: Shapes,
    points: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    canvas: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the bilinear samples of all levels and points. A map is zero outside.

    Args:
        values: (B,N,H,C), the levels behind each other, each row by row; or (B,N,1,C), where all heads look at the same.
        shapes: (H_l,W_l) of each level.
        points: K_l of each level.
        locations: (B,Q,H,P,2) x y, 0..1 from edge to edge of the level's map; level by level. Float32 or wider, whatever the
            values are.
        weights: (B,Q,H,P), of the type of the locations.
        canvas: the same values as `lay_out` gives them, where they are sampled more than once; of the type of the locations.

    Returns:
        (B,Q,H,C), of the type of the locations, which is the type of the arithmetic too.
    """
    if not gathers_rows(values):
        return sample_by_grid(values.to(locations.dtype), shapes, points, locations, weights)
    values = values.to(locations.dtype) if canvas is None else values
    return sample_by_rows(values, shapes, points, locations, weights, canvas)


def gathers_rows(values: Tensor) -> bool:
    """Whether `sample_levels` goes by rows: on a CPU, unless a compiler, an export or a trace is looking."""
    traced = torch.compiler.is_compiling() or is_tracing()  # type: ignore[no-untyped-call]
    return values.device.type == "cpu" and not traced


def sample_by_grid(values: Tensor, shapes: Shapes, points: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """`sample_levels` with one `grid_sample` a level."""
    batch, queries, heads = locations.shape[:3]
    grids = torch.split((2 * locations - 1).transpose(1, 2).flatten(0, 1), list(points), 2)
    by_level = torch.split(weights.transpose(1, 2).flatten(0, 1).unsqueeze(1), list(points), 3)
    per_head = values.expand(-1, -1, heads, -1).permute(0, 2, 3, 1).flatten(0, 1)
    parts = torch.split(per_head, [h * w for h, w in shapes], -1)
    sums = []
    for shape, part, grid, weight in zip(shapes, parts, grids, by_level, strict=True):
        maps = part.reshape(*part.shape[:2], *shape)
        samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        sums.append((samples * weight).sum(-1))
    return torch.stack(sums).sum(0).view(batch, heads, -1, queries).permute(0, 3, 1, 2)


def lay_out(values: Tensor, shapes: Shapes) -> Tensor:
    """All levels below each other on one canvas, each with a border of zeros: (B,N,D) -> (B,cells,D).

    So no sample needs a mask, and the four corners of a cell are the same four steps apart on every level.
    """
    stride = _stride(shapes)
    parts = torch.split(values, [h * w for h, w in shapes], 1)
    return torch.cat([_bordered(part, shape, stride) for part, shape in zip(parts, shapes, strict=True)], 1)


def _stride(shapes: Shapes) -> int:
    return max(w for _, w in shapes) + 2


def sample_by_rows(
    values: Tensor,
    shapes: Shapes,
    points: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    canvas: Tensor | None = None,
) -> Tensor:
    """`sample_levels` as weighted sums of the canvas's rows."""
    batch, _, table_heads, channels = values.shape
    heads, stride = locations.shape[2], _stride(shapes)
    canvas = lay_out(values.flatten(2), shapes) if canvas is None else canvas
    cells = canvas.shape[1]

    cell, x, y = _cells(locations, shapes, points, stride)
    cell = cell.clamp_(0, cells - stride - 2)  # a location that is no number lands somewhere, and its weight is none either
    first = torch.arange(0, batch * cells, cells, dtype=torch.int32, device=cell.device).view(-1, 1, 1, 1)
    head = torch.arange(table_heads, dtype=torch.int32, device=cell.device).unsqueeze(-1)
    row = (first + cell) * table_heads + head

    right = weights * x
    left = weights - right
    lower_right, lower_left = right * y, left * y
    corner_weights = torch.cat((left - lower_left, right - lower_right, lower_left, lower_right), -1)
    corner_rows = torch.cat([row + step * table_heads for step in (0, 1, stride, stride + 1)], -1)
    table = canvas.view(batch * cells * table_heads, channels)
    sums: Tensor = _RowSums.apply(table, corner_rows.flatten(0, 2), corner_weights.flatten(0, 2))
    return sums.view(batch, -1, heads, channels)


def _bordered(part: Tensor, shape: tuple[int, int], stride: int) -> Tensor:
    """(B,H_l*W_l,D) -> (B,(H_l+2)*stride,D), zeros around."""
    return F.pad(part.view(len(part), *shape, -1), (0, 0, 1, stride - 1 - shape[1], 1, 1)).flatten(1, 2)


def _cells(locations: Tensor, shapes: Shapes, points: Sequence[int], stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Upper left corner on the canvas (int32) and the place x y in its cell, 0..1: (B,Q,H,P) each."""
    tops = accumulate((h + 2 for h, _ in shapes[:-1]), initial=1)
    numbers = [(w, h, stride * top + 1) for top, (h, w), k in zip(tops, shapes, points, strict=True) for _ in range(k)]
    width, height, origin = locations.new_tensor(numbers).unbind(-1)
    x, y = locations.unbind(-1)
    outside = torch.full_like(width, -1.0)
    x, y = (x * width - 0.5).clamp(outside, width), (y * height - 0.5).clamp(outside, height)
    with torch.no_grad():
        left, top = x.floor().clamp_(max=width - 1), y.floor().clamp_(max=height - 1)
        cell = (top * stride).add_(left).add_(origin).to(torch.int32)
    return cell, x - left, y - top


class _RowSums(torch.autograd.Function):
    """Sums of table rows with weights: `embedding_bag`, with a backward pass that takes a third of the time."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Table (R,C), index (G,S) int32 and weights (G,S) of S rows for each sum -> (G,C)."""
        ctx.save_for_backward(table, index, weights)
        return F.embedding_bag(index, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        """Gradients of the table (R,C) and of the weights (G,S)."""
        table, index, weights = ctx.saved_tensors
        grad = grad.contiguous()
        grad_table = _spread(grad, index, weights, len(table)) if ctx.needs_input_grad[0] else None
        return grad_table, None, _dots(grad, table, index) if ctx.needs_input_grad[2] else None


def _spread(grad: Tensor, index: Tensor, weights: Tensor, rows: int) -> Tensor:
    """Each row sums, of the gradient (G,C), those that read it: a gather too, once the readings are in row order."""
    ordered, order = index.flatten().sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(rows, dtype=torch.int32, device=grad.device), out_int32=True)
    del ordered
    order = order.to(torch.int32)
    by_row = weights.flatten().index_select(0, order)
    reader = order.div_(index.shape[1], rounding_mode="trunc")
    return F.embedding_bag(reader, grad, starts, per_sample_weights=by_row, mode="sum")


def _dots(grad: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Dot products (G,S) of the gradients (G,C) with the table's rows at `index`."""
    ends = torch.arange(0, index.numel() + 1, index.shape[1], dtype=torch.int32, device=grad.device)
    nothing = grad.new_zeros(index.numel())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        pairs = torch.sparse_csr_tensor(ends, index.flatten(), nothing, (len(grad), len(table)), check_invariants=False)
    dots: Tensor = torch.sparse.sampled_addmm(pairs, grad, table.t(), beta=0.0).values()
    return dots.view_as(index)
