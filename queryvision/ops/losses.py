"""Elementwise classification losses. Nothing is reduced here: the head weights and sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_focal(logits: Tensor, wanted: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss (arXiv 1708.02002) -alpha_t (1 - p_t)^gamma log p_t, of the shape of `logits`.

    Args:
        logits: any shape.
        wanted: 0 or 1, same shape.
        alpha: weight of positives; negatives get 1 - alpha. A negative value switches it off.
        gamma: how much easy examples are turned down.
    """
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    p_t = probability * wanted + (1 - probability) * (1 - wanted)
    loss = entropy * (1 - p_t) ** gamma
    if alpha >= 0:
        loss = loss * (alpha * wanted + (1 - alpha) * (1 - wanted))
    return loss


def sigmoid_focal_cost(logits: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Cost of calling each class: focal loss as a positive less that as a negative (arXiv 2010.04159), shape of `logits`."""
    positive = alpha * torch.sigmoid(-logits) ** gamma * -F.logsigmoid(logits)
    negative = (1 - alpha) * torch.sigmoid(logits) ** gamma * -F.logsigmoid(-logits)
    return positive - negative
