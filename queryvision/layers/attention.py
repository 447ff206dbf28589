"""Multi-head attention on `scaled_dot_product_attention`.

Legend: B images, Q queries, N keys, D width, H attention heads. True in a mask means: do not look.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from queryvision.layers.conv import Activation, activate
from queryvision.layers.linear import Linear, linear
from queryvision.ops.dropout import attend, dropout, relu_dropout


class Attention(nn.Module):
    """Multi-head attention with the parameters, names and initialisation of `nn.MultiheadAttention`.

    Queries and keys carry positions, values do not; so the caller gives them apart.

    Args:
        width: D.
        num_heads: H, a divisor of D.
        dropout: of the attention weights, in training.
    """

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by {num_heads} attention heads")
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Every query looks at the keys.

        Args:
            query: (B,Q,D). The same object as `key` in self-attention, which saves a projection.
            key: (B,N,D).
            value: (B,N,D).
            hidden: bool, broadcastable to (B,Q,N), True = do not look. Every row needs a key it may look at.

        Returns:
            (B,Q,D).
        """
        width = query.shape[-1]
        if query is key:
            q, k = linear(query, self.in_proj_weight[: 2 * width], self.in_proj_bias[: 2 * width]).chunk(2, -1)
        else:
            w_q, w_k, _ = self.in_proj_weight.chunk(3)
            b_q, b_k, _ = self.in_proj_bias.chunk(3)
            q, k = linear(query, w_q, b_q), linear(key, w_k, b_k)
        v = linear(value, self.in_proj_weight[2 * width :], self.in_proj_bias[2 * width :])
        mask = None if hidden is None else ~hidden[:, None]
        out = self._attend(self._split(q), self._split(k), self._split(v), mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B,H,Q,D/H) and twice (B,H,N,D/H) -> (B,H,Q,D/H); mask: True = look."""
        rate = self.dropout if self.training else 0.0
        if q.device.type != "cpu" or not rate and q.dtype.itemsize > 2:
            return F.scaled_dot_product_attention(q, k, v, mask, rate)
        if not rate:  # a CPU takes two to four times as long for the gradients of PyTorch's kernel in bfloat16
            with torch.autocast("cpu", enabled=False):
                return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).to(q.dtype)
        # What PyTorch does on a CPU where weights are dropped, quicker and with less to keep.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        return attend(scores, v, rate)

    def _split(self, x: Tensor) -> Tensor:
        """(B,N,D) -> (B,H,N,D/H)."""
        return x.view(*x.shape[:-1], self.num_heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """Linear, activation, dropout, linear.

    Args:
        width: D.
        hidden: channels between the two linear layers.
        dropout: after the activation.
        activation: between the linear layers.
    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.0, activation: Activation = "relu") -> None:
        super().__init__()
        self.activation = activation
        self.linear1 = Linear(width, hidden)
        self.linear2 = Linear(hidden, width)
        self.dropout = dropout
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(...,D) -> (...,D)."""
        hidden = self.linear1(x)
        if self.activation == "relu":
            return self.linear2(relu_dropout(hidden, self.dropout, self.training))  # type: ignore[no-any-return]
        return self.linear2(dropout(activate(hidden, self.activation), self.dropout, self.training))  # type: ignore[no-any-return]
