"""DINO (arXiv 2203.03605) written down plainly under its published names: no peer in `transformers` is whole.

Deformable attention, sine positions, the grid of proposals and perceptrons are Grounding DINO's of `transformers`,
self-attention is PyTorch's; the loops are our own. The backbone is our ResNet, which has a peer elsewhere.

Legend: B images, Q queries, N memory tokens, L levels, D width.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peers import give_each_parameter_its_own_gain
from torch import Tensor, nn
from transformers.models.grounding_dino import modeling_grounding_dino as peer

from queryvision.model import builders
from queryvision.model.query_model import QueryModel
from queryvision.model.resnet import ResNet
from queryvision.structures import Outputs, Round
from queryvision.tasks.detection import BoxHead, LabelHead
from queryvision.tasks.detection.models import STEERING
from queryvision.weights import dino as reader
from queryvision.weights.reading import fill

MAIN = 12
"""Queries of the tiny models, without denoising."""


class Extra(NamedTuple):
    """Denoising queries, behind the others."""

    labels: Tensor  # (B,E)
    anchors: Tensor  # (B,E,4)
    group: Tensor  # (E,)


class Answers(NamedTuple):
    """Logits and boxes; of the layers (S,B,Q+E,...), of the chosen proposals (B,Q,...)."""

    logits: Tensor
    boxes: Tensor
    proposal_logits: Tensor
    proposal_boxes: Tensor
    ranks: Tensor  # (B,Q) of the chosen, best first


def inverse_sigmoid(x: Tensor) -> Tensor:
    share = x.clamp(0, 1)
    return share.clamp(min=1e-3).log() - (1 - share).clamp(min=1e-3).log()


class EncoderLayer(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.self_attn = peer.GroundingDinoMultiscaleDeformableAttention(config, config.heads, config.points)
        self.norm1, self.norm2 = nn.LayerNorm(config.d_model), nn.LayerNorm(config.d_model)
        self.linear1, self.linear2 = nn.Linear(config.d_model, config.ffn), nn.Linear(config.ffn, config.d_model)

    def forward(self, tokens: Tensor, positions: Tensor, **where: object) -> Tensor:
        tokens = self.norm1(tokens + self.self_attn(tokens + positions, encoder_hidden_states=tokens, **where)[0])
        return self.norm2(tokens + self.linear2(self.linear1(tokens).relu()))


class DecoderLayer(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.cross_attn = peer.GroundingDinoMultiscaleDeformableAttention(config, config.heads, config.points)
        self.norm1 = nn.LayerNorm(config.d_model)  # behind the cross-attention, which comes second
        self.self_attn = nn.MultiheadAttention(config.d_model, config.heads, batch_first=True)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.linear1, self.linear2 = nn.Linear(config.d_model, config.ffn), nn.Linear(config.ffn, config.d_model)
        self.norm3 = nn.LayerNorm(config.d_model)

    def forward(self, states: Tensor, positions: Tensor, blocked: Tensor, memory: Tensor, **where: object) -> Tensor:
        placed = states + positions
        states = self.norm2(states + self.self_attn(placed, placed, states, attn_mask=blocked, need_weights=False)[0])
        states = self.norm1(states + self.cross_attn(states + positions, encoder_hidden_states=memory, **where)[0])
        return self.norm3(states + self.linear2(self.linear1(states).relu()))


class ReferenceDino(nn.Module):
    """Its `state_dict` has the names and shapes of a published file."""

    def __init__(
        self, classes: int = 5, queries: int = 12, *, backbone: str = "resnet18", stages: tuple[int, ...] = (2, 3, 4),
        width: int = 64, encoder_layers: int = 2, decoder_layers: int = 3, heads: int = 4, points: int = 4, ffn: int = 48,
    ) -> None:  # fmt: skip
        super().__init__()
        mlp = peer.GroundingDinoMLPPredictionHead
        config = SimpleNamespace(
            d_model=width, num_feature_levels=len(stages) + 1, disable_custom_kernels=True, heads=heads, points=points, ffn=ffn,
            positional_embedding_temperature=20,
        )  # fmt: skip
        self.sines = peer.GroundingDinoSinePositionEmbedding(config)
        self.backbone = nn.ModuleList([ResNet(backbone, stages, freeze=0)])
        channels = self.backbone[0].channels
        convolutions = [*(nn.Conv2d(c, width, 1) for c in channels), nn.Conv2d(channels[-1], width, 3, 2, 1)]
        self.input_proj = nn.ModuleList(nn.Sequential(c, nn.GroupNorm(32, width)) for c in convolutions)
        self.label_enc = nn.Embedding(classes + 1, width)
        self.class_embed = nn.ModuleList([nn.Linear(width, classes)] * decoder_layers)
        self.bbox_embed = nn.ModuleList([mlp(width, width, 4, 3)] * decoder_layers)
        transformer = self.transformer = nn.Module()
        transformer.level_embed = nn.Parameter(torch.randn(len(convolutions), width))
        transformer.tgt_embed = nn.Embedding(queries, width)
        transformer.encoder, transformer.decoder = nn.Module(), nn.Module()
        transformer.encoder.layers = nn.ModuleList(EncoderLayer(config) for _ in range(encoder_layers))
        transformer.decoder.layers = nn.ModuleList(DecoderLayer(config) for _ in range(decoder_layers))
        transformer.decoder.norm = nn.LayerNorm(width)
        transformer.decoder.ref_point_head = mlp(2 * width, width, width, 2)
        transformer.decoder.class_embed, transformer.decoder.bbox_embed = self.class_embed, self.bbox_embed
        transformer.enc_output, transformer.enc_output_norm = nn.Linear(width, width), nn.LayerNorm(width)
        transformer.enc_out_class_embed = nn.Linear(width, classes)
        transformer.enc_out_bbox_embed = mlp(width, width, 4, 3)

    def forward(self, pixels: Tensor, padding: Tensor, extra: Extra | None = None) -> Answers:
        """Pixels (B,3,H,W), padding (B,H,W) True = padding."""
        memory, where, ratios = self.encode(pixels, padding)
        own = self.transformer
        tokens, grid = peer.GroundingDinoModel.generate_encoder_output_proposals(
            own, memory, ~where["attention_mask"], where["spatial_shapes_list"]
        )
        logits, boxes = own.enc_out_class_embed(tokens), own.enc_out_bbox_embed(tokens) + grid
        ranks, best = logits.amax(-1).topk(own.tgt_embed.num_embeddings, 1)
        logits, boxes = (x.gather(1, best[..., None].expand(-1, -1, x.shape[-1])) for x in (logits, boxes))
        anchors, states = boxes.sigmoid().detach(), own.tgt_embed.weight.expand(len(pixels), -1, -1)
        group = torch.full((states.shape[1],), -1)
        if extra is not None:
            anchors, states = torch.cat((anchors, extra.anchors), 1), torch.cat((states, self.label_enc(extra.labels)), 1)
            group = torch.cat((group, extra.group))
        # a query sees its own group and the main one, -1
        blocked = (group[:, None] != group) & (group != -1)
        layers = self.decode(states, anchors, blocked, memory, where, ratios)
        return Answers(*layers, logits, boxes.sigmoid(), ranks)

    def encode(self, pixels: Tensor, padding: Tensor) -> tuple[Tensor, dict[str, object], Tensor]:
        """Memory (B,N,D), where attention may sample, and the unpadded share (B,L,2) of width and height."""
        maps = self.backbone[0].maps(pixels)
        levels = [project(m) for project, m in zip(self.input_proj, [*maps, maps[-1]], strict=True)]
        masks = [~F.interpolate(padding[:, None].float(), x.shape[-2:])[:, 0].bool() for x in levels]
        shapes = [(x.shape[2], x.shape[3]) for x in levels]
        ratios = torch.stack([torch.stack((m[:, 0].float().mean(1), m[:, :, 0].float().mean(1)), -1) for m in masks], 1)
        sines = [self.sines(mask, mask).flatten(2).mT for mask in masks]
        positions = torch.cat([s + e for s, e in zip(sines, self.transformer.level_embed, strict=True)], 1)
        where = {
            "attention_mask": torch.cat([mask.flatten(1) for mask in masks], 1),
            "spatial_shapes": torch.tensor(shapes),
            "spatial_shapes_list": shapes,
        }
        centres = peer.GroundingDinoEncoder.get_reference_points(shapes, ratios, pixels.device)
        tokens = torch.cat([x.flatten(2).mT for x in levels], 1)
        for layer in self.transformer.encoder.layers:
            tokens = layer(tokens, positions, reference_points=centres, **where)
        return tokens, where, ratios

    def decode(
        self, states: Tensor, anchors: Tensor, blocked: Tensor, memory: Tensor, where: dict[str, object], ratios: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits and boxes of every layer; look forward twice."""
        decoder, before, said = self.transformer.decoder, anchors, []
        for layer, label, box in zip(decoder.layers, self.class_embed, self.bbox_embed, strict=True):
            reference = anchors[:, :, None] * ratios.repeat(1, 1, 2)[:, None]
            sines = peer.encode_sinusoidal_position_embedding(reference[:, :, 0], memory.shape[-1] // 2)
            states = layer(states, decoder.ref_point_head(sines), blocked, memory, reference_points=reference, **where)
            normed = decoder.norm(states)
            said.append((label(normed), (box(normed) + inverse_sigmoid(before)).sigmoid()))
            before = (box(states) + inverse_sigmoid(anchors)).sigmoid()
            anchors = before.detach()
        logits, boxes = zip(*said, strict=True)
        return torch.stack(logits), torch.stack(boxes)


# ---------------------------------------------------------------------------------------------------- tiny models
def reference(**sizes: Any) -> ReferenceDino:
    torch.manual_seed(0)
    made = ReferenceDino(**sizes)
    give_each_parameter_its_own_gain(made)
    return made.train()


def ours(wanted: ReferenceDino | None = None, denoising: int = 5, levels: int = 4, **noise: float) -> QueryModel:
    """A tiny model with the reference's weights."""
    strides = (4, 8, 16, 32) if levels == 5 else (8, 16, 32)
    labels = {name: value for name, value in noise.items() if name == "label_noise"}
    boxes = {name: value for name, value in noise.items() if name == "box_noise"}
    model = builders.dino(
        lambda fit: [LabelHead(fit, 5, loss="focal", cost=2.0, **labels), BoxHead(fit, **boxes)], STEERING,
        backbone="resnet18", strides=strides, num_levels=levels, width=64, num_queries=MAIN, denoising=denoising,
        encoder_layers=2, decoder_layers=3, num_heads=4, num_points=4, ffn_width=48, freeze=0,
    )  # fmt: skip
    fill(model, reader.rename((wanted or reference()).state_dict(), model.heads.heads()))
    return model.train()


def generators(seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(2)]


def of(outputs: Outputs, queries: str, proposals: bool = False) -> Round:
    return next(r for r in outputs.rounds if r.queries == queries and r.proposals == proposals)


def logits(round: Round) -> Tensor:
    return round.answers["labels"]["logits"]


def boxes(round: Round) -> Tensor:
    return round.answers["boxes"]["boxes"]


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)
