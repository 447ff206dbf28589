"""What the readers of RT-DETRv2 and D-FINE share: checkpoints of `transformers` with a hybrid encoder.

What a file does not say is taken from the `config.json` beside it, or is as published. A head maps its own keys.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from queryvision.errors import CheckpointError
from queryvision.model.timm_body import UNIT
from queryvision.weights import reading
from queryvision.weights.trunks import backbone_of, count, timm_key

LAYER = r"^model\.(encoder|decoder)\.(?:encoder\.0\.)?layers\.(\d+)\."
RULES: reading.Rules = (
    (r"^model\.backbone\.model\.", "backbone.body."),
    (r"^model\.encoder_input_proj\.(\d+)\.0\.", r"neck.levels.\1.conv."),
    (r"^model\.encoder_input_proj\.(\d+)\.1\.", r"neck.levels.\1.norm."),
    (r"^model\.decoder_input_proj\.(\d+)\.0\.", r"encoder.projections.\1.conv."),
    (r"^model\.decoder_input_proj\.(\d+)\.1\.", r"encoder.projections.\1.norm."),
    (r"^model\.encoder\.(lateral_convs|fpn_blocks|downsample_convs|pan_blocks)\.", r"encoder.\1."),
    (LAYER + r"fc([12])\.", r"\1.layers.\2.ffn.linear\3."),
    (LAYER + r"self_attn\.", r"\1.layers.\2.self_attn."),
    (LAYER + r"encoder_attn\.", r"\1.layers.\2.cross_attn.attention."),
    (LAYER + r"self_attn_layer_norm\.", r"\1.layers.\2.norm1."),
    (LAYER + r"(?:encoder_attn_layer_norm|gateway)\.", r"\1.layers.\2.norm2."),
    (r"^model\.decoder\.layers\.(\d+)\.final_layer_norm\.", r"decoder.layers.\1.norm3."),
    (LAYER + r"final_layer_norm\.", r"\1.layers.\2.norm2."),
    (r"^model\.enc_output\.0\.", "queries.project."),
    (r"^model\.enc_output\.1\.", "queries.norm."),
    (r"^model\.decoder\.query_pos_head\.", "decoder.positions.anchors."),
)
"""What D-FINE has, too."""
OLDER: reading.Rules = (
    (r"^model\.encoder\.aifi\.", "model.encoder.encoder."),
    (r"\.o_proj\.", ".out_proj."),
    (r"^(model\.(?:encoder\.encoder\.\d+|decoder)\.layers\.\d+\.)mlp\.(?:fc1|layers\.0)\.", r"\1fc1."),
    (r"^(model\.(?:encoder\.encoder\.\d+|decoder)\.layers\.\d+\.)mlp\.(?:fc2|layers\.1)\.", r"\1fc2."),
)
"""From the names of transformers 5 to those in published files."""
UNUSED = r"num_batches_tracked$|^model\.(anchors|valid_mask)$|_points_scale$|^model\.decoder\.(reg_scale|up)$"
"""What is no weight, or computed anew."""
COPIES: reading.Rules = ((r"^((?:class|bbox)_embed\.)", r"model.decoder.\1"),)
"""Heads that a file may hold once more."""
FIXED: Mapping[str, Any] = {
    "normalize_before": False,
    "encoder_activation_function": "gelu",
    "activation_function": "silu",
    "decoder_activation_function": "relu",
    "positional_encoding_temperature": 10000,
    "learn_initial_query": False,
    "with_box_refine": True,
    "decoder_offset_scale": 0.5,
    "decoder_method": "default",
    "layer_norm_eps": 1e-5,
    "batch_norm_eps": 1e-5,
}
"""Settings that can be read with these values only."""


def open_checked(
    source: str, kinds: tuple[str, ...], needed: tuple[str, ...], fixed: Mapping[str, Any] = FIXED
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under the names of published files, and the settings beside them.

    Raises:
        CheckpointError: it is another kind of model, or says something that cannot be read.
    """
    state, settings = reading.open_safetensors(source)
    kind = settings.get("model_type", kinds[0])
    if kind not in kinds:
        raise CheckpointError(f"{source}: its config.json says model_type = {kind}; this reader takes {', '.join(kinds)}")
    state = older(state)
    missing = [key for key in needed if key not in state]
    if missing:
        raise CheckpointError(f"{source}: is no {kinds[0]} checkpoint of transformers, it lacks {missing[0]}")
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            raise CheckpointError(f"{source}: its config.json says {key} = {settings[key]}; only {value} can be read")
    return state, settings


