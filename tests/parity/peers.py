"""Carries weights between our models and those of `transformers`."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
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


def published_panoptic_state(peer: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `transformers`' DetrForSegmentation under the names of facebookresearch/detr."""
    tensors = peer.state_dict() if isinstance(peer, nn.Module) else peer
    names = (
        (r"encoder_attn_layer_norm", "norm2"),
        (r"self_attn_layer_norm", "norm1"),
        (r"encoder_attn", "multihead_attn"),
    )
    inner = {key.removeprefix("detr."): value for key, value in tensors.items() if key.startswith("detr.")}
    out = {f"detr.{key}": value for key, value in _published(inner, names).items()}
    rules = (
        (r"^bbox_attention\.([qk])_proj", r"bbox_attention.\1_linear"),
        (r"^mask_head\.conv(\d)\.conv", r"mask_head.lay\1"),
        (r"^mask_head\.conv(\d)\.norm", r"mask_head.gn\1"),
        (r"^mask_head\.fpn_stages\.(\d)\.fpn_adapter", lambda m: f"mask_head.adapter{int(m[1]) + 1}"),
        (r"^mask_head\.fpn_stages\.(\d)\.refine\.conv", lambda m: f"mask_head.lay{int(m[1]) + 3}"),
        (r"^mask_head\.fpn_stages\.(\d)\.refine\.norm", lambda m: f"mask_head.gn{int(m[1]) + 3}"),
        (r"^mask_head\.output_conv", "mask_head.out_lay"),
    )
    for key, value in tensors.items():
        if not key.startswith("detr."):
            for pattern, replacement in rules:
                key = re.sub(pattern, replacement, key)
            out[key] = value.clone()
    return out


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


