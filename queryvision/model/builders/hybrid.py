"""RT-DETRv2 (arXiv 2304.08069, 2407.17140): a hybrid encoder, queries chosen among its tokens, a deformable decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from queryvision.head import Fit, Steering
from queryvision.layers.conv import ConvNorm
from queryvision.layers.deformable import DeformableAttention
from queryvision.layers.positions import BoxPositions
from queryvision.model.backbone import make_backbone
from queryvision.model.builders.checks import HeadParts, check_at_least, check_doubling, check_sizes, make_heads
from queryvision.model.cross_attention import DeformableCrossAttention
from queryvision.model.decoder import Decoder, DecoderLayer
from queryvision.model.denoising import Denoising
from queryvision.model.encoder import EncoderLayer
from queryvision.model.fusion import CSPRep
from queryvision.model.hybrid_encoder import HybridEncoder
from queryvision.model.neck import Projection
from queryvision.model.proposals import SelectedQueries, TokenStart
from queryvision.model.query_model import QueryModel


def rtdetrv2(
    heads: HeadParts,
    steering: Steering | None = None,
    *,
    backbone: str = "resnet50d",
    strides: Sequence[int] = (8, 16, 32),
    frozen_norm: bool = True,
    freeze: int | None = None,
    width: int = 256,
    encoder_width: int | None = None,
    num_queries: int = 300,
    denoising: int = 100,
    encoder_layers: int = 1,
    decoder_layers: int = 6,
    num_heads: int = 8,
    num_points: int = 4,
    ffn_width: int = 1024,
    encoder_ffn_width: int | None = None,
    expansion: float = 1.0,
    dropout: float = 0.0,
) -> QueryModel:
    """RT-DETRv2.

    Args:
        heads: in the order in which they answer, or a function that makes them from `Fit`.
        steering: who ranks proposals, gives the first anchors and refines them.
        backbone: torchvision's or timm's name.
        strides: of the backbone's levels, finest first, each twice the one before.
        frozen_norm: constant batch-norm statistics in the backbone; False for one that starts from random weights.
        freeze: parts of the backbone, from the image upwards, that are not trained; None: a torchvision ResNet's stem and first
            stage; timm's models are trained whole.
        width: D of the decoder, divisible by 4.
        encoder_width: channels of the encoder, divisible by 4; None: as the decoder.
        num_queries: the most objects an image can get.
        denoising: positive denoising queries over all groups, in training; 0: none.
        encoder_layers: self-attention layers of the coarsest level, 0 or more.
        decoder_layers: 1 or more.
        num_heads: attention heads.
        num_points: sampled places a head and level.
        ffn_width: channels inside the feed-forward parts.
        encoder_ffn_width: those of the encoder; None: as the decoder.
        expansion: channels inside the fusion blocks as a share of the encoder's.
        dropout: in encoder and decoder.

    Raises:
        ConfigError: a number is out of range or does not fit the others, or nobody knows the backbone.
    """
    wide, levels = encoder_width or width, len(strides)
    check_sizes(width, num_heads, dropout)
    check_sizes(wide, num_heads, dropout, "encoder_width")
    check_doubling(strides)
    check_at_least(1, num_queries=num_queries, decoder_layers=decoder_layers, ffn_width=ffn_width, num_points=num_points)
    check_at_least(0, encoder_layers=encoder_layers, freeze=freeze or 0, denoising=denoising)
    trunk = make_backbone(backbone, strides, frozen_norm, False, freeze, wide)
    fit = Fit(width, decoder_layers, per_layer=True, proposals="all", anchors=4, look_twice=True, denoising=denoising > 0)
    heads, slots = make_heads(heads, fit)
    return QueryModel(
        backbone=trunk,
        neck=Projection(trunk.channels, wide, norm=True),
        encoder=HybridEncoder(
            [EncoderLayer(wide, num_heads, encoder_ffn_width or ffn_width, dropout, "gelu") for _ in range(encoder_layers)],
            laterals=[ConvNorm(wide, wide, activation="silu") for _ in range(levels - 1)],
            top_down=[CSPRep(2 * wide, wide, 3, expansion) for _ in range(levels - 1)],
            downsamples=[ConvNorm(wide, wide, 3, 2, activation="silu") for _ in range(levels - 1)],
            bottom_up=[CSPRep(2 * wide, wide, 3, expansion) for _ in range(levels - 1)],
            projections=[ConvNorm(wide, width) for _ in range(levels)],
        ),
        queries=SelectedQueries(num_queries, width, TokenStart(width, slots)),
        decoder=Decoder(
            [
                DecoderLayer(
                    width,
                    num_heads,
                    DeformableCrossAttention(DeformableAttention(width, num_heads, levels, num_points)),
                    ffn_width,
                    dropout,
                    slots > 0,
                )
                for _ in range(decoder_layers)
            ],
            nn.Identity(),
            BoxPositions(width, num_slots=slots),
        ),
        heads=heads,
        steering=replace(steering or Steering(), hidden=None),
        denoising=Denoising(denoising, width, slots) if denoising else None,
    )


def rtdetrv2_r18(
    heads: HeadParts,
    steering: Steering | None = None,
    *,
    backbone: str = "resnet18d",
    frozen_norm: bool = False,
    freeze: int | None = None,
    num_queries: int = 300,
    denoising: int = 100,
) -> QueryModel:
    """RT-DETRv2-S as published: 48.1 AP on COCO val2017 after 120 epochs (RT-DETR:README.md)."""
    return rtdetrv2(
        heads,
        steering,
        backbone=backbone,
        frozen_norm=frozen_norm,
        freeze=freeze,
        num_queries=num_queries,
        denoising=denoising,
        decoder_layers=3,
        expansion=0.5,
    )


def rtdetrv2_r50(
    heads: HeadParts,
    steering: Steering | None = None,
    *,
    backbone: str = "resnet50d",
    frozen_norm: bool = True,
    freeze: int | None = 1,
    num_queries: int = 300,
    denoising: int = 100,
) -> QueryModel:
    """RT-DETRv2-L as published: 53.4 AP on COCO val2017 after 72 epochs (RT-DETR:README.md)."""
    return rtdetrv2(
        heads,
        steering,
        backbone=backbone,
        frozen_norm=frozen_norm,
        freeze=freeze,
        num_queries=num_queries,
        denoising=denoising,
    )
