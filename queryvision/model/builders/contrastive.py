"""DINO (arXiv 2203.03605): Deformable DETR's parts with mixed selection, look forward twice and contrastive denoising."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from queryvision.head import Fit, Steering
from queryvision.layers.deformable import DeformableAttention
from queryvision.layers.positions import AnchorPositions
from queryvision.model.backbone import make_backbone
from queryvision.model.builders.checks import HeadParts, check_at_least, check_levels, check_sizes, make_heads
from queryvision.model.cross_attention import DeformableCrossAttention
from queryvision.model.decoder import Decoder, DecoderLayer
from queryvision.model.deformable_encoder import DeformableEncoder, DeformableEncoderLayer
from queryvision.model.denoising import Denoising
from queryvision.model.encoder import Positions
from queryvision.model.neck import Pyramid
from queryvision.model.proposals import LearnedStart, SelectedQueries
from queryvision.model.query_model import QueryModel


def dino(
    heads: HeadParts,
    steering: Steering | None = None,
    *,
    backbone: str = "resnet50",
    strides: Sequence[int] = (8, 16, 32),
    num_levels: int = 4,
    frozen_norm: bool = True,
    freeze: int | None = None,
    width: int = 256,
    num_queries: int = 900,
    denoising: int = 100,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    num_heads: int = 8,
    num_points: int = 4,
    ffn_width: int = 2048,
    dropout: float = 0.0,
) -> QueryModel:
    """DINO.

    Args:
        heads: in the order in which they answer, or a function that makes them from `Fit`.
        steering: who ranks proposals, gives the first anchors and refines them.
        backbone: torchvision's or timm's name.
        strides: of the backbone's levels, finest first.
        num_levels: L; further ones are made by convolutions of stride 2.
        frozen_norm: constant batch-norm statistics; False for a backbone that starts from random weights.
        freeze: parts of the backbone, from the image upwards, that are not trained; None: a ResNet's stem and first stage, as
            DETR; timm's models are trained whole.
        width: D, divisible by 32.
        num_queries: the most objects an image can get.
        denoising: positive denoising queries over all groups, in training; 0: none.
        encoder_layers: 0 or more.
        decoder_layers: 1 or more.
        num_heads: attention heads.
        num_points: sampled places a head and level.
        ffn_width: channels inside the feed-forward parts.
        dropout: in encoder and decoder.

    Raises:
        ConfigError: a number is out of range or does not fit the others, or nobody knows the backbone.
    """
    check_sizes(width, num_heads, dropout)
    check_levels(strides, num_levels, width, True)
    check_at_least(1, num_queries=num_queries, decoder_layers=decoder_layers, ffn_width=ffn_width, num_points=num_points)
    check_at_least(0, encoder_layers=encoder_layers, freeze=freeze or 0, denoising=denoising)
    trunk = make_backbone(backbone, strides, frozen_norm, False, freeze, width)
    fit = Fit(
        width, decoder_layers, proposals="all", anchors=4, refines="raw", look_twice=True, eps=1e-3, denoising=denoising > 0
    )
    heads, slots = make_heads(heads, fit)
    attention = partial(DeformableAttention, width, num_heads, num_levels, num_points)
    return QueryModel(
        backbone=trunk,
        neck=Pyramid(trunk.channels, width, num_levels),
        encoder=DeformableEncoder(
            [DeformableEncoderLayer(attention(), width, ffn_width, dropout) for _ in range(encoder_layers)],
            Positions(width, temperature=20.0),
            width,
            num_levels,
        ),
        queries=SelectedQueries(num_queries, width, LearnedStart(num_queries, width, slots)),
        decoder=Decoder(
            [
                DecoderLayer(width, num_heads, DeformableCrossAttention(attention()), ffn_width, dropout, slots > 0)
                for _ in range(decoder_layers)
            ],
            nn.LayerNorm(width),
            AnchorPositions(width, 4, slots),
        ),
        heads=heads,
        steering=replace(steering or Steering(), hidden=None),
        denoising=Denoising(denoising, width, slots) if denoising else None,
    )


def dino_r50(
    heads: HeadParts, steering: Steering | None = None, *, num_levels: int = 4, num_queries: int = 900, denoising: int = 100
) -> QueryModel:
    """DINO-R50 as published: 49.0 AP on COCO val2017 after 12 epochs with 4 levels, 49.4 with 5 (DINO:README.md)."""
    strides = (4, 8, 16, 32) if num_levels == 5 else (8, 16, 32)
    return dino(heads, steering, strides=strides, num_levels=num_levels, num_queries=num_queries, denoising=denoising)


def dino_vit(
    heads: HeadParts,
    steering: Steering | None = None,
    *,
    backbone: str = "vit_base_patch16_224",
    num_levels: int = 4,
    num_queries: int = 900,
    denoising: int = 100,
) -> QueryModel:
    """DINO on a plain ViT with a simple feature pyramid (arXiv 2203.16527); see `dino`."""
    return dino(heads, steering, backbone=backbone, num_levels=num_levels, num_queries=num_queries, denoising=denoising)


def dino_small(
    heads: HeadParts,
    steering: Steering | None = None,
    *,
    backbone: str = "tf_efficientnet_lite0",
    strides: Sequence[int] = (8, 16, 32),
    num_levels: int = 3,
    frozen_norm: bool = True,
    freeze: int | None = None,
    width: int = 128,
    num_queries: int = 60,
    denoising: int = 40,
    encoder_layers: int = 1,
    decoder_layers: int = 3,
    num_points: int = 4,
    ffn_width: int = 512,
    dropout: float = 0.0,
) -> QueryModel:
    """DINO for a laptop: the same parts, fewer and narrower. See `dino`."""
    return dino(
        heads,
        steering,
        backbone=backbone,
        strides=strides,
        num_levels=num_levels,
        frozen_norm=frozen_norm,
        freeze=freeze,
        width=width,
        num_queries=num_queries,
        denoising=denoising,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        num_heads=4,
        num_points=num_points,
        ffn_width=ffn_width,
        dropout=dropout,
    )