def whole_batch(height: int, width: int, seed: int = 1) -> ImageBatch:
    """Two images of one size, without padding; coarse patches, so that places differ at all levels."""
    generator = torch.Generator().manual_seed(seed)
    patches = 2 * torch.randn(2, 3, height // 16, width // 16, generator=generator)
    pixels = patches.repeat_interleave(16, 2).repeat_interleave(16, 3) + 0.3 * torch.randn(
        2, 3, height, width, generator=generator
    )
    return ImageBatch(pixels, torch.zeros(2, height, width, dtype=torch.bool), False, torch.tensor([[height, width]] * 2))


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


def tiny_panoptic_peer(num_labels: int = 5, *, full: bool = False, seed: int = 0) -> nn.Module:
    """A DetrForSegmentation with random weights: resnet18 and narrow, or the full DETR-R50 with COCO's 250 ids."""
    from transformers import DetrConfig, DetrForSegmentation, ResNetConfig

    torch.manual_seed(seed)
    levels = [f"stage{i}" for i in range(1, 5)]
    sizes: dict[str, object] = {"backbone_config": ResNetConfig(out_features=levels), "num_labels": 250}
    if not full:
        backbone = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", out_features=levels)
        sizes = {
            "backbone_config": backbone, "d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 8, "num_queries": 9,
            "num_labels": num_labels, "dropout": 0.0,
        }  # fmt: skip
    peer = DetrForSegmentation(DetrConfig(**sizes)).eval()
    give_each_parameter_its_own_gain(peer, seed)
    with torch.no_grad():
        for linear in (peer.bbox_attention.q_proj, peer.bbox_attention.k_proj):  # attention that is not nearly flat
            linear.weight.mul_(2)
        peer.mask_head.conv1.conv.weight[:, -8:] *= 200  # many cells share one probability
        peer.mask_head.output_conv.weight *= 2
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


def published_hybrid_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `transformers`' RTDetrV2ForObjectDetection or DFineForObjectDetection under the names of published files.

    transformers 5 renames what it reads; the heads stand in a file once, as the decoder's.
    """
    names = (
        (r"^model\.encoder\.aifi\.", "model.encoder.encoder."),
        (r"self_attn\.o_proj", "self_attn.out_proj"),
        (r"(layers\.\d+)\.mlp\.fc", r"\1.fc"),
        (r"((?:encoder\.0|decoder)\.layers\.\d+)\.mlp\.layers\.([01])", lambda m: f"{m[1]}.fc{int(m[2]) + 1}"),
    )
    out = {}
    for key, value in tensors.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        if not key.startswith(("class_embed.", "bbox_embed.")):
            out[key] = value.clone()
    return out


RESNET18 = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
HGNETS: dict[str, dict[str, object]] = {
    "hgnetv2_b0": {
        "stem_channels": [3, 16, 16], "stage_in_channels": [16, 64, 256, 512], "stage_mid_channels": [16, 32, 64, 128],
        "stage_out_channels": [64, 256, 512, 1024], "stage_num_blocks": [1, 1, 2, 1], "stage_numb_of_layers": [3] * 4,
        "use_learnable_affine_block": True, "hidden_sizes": [64, 256, 512, 1024],
    },
    "hgnetv2_b2": {
        "stem_channels": [3, 24, 32], "stage_in_channels": [32, 96, 384, 768], "stage_mid_channels": [32, 64, 128, 256],
        "stage_out_channels": [96, 384, 768, 1536], "stage_num_blocks": [1, 1, 3, 1], "stage_numb_of_layers": [4] * 4,
        "use_learnable_affine_block": True, "hidden_sizes": [96, 384, 768, 1536],
    },
    "hgnetv2_b4": {"hidden_sizes": [128, 512, 1024, 2048]},
    "hgnetv2_b5": {
        "stem_channels": [3, 32, 64], "stage_in_channels": [64, 128, 512, 1024], "stage_mid_channels": [64, 128, 256, 512],
        "stage_num_blocks": [1, 2, 5, 2], "hidden_sizes": [128, 512, 1024, 2048],
    },
}  # fmt: skip
"""Sizes of the published D-FINE's backbones, as its settings have them."""
LEVELS = ["stage2", "stage3", "stage4"]
NARROW: dict[str, object] = {
    "num_labels": 5, "d_model": 32, "encoder_hidden_dim": 32, "decoder_in_channels": [32] * 3, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_layers": 3, "num_queries": 9,
    "num_denoising": 6, "hidden_expansion": 0.5,
}  # fmt: skip


def tiny_rtdetrv2_peer(seed: int = 0, **changes: object) -> nn.Module:
    """An RTDetrV2ForObjectDetection with random weights: its ResNet-18 and narrow parts."""
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    torch.manual_seed(seed)
    backbone = RTDetrResNetConfig(**RESNET18, out_features=LEVELS)
    sizes = {**NARROW, "encoder_in_channels": [128, 256, 512], "decoder_n_points": 3, "backbone_config": backbone, **changes}
    return varied(RTDetrV2ForObjectDetection(RTDetrV2Config(**sizes)), seed)


def tiny_dfine_peer(seed: int = 0, **changes: object) -> nn.Module:
    """A DFineForObjectDetection with random weights: HGNet-v2 B0 and narrow parts."""
    from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config

    torch.manual_seed(seed)
    backbone = HGNetV2Config(**HGNETS["hgnetv2_b0"], out_features=LEVELS)
    sizes: dict[str, object] = {
        **NARROW, "encoder_in_channels": [256, 512, 1024], "decoder_n_points": [3, 6, 3], "depth_mult": 0.34,
        "backbone_config": backbone, **changes,
    }  # fmt: skip
    peer = varied(DFineForObjectDetection(DFineConfig(**sizes)), seed)
    with torch.no_grad():
        for mlp in peer.bbox_embed:  # distributions that are not nearly flat, so that layers differ
            mlp.layers[-1].weight.mul_(4)
        peer.model.decoder.query_pos_head.layers[-1].weight.mul_(10)  # positions beyond their limits
    return peer


def varied(peer: nn.Module, seed: int = 0) -> nn.Module:
    """Draws all weights and statistics anew. Batch norms are in evaluation mode, the rest trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in peer.named_parameters():
            if value.ndim == 4:
                value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
            if value.ndim == 1 and name.endswith("norm.weight"):
                value.copy_(0.7 + 0.6 * torch.rand(value.shape, generator=generator))
    kept = {name: value.clone() for name, value in peer.named_parameters() if name.endswith(("reg_scale", "decoder.up"))}
    give_each_parameter_its_own_gain(peer, seed)
    with torch.no_grad():
        for name, value in kept.items():
            peer.get_parameter(name).copy_(value)
    norms_in_evaluation(peer.train())
    give_norms_near_statistics(peer, generator)
    return peer


@torch.no_grad()
def give_norms_near_statistics(peer: nn.Module, generator: torch.Generator) -> None:
    """Running statistics of the order of what norms see, or maps would be the same everywhere after some convolutions."""

    def near(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mean, spread = inputs[0].mean((0, 2, 3)), inputs[0].std((0, 2, 3)).clamp(min=1e-3)
        norm.running_mean.copy_(mean + 0.3 * spread * torch.randn(mean.shape, generator=generator))
        norm.running_var.copy_(spread.square() * (0.6 + 0.8 * torch.rand(mean.shape, generator=generator)))

    handles = [m.register_forward_pre_hook(near) for m in peer.modules() if hasattr(m, "running_var")]
    getattr(peer, "model", peer)(whole_batch(96, 96, seed=2).pixels)
    for handle in handles:
        handle.remove()


def norms_in_evaluation(model: nn.Module) -> nn.Module:
    """Batch norms take their running statistics, whatever the model's mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def live_norms(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Lets batch norms outside of the backbone learn; their statistics, in the order of the model."""
    norms = [m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and "backbone" not in name]
    return [(norm.train().running_mean, norm.running_var) for norm in norms]


class Noised:
    """Gives a peer the noised boxes of another model; its own are drawn without noise.

    Args:
        monkeypatch: undoes it.
        module: of the peer.
        anchors: (B,Q,4) of all denoising queries.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, anchors: Tensor) -> None:
        self.own, self.anchors = module.get_contrastive_denoising_training_group, anchors
        self.content = torch.empty(0)
        monkeypatch.setattr(module, "get_contrastive_denoising_training_group", self.draw)

    def draw(self, **arguments: Any) -> tuple[object, ...]:
        self.content, _, mask, plan = self.own(**{**arguments, "label_noise_ratio": 0, "box_noise_scale": 0})
        return self.content, self.anchors.logit(), mask.to(self.content.dtype), plan


def differences(
    model: nn.Module, peer: nn.Module, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, float]:
    """{parameter that is trained: difference of its gradients as a share of the largest}; without a gradient: infinite."""
    held = dict(peer.named_parameters(remove_duplicate=False))
    state = peer.state_dict()
    gradients = {
        n: v if n not in held else torch.zeros_like(v) if held[n].grad is None else held[n].grad for n, v in state.items()
    }
    wanted, found = rename(published_hybrid_state(gradients)), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = float(wanted[name].abs().max())
            seen = parameter.grad is not None and scale > 1e-7
            found[name] = float((parameter.grad - wanted[name]).abs().max()) / scale if seen else float("inf")
    return found


def weighed(*values: Tensor) -> Tensor:
    """One number of many, in which each counts differently."""
    values = tuple(x.double() for x in values)
    return sum(((x * torch.linspace(1, 2, x.numel()).view_as(x)).sin().mean() for x in values), torch.zeros(()))


def same_predictions(predictor: Any, peer: nn.Module) -> None:
    """On a picture of coarse patches; these models take pixels 0..1 that are not normalised. A row is score, class and box."""
    patches = np.random.default_rng(0).integers(0, 256, (10, 10, 3), np.uint8)
    picture = patches.repeat(32, 0).repeat(32, 1)
    with torch.no_grad():
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
        exact, pixels = copy.deepcopy(peer).double(), pixels.double()  # so that only our own rounding is seen
        ranks = exact.model(pixels).enc_topk_logits.amax(-1)
        said = exact(pixels)
    assert (ranks[:, :-1] - ranks[:, 1:]).min() > 1e-5, "who is chosen must not hang on rounding"
    scores, index = said.logits[0].sigmoid().flatten().topk(100)
    classes = said.logits.shape[-1]
    centre, size = said.pred_boxes[0][index // classes].split(2, -1)
    wanted = torch.cat((scores[:, None], index[:, None] % classes, centre - size / 2, centre + size / 2), -1).float()
    result = predictor.predict(picture, threshold=0.0)
    found = torch.cat((result.scores[:, None], result.labels[:, None], result.boxes / 320), -1)
    assert found.shape == wanted.shape and scores.std() > 1e-3 and wanted.std(0)[2:].min() > 1e-2
    distance = torch.cdist(found, wanted, p=torch.inf)
    assert distance[linear_sum_assignment(distance)].max() <= 1e-4
