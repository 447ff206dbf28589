"""D-FINE (arXiv 2410.13842): RT-DETR's parts with gated layers, unprojected values, and boxes refined as distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from queryvision.head import Fit, Steering
from queryvision.layers.conv import ConvNorm, start_small
from queryvision.layers.deformable import DeformableAttention
from queryvision.layers.positions import BoxPositions
from queryvision.model.backbone import make_backbone
from queryvision.model.builders.checks import (
    HeadParts,
    check_at_least,
    check_doubling,
    check_sizes,
    make_heads,
    ordered,
    pixel_strides,
)
from queryvision.model.cross_attention import DeformableCrossAttention
from queryvision.model.decoder import Decoder, DecoderLayer
from queryvision.model.denoising import Denoising
from queryvision.model.encoder import EncoderLayer
from queryvision.model.fusion import Downsample, Elan
from queryvision.model.hybrid_encoder import HybridEncoder
from queryvision.model.neck import Projection
from queryvision.model.pixel_decoder import light_pixels
from queryvision.model.proposals import SelectedQueries, TokenStart
from queryvision.model.query_model import QueryModel


def dfine(
    heads: HeadParts,
    steering: Steering | None = None,
    *,
    backbone: str = "hgnetv2_b4",
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
    num_points: Sequence[int] = (3, 6, 3),
    ffn_width: int = 1024,
    encoder_ffn_width: int | None = None,
    expansion: float = 1.0,
    depth: float = 1.0,
    dropout: float = 0.0,
) -> QueryModel:
    """D-FINE.

    Args:
        heads: in the order in which they answer, or a function that makes them from `Fit`; the one that refines anchors
            answers first, and others may add what it knows of its quality.
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
        num_points: sampled places a head, one number a level.
        ffn_width: channels inside the feed-forward parts.
        encoder_ffn_width: those of the encoder; None: as the decoder.
        expansion: channels of a fusion block's deep branches as a share of half the encoder's.
        depth: share of the three RepVGG blocks in each deep branch.
        dropout: in encoder and decoder.

    Raises:
        ConfigError: a number is out of range or does not fit the others, or nobody knows the backbone.
    """
    wide, levels, blocks = encoder_width or width, len(strides), round(3 * depth)
    check_sizes(width, num_heads, dropout)
    check_sizes(wide, num_heads, dropout, "encoder_width")
    check_doubling(strides, num_points)
    check_at_least(1, num_queries=num_queries, decoder_layers=decoder_layers, ffn_width=ffn_width)
    check_at_least(0, encoder_layers=encoder_layers, freeze=freeze or 0, denoising=denoising, depth=blocks)
    fit = Fit(
        width,
        decoder_layers,
        per_layer=True,
        proposals="all",
        anchors=4,
        denoising=denoising > 0,
        distributions=True,
        pixels=width // 2,
    )
    heads, slots = make_heads(heads, fit)
    seen = pixel_strides(heads, strides)
    trunk = make_backbone(backbone, seen, frozen_norm, False, freeze, wide)
    channels = trunk.channels[-levels:]
    steering = replace(steering or Steering(), hidden=None)
    return QueryModel(
        backbone=trunk,
        neck=Projection(channels, wide, norm=True),
        encoder=HybridEncoder(
            [EncoderLayer(wide, num_heads, encoder_ffn_width or ffn_width, dropout, "gelu") for _ in range(encoder_layers)],
            laterals=[ConvNorm(wide, wide) for _ in range(levels - 1)],
            top_down=[Elan(2 * wide, wide, blocks, expansion) for _ in range(levels - 1)],
            downsamples=[Downsample(wide) for _ in range(levels - 1)],
            bottom_up=[Elan(2 * wide, wide, blocks, expansion) for _ in range(levels - 1)],
            projections=[nn.Identity() if wide == width else ConvNorm(wide, width) for _ in range(levels)],
        ),
        queries=SelectedQueries(num_queries, width, TokenStart(width, slots)),
        decoder=Decoder(
            [
                DecoderLayer(
                    width,
                    num_heads,
                    DeformableCrossAttention(DeformableAttention(width, num_heads, levels, num_points, project=False)),
                    ffn_width,
                    dropout,
                    slots > 0,
                    gated=True,
                )
                for _ in range(decoder_layers)
            ],
            nn.Identity(),
            BoxPositions(width, 10.0, slots),
            initial="after",
        ),
        heads=ordered(heads, steering.later),
        steering=steering,
        denoising=Denoising(denoising, width, slots) if denoising else None,
        pixels=light_pixels(trunk.channels[0], width, fit.pixels, seen[0], strides[0] // seen[0])
        if len(seen) > levels
        else None,
    )


def dfine_s(
    heads: HeadParts,
    steering: Steering | None = None,
    *,
    backbone: str = "hgnetv2_b0",
    frozen_norm: bool = False,
    freeze: int | None = None,
    num_queries: int = 300,
    denoising: int = 100,
) -> QueryModel:
    """D-FINE-S as published: 48.5 AP on COCO val2017 (D-FINE:README.md)."""
    return dfine(
        heads,
        steering,
        backbone=backbone,
        frozen_norm=frozen_norm,
        freeze=freeze,
        num_queries=num_queries,
        denoising=denoising,
        decoder_layers=3,
        expansion=0.5,
        depth=0.34,
    )


def dfine_m(
    heads: HeadParts,
    steering: Steering | None = None,
    *,
    backbone: str = "hgnetv2_b2",
    frozen_norm: bool = False,
    freeze: int | None = None,
    num_queries: int = 300,
    denoising: int = 100,
) -> QueryModel:
    """D-FINE-M as published: 52.3 AP on COCO val2017 (D-FINE:README.md)."""
    return dfine(
        heads,
        steering,
        backbone=backbone,
        frozen_norm=frozen_norm,
        freeze=freeze,
        num_queries=num_queries,
        denoising=denoising,
        decoder_layers=4,
        depth=0.67,
    )


def dfine_l(
    heads: HeadParts,
    steering: Steering | None = None,
    *,
    backbone: str = "hgnetv2_b4",
    frozen_norm: bool = True,
    freeze: int | None = 1,
    num_queries: int = 300,
    denoising: int = 100,
) -> QueryModel:
    """D-FINE-L as published: 54.0 AP on COCO val2017 (D-FINE:README.md)."""
    return dfine(
        heads,
        steering,
        backbone=backbone,
        frozen_norm=frozen_norm,
        freeze=freeze,
        num_queries=num_queries,
        denoising=denoising,
    )


def dfine_small(
    heads: HeadParts,
    steering: Steering | None = None,
    *,
    backbone: str = "tf_efficientnet_lite0",
    strides: Sequence[int] = (8, 16, 32),
    frozen_norm: bool = True,
    freeze: int | None = None,
    width: int = 128,
    num_queries: int = 60,
    denoising: int = 40,
    encoder_layers: int = 1,
    decoder_layers: int = 3,
    num_points: Sequence[int] = (3, 6, 3),
    ffn_width: int = 512,
    expansion: float = 0.5,
    depth: float = 0.34,
) -> QueryModel:
    """D-FINE for a laptop: the same parts, fewer and narrower, and convolutions that start small. See `dfine`."""
    model = dfine(
        heads,
        steering,
        backbone=backbone,
        strides=strides,
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
        expansion=expansion,
        depth=depth,
    )
    for part in (model.neck, model.encoder, model.pixels):
        if part is not None:
            start_small(part)
    return model
