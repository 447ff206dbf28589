"""Carries weights between our models and those of `transformers`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from queryvision.structures import ImageBatch, Targets


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
    names = (
        (r"encoder_attn_layer_norm", "norm2"),
        (r"self_attn_layer_norm", "norm1"),
        (r"encoder_attn", "multihead_attn"),
    )
    return _published(peer.state_dict(), names)


def published_deformable_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `transformers`' DeformableDetrForObjectDetection (weights, gradients) under the names of Deformable-DETR."""
    names = (
        (r"encoder_attn_layer_norm", "norm1"),
        (r"(decoder.*)self_attn_layer_norm", r"\1norm2"),
        (r"self_attn_layer_norm", "norm1"),
        (r"encoder_attn", "cross_attn"),
        (r"^model\.(level_embed|reference_points|enc_output|pos_trans)", r"transformer.\1"),
        (r"^model\.input_proj", "input_proj"),
    )
    return _published(tensors, names)


def _published(tensors: Mapping[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Tensors under their published names; queries, keys and values in one."""
    out: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        attention = re.fullmatch(r"(.*_attn)\.([qkv])_proj\.(\w+)", key)
        if attention:
            module, which, what = attention.groups()
            packed.setdefault(f"{_published_name(module, names)}.in_proj_{what}", {})[which] = value.clone()
        else:
            out[_published_name(key, names)] = value.clone()
    out |= {key: torch.cat([parts[c] for c in "qkv"]) for key, parts in packed.items()}
    return {key: value for key, value in out.items() if not key.endswith("num_batches_tracked")}


def _published_name(key: str, names: tuple[tuple[str, str], ...]) -> str:
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
        *names,
        (r"^model\.(encoder|decoder)\.", r"transformer.\1."),
        (r"\.o_proj", ".out_proj"),
        (r"final_layer_norm", last_norm),
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


def padded_batch(height: int, width: int, seed: int = 1) -> ImageBatch:
    """Two images of different size."""
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    padding = torch.zeros(2, height, width, dtype=torch.bool)
    padding[1, int(height * 0.7) :] = True
    padding[1, :, int(width * 0.6) :] = True
    sizes = torch.tensor([[height, width], [int(height * 0.7), int(width * 0.6)]])
    return ImageBatch(pixels.masked_fill(padding[:, None], 0), padding, True, sizes)


def peer_targets(targets: Targets) -> list[dict[str, Tensor]]:
    """Targets as the losses of `transformers` take them."""
    rows = []
    for index, count in enumerate(targets.counts):
        rows.append({"class_labels": targets["labels"][index, :count], "boxes": targets["boxes"][index, :count]})
    return rows


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


def tiny_deformable_peer(
    num_labels: int = 5, *, refine: bool = False, two_stage: bool = False, full: bool = False, seed: int = 0
) -> nn.Module:
    """A DeformableDetrForObjectDetection with random weights: resnet18 and narrow, or the full R50; every part is trained.

    transformers 5.23 shares the class heads of a refining model among its layers and freezes the whole backbone; the published
    model does neither.
    """
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    torch.manual_seed(seed)
    levels = ["stage2", "stage3", "stage4"]
    sizes: dict[str, object] = {"backbone_config": ResNetConfig(out_features=levels), "num_queries": 300}
    if not full:
        backbone = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", out_features=levels)
        sizes = {
            "backbone_config": backbone,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_n_points": 3,
            "decoder_n_points": 3,
            "num_queries": 9,
            "two_stage_num_proposals": 9,
        }
    config = DeformableDetrConfig(
        num_labels=num_labels, with_box_refine=refine, two_stage=two_stage, disable_custom_kernels=True, dropout=0.0, **sizes
    )
    peer = DeformableDetrForObjectDetection(config).eval().requires_grad_()
    if refine:
        peer.class_embed = nn.ModuleList(nn.Linear(config.d_model, num_labels) for _ in peer.class_embed)
    if two_stage:
        peer.model.decoder.class_embed = peer.class_embed
    give_each_parameter_its_own_gain(peer, seed)
    return peer


def every_deformable_layer(peer: nn.Module, pixels: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (S,B,Q,C) and boxes (S,B,Q,4) of every decoder layer, as they are handed to the loss."""
    said: list[tuple[Tensor, Tensor]] = []

    def remember(*arguments: object, **_: object) -> tuple[Tensor, dict[str, Tensor], None]:
        logits, boxes = arguments[-2:]
        said.append((logits, boxes))
        return torch.zeros(()), {}, None

    peer.loss_function = remember
    peer(pixels, pixel_mask=(~padding).long(), labels=[])
    return said[0]
