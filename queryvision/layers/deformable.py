"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159).

Legend: B images, Q queries, N = sum of H_l*W_l values, D width, H heads, L levels, K_l points of a level, P = their sum. True
in a mask means: padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from queryvision.layers.linear import Linear
from queryvision.ops.sampling import Shapes, gathers_rows, sample_levels


class DeformableAttention(nn.Module):
    """Every query looks at points of each level around its reference, with the published parameter names and initialisation.

    Args:
        width: D.
        num_heads: H, a divisor of D.
        num_levels: L.
        num_points: K_l, points per head and level: one number for all levels, or one a level.
        project: whether values and what is found are projected; D-FINE (arXiv 2410.13842) leaves both out.
    """

    def __init__(
        self,
        width: int,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int | Sequence[int] = 4,
        project: bool = True,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by {num_heads} attention heads")
        self.num_heads = num_heads
        self.num_points = (num_points,) * num_levels if isinstance(num_points, int) else tuple(num_points)
        if len(self.num_points) != num_levels:
            raise ValueError(f"{num_levels} levels need as many numbers of points, not {list(self.num_points)}")
        total = num_heads * sum(self.num_points)
        self.sampling_offsets = Linear(width, total * 2)
        self.attention_weights = Linear(width, total)
        self.value_proj = Linear(width, width) if project else None
        self.output_proj = Linear(width, width) if project else None
        self._initialise()

    def _initialise(self) -> None:
        """As published (models/ops/modules/ms_deform_attn.py): a direction of its own per head, point k at distance k+1."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2.0 * math.pi / self.num_heads)
        ring = torch.stack((angles.cos(), angles.sin()), -1)
        ring = ring / ring.abs().amax(-1, keepdim=True)
        steps = torch.cat([torch.arange(1, k + 1, dtype=torch.float32) for k in self.num_points])
        offsets = ring[:, None] * steps[:, None]
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            if projection is not None:
                nn.init.xavier_uniform_(projection.weight)
                nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        values: Tensor,
        shapes: Shapes,
        padding: Tensor | None = None,
        canvas: Tensor | None = None,
    ) -> Tensor:
        """Sample the values around the references.

        Args:
            query: (B,Q,D), positions already added.
            reference: (B,Q,L,2) centres x y or (B,Q,L,4) boxes cx cy w h, 0..1 of the padded map of each level.
            values: (B,N,D), the levels behind each other, rows first.
            shapes: (H_l,W_l) of each level.
            padding: bool (B,N), True = padding, which counts as zero.
            canvas: the values, padding zeroed, as `ops.sampling.lay_out` gives them; saves time where they are not projected.

        Returns:
            (B,Q,D).

        Raises:
            ValueError: if the last dimension of the reference is neither 2 nor 4, or shapes do not fit the values.
        """
        if len(shapes) != len(self.num_points) or sum(h * w for h, w in shapes) != values.shape[1]:
            raise ValueError(f"{values.shape[1]} values do not fit {len(self.num_points)} levels of shapes {shapes}")
        locations, weights = self._aim(query, reference, shapes)
        few = gathers_rows(values) and query.shape[1] * self.num_heads <= values.shape[1]
        if self.value_proj is not None and few:
            found = self._sample_first(self.value_proj, values, shapes, padding, locations, weights)
        else:
            found = self._project_first(values, shapes, padding, locations, weights, canvas)
        return found.flatten(2) if self.output_proj is None else self.output_proj(found.flatten(2))

    def _project_first(
        self,
        values: Tensor,
        shapes: Shapes,
        padding: Tensor | None,
        locations: Tensor,
        weights: Tensor,
        canvas: Tensor | None,
    ) -> Tensor:
        """As published: each head samples its channels of the projected values. (B,Q,H,D/H)."""
        if self.value_proj is not None:
            values, canvas = self.value_proj(values), None
        if padding is not None and (canvas is None or not gathers_rows(values)):  # the canvas has no padding
            values = values.masked_fill(padding[..., None], 0.0)
        per_head = values.view(*values.shape[:2], self.num_heads, -1)
        return sample_levels(per_head, shapes, self.num_points, locations, weights, canvas).to(values.dtype)

    def _sample_first(
        self,
        value_proj: nn.Linear,
        values: Tensor,
        shapes: Shapes,
        padding: Tensor | None,
        locations: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """The same by linearity, for few queries: it projects Q sums instead of N values. (B,Q,H,D/H).

        Outside of the maps and in the padding the bias does not count either: it is the weight of a channel that is 1 inside.
        """
        inside = torch.ones_like(values[..., :1])
        extended = torch.cat((values, inside), -1)
        if padding is not None:
            extended = extended.masked_fill(padding[..., None], 0.0)
        found = sample_levels(extended.unsqueeze(2), shapes, self.num_points, locations, weights)
        projection = torch.cat((value_proj.weight, value_proj.bias[:, None]), -1)
        per_head = projection.view(self.num_heads, -1, projection.shape[-1])
        return torch.einsum("bqhd,hcd->bqhc", found.to(projection.dtype), per_head)

    def _aim(self, query: Tensor, reference: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
        """Locations (B,Q,H,P,2) and weights (B,Q,H,P), float32 or wider whatever the query and autocast are.

        In bfloat16 a location near 1 is known to 1/256 only: more than a pixel of a large map.
        """
        exact = torch.promote_types(query.dtype, torch.float32)
        per_head = (*query.shape[:2], self.num_heads, -1)
        scores = self.attention_weights(query).to(exact).view(per_head)
        offsets = self.sampling_offsets(query).to(exact).view(per_head)
        if reference.shape[-1] == 2:
            sizes = torch.tensor([(1 / w, 1 / h) for h, w in shapes], dtype=exact)
            scale = self._per_point(sizes.to(query.device, non_blocking=True))  # so the host does not wait
        elif reference.shape[-1] == 4:
            shares = torch.tensor([0.5 / k for k in self.num_points], dtype=exact).to(query.device, non_blocking=True)
            scale = self._per_point(reference[..., 2:].to(exact) * shares[:, None]).unsqueeze(2)
        else:
            raise ValueError(f"a reference has 2 or 4 numbers, not {reference.shape[-1]}")
        centres = self._per_point(reference[..., :2].to(exact)).unsqueeze(2)
        return torch.addcmul(centres, offsets, scale).view(*scores.shape, 2), scores.softmax(-1)

    def _per_point(self, x: Tensor) -> Tensor:
        """(...,L or 1,2) -> (...,P*2), the order of the offsets: long rows to compute with."""
        parts = zip(x.expand(*x.shape[:-2], len(self.num_points), 2).unbind(-2), self.num_points, strict=True)
        return torch.cat([part.unsqueeze(-2).expand(*part.shape[:-1], k, 2) for part, k in parts], -2).flatten(-2)
