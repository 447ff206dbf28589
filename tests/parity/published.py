"""Names and shapes of the tensors in published checkpoints, written down by hand; no weights are needed to test a reader."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def stand_ins(shapes: Shapes) -> dict[str, Tensor]:
    """A tensor of each shape; no two are equal, and all of them together take no room."""
    return {name: torch.tensor(float(index)).expand(shape) for index, (name, shape) in enumerate(shapes.items(), 1)}


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int = 256) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def mlp(name: str, *widths: int) -> Shapes:
    pairs = enumerate(zip(widths[:-1], widths[1:], strict=True))
    return {k: v for i, (into, out) in pairs for k, v in linear(f"{name}.layers.{i}", out, into).items()}


def convolution(name: str, out: int, into: int, size: int) -> Shapes:
    return {f"{name}.weight": (out, into, size, size)}


def frozen_norm(name: str, width: int) -> Shapes:
    return {f"{name}.{what}": (width,) for what in ("weight", "bias", "running_mean", "running_var")}


def resnet50() -> Shapes:
    body = "backbone.0.body"
    shapes = convolution(f"{body}.conv1", 64, 3, 7) | frozen_norm(f"{body}.bn1", 64)
    into = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner, out = 64 * 2**stage, 256 * 2**stage
        for block in range(blocks):
            name = f"{body}.layer{stage + 1}.{block}"
            for index, (o, i, size) in enumerate(((inner, into, 1), (inner, inner, 3), (out, inner, 1)), 1):
                shapes |= convolution(f"{name}.conv{index}", o, i, size) | frozen_norm(f"{name}.bn{index}", o)
            if block == 0:
                shapes |= convolution(f"{name}.downsample.0", out, into, 1) | frozen_norm(f"{name}.downsample.1", out)
            into = out
    return shapes


def deformable_attention(name: str, levels: int) -> Shapes:
    return (
        linear(f"{name}.sampling_offsets", 8 * levels * 4 * 2, 256)
        | linear(f"{name}.attention_weights", 8 * levels * 4, 256)
        | linear(f"{name}.value_proj", 256, 256)
        | linear(f"{name}.output_proj", 256, 256)
    )


def deformable_parts(channels: Sequence[int], ffn: int) -> Shapes:
    """What Deformable DETR and DINO have in common: one input projection of each level, and 6 + 6 layers."""
    levels = len(channels)
    shapes = resnet50() | {"transformer.level_embed": (levels, 256)}
    for level, into in enumerate(channels):
        name = f"input_proj.{level}"
        size = 3 if level == levels - 1 else 1
        shapes |= convolution(f"{name}.0", 256, into, size) | {f"{name}.0.bias": (256,)} | norm(f"{name}.1")
    for index in range(6):
        for side, attention, norms in (("encoder", "self_attn", 2), ("decoder", "cross_attn", 3)):
            name = f"transformer.{side}.layers.{index}"
            shapes |= deformable_attention(f"{name}.{attention}", levels)
            shapes |= linear(f"{name}.linear1", ffn, 256) | linear(f"{name}.linear2", 256, ffn)
            for number in range(norms):
                shapes |= norm(f"{name}.norm{number + 1}")
        name = f"transformer.decoder.layers.{index}.self_attn"
        shapes |= {f"{name}.in_proj_weight": (768, 256), f"{name}.in_proj_bias": (768,)} | linear(f"{name}.out_proj", 256, 256)
    return shapes


def packed_attention(name: str) -> Shapes:
    return {f"{name}.in_proj_weight": (768, 256), f"{name}.in_proj_bias": (768,)} | linear(f"{name}.out_proj", 256, 256)


def detr_panoptic() -> Shapes:
    """detr-r50-panoptic-00ce5173.pth of DETR."""
    shapes = (
        resnet50() | convolution("input_proj", 256, 2048, 1) | {"input_proj.bias": (256,), "query_embed.weight": (100, 256)}
    )
    for index in range(6):
        for side, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "multihead_attn"))):
            name = f"transformer.{side}.layers.{index}"
            shapes |= linear(f"{name}.linear1", 2048, 256) | linear(f"{name}.linear2", 256, 2048)
            for number, attention in enumerate((*attentions, None), 1):
                shapes |= norm(f"{name}.norm{number}") | (packed_attention(f"{name}.{attention}") if attention else {})
    shapes |= norm("transformer.decoder.norm") | linear("class_embed", 251, 256) | mlp("bbox_embed", 256, 256, 256, 4)
    shapes = {f"detr.{name}": shape for name, shape in shapes.items()}
    shapes |= linear("bbox_attention.q_linear", 256, 256) | linear("bbox_attention.k_linear", 256, 256)
    for index, (into, out) in enumerate(((264, 264), (264, 128), (128, 64), (64, 32), (32, 16)), 1):
        shapes |= convolution(f"mask_head.lay{index}", out, into, 3) | {f"mask_head.lay{index}.bias": (out,)}
        shapes |= norm(f"mask_head.gn{index}", out)
    for index, (into, out) in enumerate(((1024, 128), (512, 64), (256, 32)), 1):
        shapes |= convolution(f"mask_head.adapter{index}", out, into, 1) | {f"mask_head.adapter{index}.bias": (out,)}
    return shapes | convolution("mask_head.out_lay", 1, 16, 3) | {"mask_head.out_lay.bias": (1,)}


def heads(prefix: str, sets: int) -> Shapes:
    shapes: Shapes = {}
    for index in range(sets):
        shapes |= linear(f"{prefix}class_embed.{index}", 91, 256) | mlp(f"{prefix}bbox_embed.{index}", 256, 256, 256, 4)
    return shapes


def deformable_detr(refine: bool = False, two_stage: bool = False) -> Shapes:
    """r50_deformable_detr[_plus_iterative_bbox_refinement[_plus_plus_two_stage]]-checkpoint.pth of Deformable-DETR."""
    sets = 7 if two_stage else 6
    copies = heads("transformer.decoder.", sets)
    shapes = deformable_parts((512, 1024, 2048, 2048), 1024) | heads("", sets)
    if refine:
        shapes |= {name: shape for name, shape in copies.items() if two_stage or "bbox_embed" in name}
    if not two_stage:
        return shapes | {"query_embed.weight": (300, 512)} | linear("transformer.reference_points", 2, 256)
    shapes |= linear("transformer.enc_output", 256, 256) | norm("transformer.enc_output_norm")
    return shapes | linear("transformer.pos_trans", 512, 512) | norm("transformer.pos_trans_norm", 512)


def dino(levels: int = 4) -> Shapes:
    """checkpoint0011_4scale.pth and checkpoint0011_5scale.pth of DINO."""
    channels = (512, 1024, 2048, 2048) if levels == 4 else (256, 512, 1024, 2048, 2048)
    return (
        deformable_parts(channels, 2048)
        | heads("", 6)
        | heads("transformer.decoder.", 6)
        | {"transformer.tgt_embed.weight": (900, 256), "label_enc.weight": (92, 256)}
        | norm("transformer.decoder.norm")
        | mlp("transformer.decoder.ref_point_head", 512, 256, 256)
        | linear("transformer.enc_output", 256, 256)
        | norm("transformer.enc_output_norm")
        | linear("transformer.enc_out_class_embed", 91, 256)
        | mlp("transformer.enc_out_bbox_embed", 256, 256, 256, 4)
    )


def with_copies(state: dict[str, Tensor], shared: bool) -> dict[str, Tensor]:
    """Makes the tensors equal that are one in the published model: heads in the decoder, and of all layers if `shared`."""
    out = {}
    for name in state:
        parts = name.removeprefix("transformer.decoder.").split(".")
        if shared and parts[0] in ("class_embed", "bbox_embed"):
            parts[1] = "0"
        out[name] = state[".".join(parts)] if parts[0] in ("class_embed", "bbox_embed") else state[name]
    return out


def of_transformers(model: type, settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A stand-in for each tensor that `transformers` saves of a model of these settings, and what its config.json says.

    Args:
        model: its class.
        settings: of its class of settings.
    """
    from peers import published_hybrid_state

    config = model.config_class(**settings)
    with torch.device("meta"):
        empty = model(config)
    held = {name: tuple(value.shape) for name, value in published_hybrid_state(empty.state_dict()).items()}
    state = stand_ins(held)
    for name in held:
        if name.endswith("_points_scale"):
            points = config.decoder_n_points
            points = points if isinstance(points, list) else [points] * config.num_feature_levels
            state[name] = torch.tensor([1 / n for n in points for _ in range(n)])
        if name.endswith(("decoder.up", "decoder.reg_scale")):
            state[name] = torch.tensor([config.up if name.endswith("up") else config.reg_scale])
    return state, json.loads(json.dumps(config.to_dict(), default=str))


