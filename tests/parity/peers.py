"""Carries weights between our models and those of `transformers`."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn


def give_each_parameter_its_own_gain(model: nn.Module, seed: int = 0) -> None:
    """With plain random weights all queries of a DETR agree to 1e-4, and a wrong query order would pass."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 2:
                scale = 1.0 if "query_position" in name else value.shape[1] ** -0.5
                value.copy_(torch.randn(value.shape, generator=generator) * scale)
            low = 0.4 if "backbone" in name else 0.7  # features of a random ResNet would grow to hundreds
            value.mul_(low + 0.6 * torch.rand((), generator=generator))
            if name.endswith("bias"):
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
            if "q_proj" in name or "k_proj" in name:
                value.mul_(1.5)
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))


def published_detr_state(peer: nn.Module) -> dict[str, Tensor]:
    """The state dict of `transformers`' DetrForObjectDetection under the names of facebookresearch/detr."""
    state = {key: value.clone() for key, value in peer.state_dict().items()}
    out: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        attention = re.match(r"model\.(encoder|decoder)\.layers\.(\d+)\.(self_attn|encoder_attn)\.([qkv])_proj\.(\w+)", key)
        if attention:
            side, index, kind, which, what = attention.groups()
            name = "multihead_attn" if kind == "encoder_attn" else "self_attn"
            packed.setdefault(f"transformer.{side}.layers.{index}.{name}.in_proj_{what}", {})[which] = value
        else:
            out[_published_name(key)] = value
    out |= {key: torch.cat([parts[c] for c in "qkv"]) for key, parts in packed.items()}
    return {key: value for key, value in out.items() if not key.endswith("num_batches_tracked")}


def _published_name(key: str) -> str:
    last_norm = "norm3" if ".decoder." in key else "norm2"
    rules = (
        (r"^model\.backbone\.model\.embedder\.embedder\.convolution", "backbone.0.body.conv1"),
        (r"^model\.backbone\.model\.embedder\.embedder\.normalization", "backbone.0.body.bn1"),
        (r"^model\.backbone\.model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.", _stage),
        (r"shortcut\.convolution", "downsample.0"),
        (r"shortcut\.normalization", "downsample.1"),
        (r"layer\.(\d+)\.convolution", lambda m: f"conv{int(m[1]) + 1}"),
        (r"layer\.(\d+)\.normalization", lambda m: f"bn{int(m[1]) + 1}"),
        (r"^model\.query_position_embeddings", "query_embed"),
        (r"^model\.input_projection", "input_proj"),
        (r"^model\.(encoder|decoder)\.", r"transformer.\1."),
        (r"o_proj", "out_proj"),
        (r"encoder_attn_layer_norm", "norm2"),
        (r"self_attn_layer_norm", "norm1"),
        (r"final_layer_norm", last_norm),
        (r"encoder_attn", "multihead_attn"),
        (r"mlp\.fc([12])", r"linear\1"),
        (r"decoder\.layernorm", "decoder.norm"),
        (r"^class_labels_classifier", "class_embed"),
        (r"^bbox_predictor", "bbox_embed"),
    )
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _stage(match: re.Match[str]) -> str:
    return f"backbone.0.body.layer{int(match[1]) + 1}.{match[2]}."


def tiny_peer(num_labels: int = 5, *, full: bool = False, seed: int = 0, **changes: object) -> nn.Module:
    """A DetrForObjectDetection with random weights: resnet18 and narrow, or the full DETR-R50."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    torch.manual_seed(seed)
    sizes: dict[str, object] = {"backbone_config": ResNetConfig(out_features=["stage4"])}
    if not full:
        backbone = ResNetConfig(
            hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", out_features=["stage4"]
        )
        sizes = {
            "backbone_config": backbone,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "num_queries": 9,
        }
    config = DetrConfig(num_labels=num_labels, **{**sizes, **changes})
    peer = DetrForObjectDetection(config).eval()
    give_each_parameter_its_own_gain(peer, seed)
    return peer


@torch.no_grad()
def every_layer(peer: nn.Module, pixels: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and boxes of every decoder layer, (S,B,Q,C+1) and (S,B,Q,4).

    Hooks, because with `auxiliary_loss` transformers 5.23 hands the normed states on to the next layer, which the published
    model (detr:models/transformer.py) does not.
    """
    states: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda _m, _i, out: states.append(out)) for layer in peer.model.decoder.layers]
    peer(pixels, pixel_mask=(~padding).long())
    for handle in handles:
        handle.remove()
    normed = peer.model.decoder.layernorm(torch.stack(states))
    return peer.class_labels_classifier(normed), peer.bbox_predictor(normed).sigmoid()
