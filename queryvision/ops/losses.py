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


def quality_focal(logits: Tensor, positive: Tensor, quality: Tensor, alpha: float, gamma: float) -> Tensor:
    """Varifocal loss (arXiv 2008.13367): cross entropy to the quality, shape of `logits`.

    Positives count by their quality, one of quality 0 not at all (RT-DETR:rtdetrv2_criterion.py); negatives by alpha p^gamma.

    Args:
        logits: any shape.
        positive: 1 at a pair's class, 0 elsewhere; same shape.
        quality: of the pair at its class, 0 elsewhere; same shape.
        alpha: weight of negatives.
        gamma: how much easy negatives are turned down.
    """
    weight = torch.where(positive > 0, quality, alpha * logits.detach().sigmoid() ** gamma)
    return F.binary_cross_entropy_with_logits(logits, quality, reduction="none") * weight


def matchability_aware(logits: Tensor, positive: Tensor, quality: Tensor, gamma: float) -> Tensor:
    """Matchability-aware loss (MAL, arXiv 2412.04234): cross entropy to quality^gamma, shape of `logits`.

    Positives count fully, negatives by p^gamma.

    Args:
        logits: any shape.
        positive: 1 at a pair's class, 0 elsewhere; same shape.
        quality: of the pair at its class, 0..1; same shape.
        gamma: exponent of both.
    """
    weight = torch.where(positive > 0, 1.0, logits.detach().sigmoid() ** gamma)
    return F.binary_cross_entropy_with_logits(logits, positive * quality**gamma, reduction="none") * weight