# ---------------------------------------------------------------------------------------------------- on detectron2
def detectron_resnet50() -> Shapes:
    shapes = convolution("backbone.stem.conv1", 64, 3, 7) | frozen_norm("backbone.stem.conv1.norm", 64)
    into = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner, out = 64 * 2**stage, 256 * 2**stage
        for block in range(blocks):
            name = f"backbone.res{stage + 2}.{block}"
            parts = [("conv1", inner, into, 1), ("conv2", inner, inner, 3), ("conv3", out, inner, 1)]
            for part, o, i, size in [("shortcut", out, into, 1), *parts] if block == 0 else parts:
                shapes |= convolution(f"{name}.{part}", o, i, size) | frozen_norm(f"{name}.{part}.norm", o)
            into = out
    return shapes


def detectron_pixels(channels: Sequence[int], ffn: int) -> Shapes:
    """Backbone and pixel decoder: one input projection of each level; those of stride 2 come last."""
    name, levels = "sem_seg_head.pixel_decoder", len(channels)
    shapes = detectron_resnet50() | {f"{name}.transformer.level_embed": (levels, 256)}
    for index, into in enumerate(channels):
        size = 3 if index == 3 else 1
        shapes |= convolution(f"{name}.input_proj.{index}.0", 256, into, size) | {f"{name}.input_proj.{index}.0.bias": (256,)}
        shapes |= norm(f"{name}.input_proj.{index}.1")
    for index in range(6):
        layer = f"{name}.transformer.encoder.layers.{index}"
        shapes |= deformable_attention(f"{layer}.self_attn", levels) | norm(f"{layer}.norm1") | norm(f"{layer}.norm2")
        shapes |= linear(f"{layer}.linear1", ffn, 256) | linear(f"{layer}.linear2", 256, ffn)
    shapes |= convolution(f"{name}.mask_features", 256, 256, 1) | {f"{name}.mask_features.bias": (256,)}
    shapes |= convolution(f"{name}.adapter_1", 256, 256, 1) | norm(f"{name}.adapter_1.norm")
    return shapes | convolution(f"{name}.layer_1", 256, 256, 3) | norm(f"{name}.layer_1.norm")