def common_sizes(state: Mapping[str, Tensor], settings: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[int]]:
    """Keyword arguments of both builders, and the sampled points of each level.

    Raises:
        CheckpointError: they fit none of ours.
    """
    levels, projected = (count(state, rf"^model\.{side}_input_proj\.(\d+)\.0\.weight") for side in ("encoder", "decoder"))
    width, wide = (len(state[f"model.{key}.0.weight"]) for key in ("enc_output", "encoder_input_proj.0"))
    if projected > levels or list(settings.get("encode_proj_layers", [levels - 1])) != [levels - 1]:
        raise CheckpointError(
            f"{source}: only attention within the last of the backbone's levels and no further ones can be read"
        )
    encoder_layers = count(state, r"^model\.encoder\.encoder\.0\.layers\.(\d+)\.")
    inner = len(state["model.decoder.layers.0.fc1.weight"])
    outer = len(state["model.encoder.encoder.0.layers.0.fc1.weight"]) if encoder_layers else inner
    heads, points = _heads_and_points(state, settings, levels, source)
    backbone, stages = backbone_of(state, source)
    channels = [state[f"model.encoder_input_proj.{level}.0.weight"].shape[1] for level in range(levels)]
    if any(c not in stages for c in channels):
        raise CheckpointError(f"{source}: its levels have {channels} channels, the stages of {backbone} {stages}")
    denoising = "model.denoising_class_embed.weight" in state
    sizes = {
        "backbone": f"{backbone}.{UNIT}",
        "strides": tuple(4 * 2 ** stages.index(c) for c in channels),
        "width": width,
        "encoder_width": wide,
        "num_queries": settings.get("num_queries", 300),
        "denoising": settings.get("num_denoising", 100) if denoising else 0,
        "encoder_layers": encoder_layers,
        "decoder_layers": count(state, r"^model\.decoder\.layers\.(\d+)\."),
        "num_heads": heads,
        "ffn_width": inner,
        "encoder_ffn_width": outer if outer != inner else None,
    }
    return sizes, points


def _heads_and_points(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], levels: int, source: str
) -> tuple[int, list[int]]:
    """Attention heads, and points of each level: told by the shares (1/n for each of n points) where a file holds them."""
    aim = "model.decoder.layers.0.encoder_attn."
    rows = len(state[f"{aim}attention_weights.weight"])
    held = [state[f"{aim}{name}_points_scale"] for name in ("n", "num") if f"{aim}{name}_points_scale" in state]
    if held:
        shares, points = held[0].tolist(), list[int]()
        while sum(points) < len(shares):
            points.append(max(1, round(1 / max(shares[sum(points)], 1e-3))))
        heads = rows // len(shares)
    else:
        heads = settings.get("decoder_attention_heads", 8)
        points = [rows // (heads * levels)] * levels
    if len(points) != levels or heads * sum(points) != rows:
        raise CheckpointError(f"{source}: {rows} sampled points are none for {heads} heads and {levels} levels of {points}")
    if settings.get("encoder_attention_heads", heads) != heads or settings.get("decoder_attention_heads", heads) != heads:
        raise CheckpointError(
            f"{source}: encoder and decoder have other numbers of attention heads than {heads}, as the points say"
        )
    return heads, points


def by_name(
    general: Callable[..., Any], sizes: Mapping[str, Any], named: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    """The named builder that makes a model of these sizes, or the general one, with what differs from its defaults.

    Args:
        general: builder with an argument for each size.
        sizes: of the model.
        named: {builder: its backbone, and where it differs from `general`}.
    """
    usual = {name: p.default for name, p in inspect.signature(general).parameters.items()} | {"encoder_width": sizes["width"]}
    free = {key: sizes[key] for key in ("backbone", "num_queries", "denoising")}
    differing = {key: value for key, value in sizes.items() if key not in free and value != usual[key]}
    for name, named_as in named.items():
        if named_as == (sizes["backbone"].removesuffix(f".{UNIT}"), differing):
            return {"name": name, **free}
    return {"name": general.__name__, **free, **differing}


def share(part: int, whole: int) -> float:
    """The share whose whole number of channels is `part`."""
    exact = part / whole
    return exact if int(whole * exact) == part else (part + 0.5) / whole


def older(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of published files, whichever they have; the decoder holds the heads."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in OLDER:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    if any(key.startswith("model.decoder.class_embed.") for key in renamed):
        return renamed
    return {re.sub(*COPIES[0], key): value for key, value in renamed.items()}


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict with every tensor once and of our shapes; still under their names, but for the backbone's inner ones.

    Queries, keys and values become one; the class embedding loses its last row, that of padding, which is zero.

    Raises:
        CheckpointError: what the published model shares differs, or a projection is missing.
    """
    used = {key: value for key, value in older(state).items() if not re.search(UNUSED, key)}
    state = reading.without_copies(used, COPIES)
    label = "model.denoising_class_embed.weight"
    if label in state:
        state = {**state, label: state[label][: len(state["model.enc_score_head.weight"])]}
    packed: dict[str, Tensor] = {}
    for key, value in state.items():
        attention = re.fullmatch(r"(.*\.self_attn)\.([qkv])_proj\.(weight|bias)", key)
        if attention is None:
            packed[timm_key(key)] = value
        elif attention[2] == "q":
            parts = [f"{attention[1]}.{which}_proj.{attention[3]}" for which in "qkv"]
            missing = [part for part in parts if part not in state]
            if missing:
                raise CheckpointError(f"the checkpoint lacks '{missing[0]}'")
            packed[f"{attention[1]}.in_proj_{attention[3]}"] = torch.cat([state[part] for part in parts])
    return packed