def mask2former(classes: int) -> Shapes:
    """model_final_3c8ec9.pkl (80 classes) and model_final_94dc52.pkl (133) of Mask2Former."""
    name = "sem_seg_head.predictor"
    shapes = detectron_pixels((2048, 1024, 512), 1024)
    for index in range(9):
        for kind, attention in (("self", "self_attn"), ("cross", "multihead_attn")):
            layer = f"{name}.transformer_{kind}_attention_layers.{index}"
            shapes |= packed_attention(f"{layer}.{attention}") | norm(f"{layer}.norm")
        layer = f"{name}.transformer_ffn_layers.{index}"
        shapes |= linear(f"{layer}.linear1", 2048, 256) | linear(f"{layer}.linear2", 256, 2048) | norm(f"{layer}.norm")
    shapes |= norm(f"{name}.decoder_norm") | {f"{name}.{part}.weight": (100, 256) for part in ("query_feat", "query_embed")}
    shapes |= {f"{name}.level_embed.weight": (3, 256)} | linear(f"{name}.class_embed", classes + 1, 256)
    return shapes | mlp(f"{name}.mask_embed", 256, 256, 256, 256) | {"criterion.empty_weight": (classes + 1,)}


def maskdino(classes: int, ffn: int = 2048) -> Shapes:
    """maskdino_r50_50ep_300q_hid{1024,2048}_3sd1_{instance_maskenhanced,panoptic}_*.pth of MaskDINO."""
    name = "sem_seg_head.predictor"
    shapes = detectron_pixels((512, 1024, 2048, 2048), ffn)
    shapes |= (
        linear(f"{name}.enc_output", 256, 256) | norm(f"{name}.enc_output_norm") | linear(f"{name}.class_embed", classes, 256)
    )
    shapes |= {f"{name}.label_enc.weight": (classes, 256)} | mlp(f"{name}.mask_embed", 256, 256, 256, 256)
    shapes |= norm(f"{name}.decoder_norm") | norm(f"{name}.decoder.norm")
    for index in range(9):
        layer = f"{name}.decoder.layers.{index}"
        shapes |= deformable_attention(f"{layer}.cross_attn", 4) | packed_attention(f"{layer}.self_attn")
        shapes |= linear(f"{layer}.linear1", 2048, 256) | linear(f"{layer}.linear2", 256, 2048)
        for number in (1, 2, 3):
            shapes |= norm(f"{layer}.norm{number}")
    shapes |= mlp(f"{name}.decoder.ref_point_head", 512, 256, 256)
    for box in ("_bbox_embed", *(f"{part}bbox_embed.{i}" for part in ("", "decoder.") for i in range(9))):
        shapes |= mlp(f"{name}.{box}", 256, 256, 256, 4)
    return shapes | {"criterion.empty_weight": (classes + 1,)}


def with_maskdino_copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Makes the tensors equal that are one in the published model."""
    out = {}
    for key in state:
        first = re.sub(r"predictor\.(decoder\.)?bbox_embed\.\d\.", "predictor._bbox_embed.", key)
        out[key] = state[first.replace("decoder.norm.", "decoder_norm.")]
    return out
