"""Mask2Former against `transformers`' Mask2FormerForUniversalSegmentation with random weights, each with its own gain."""

from __future__ import annotations

import re

import pytest
import torch
from peers import give_each_parameter_its_own_gain, padded_batch
from torch import Tensor, nn

from queryvision.criterion import Criterion
from queryvision.head import Steering
from queryvision.matching import match
from queryvision.model import builders
from queryvision.model.query_model import QueryModel
from queryvision.structures import ImageBatch, Round, Targets
from queryvision.tasks.detection import LabelHead
from queryvision.tasks.instance import MaskHead

CLASSES, POINTS, LEVELS, HEADS = 5, 112, 3, 4
STEERING = Steering(hidden="masks", quality=("masks",))
LAYER = {
    "self_attn_layer_norm": "norm1",
    "cross_attn_layer_norm": "norm2",
    "final_layer_norm": "norm3",
    "cross_attn.": "cross_attn.attention.",
    "fc1": "ffn.linear1",
    "fc2": "ffn.linear2",
}
RULES = (
    (r"^model\.pixel_level_module\.encoder\.embedder\.embedder\.convolution", "backbone.body.conv1"),
    (r"^model\.pixel_level_module\.encoder\.embedder\.embedder\.normalization", "backbone.body.bn1"),
    (
        r"^model\.pixel_level_module\.encoder\.encoder\.stages\.(\d)\.layers\.(\d)\.",
        lambda m: f"backbone.body.layer{int(m[1]) + 1}.{m[2]}.",
    ),
    (r"shortcut\.convolution", "downsample.0"),
    (r"shortcut\.normalization", "downsample.1"),
    (r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}"),
    (r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}"),
    (r"^model\.pixel_level_module\.decoder\.level_embed", "encoder.levels"),
    (r"^model\.pixel_level_module\.decoder\.input_projections\.(\d)", lambda m: f"neck.levels.{LEVELS - 1 - int(m[1])}"),
    (r"^model\.pixel_level_module\.decoder\.encoder\.(layers\.\d)\.self_attn_layer_norm", r"encoder.\1.norm1"),
    (r"^model\.pixel_level_module\.decoder\.encoder\.(layers\.\d)\.final_layer_norm", r"encoder.\1.norm2"),
    (r"^model\.pixel_level_module\.decoder\.encoder\.(layers\.\d)\.fc", r"encoder.\1.ffn.linear"),
    (r"^model\.pixel_level_module\.decoder\.encoder\.", "encoder."),
    (r"^model\.pixel_level_module\.decoder\.mask_projection", "pixels.project"),
    (r"^model\.pixel_level_module\.decoder\.adapter_1\.0", "pixels.lateral.conv"),
    (r"^model\.pixel_level_module\.decoder\.adapter_1\.1", "pixels.lateral.norm"),
    (r"^model\.pixel_level_module\.decoder\.layer_1\.0", "pixels.output.conv"),
    (r"^model\.pixel_level_module\.decoder\.layer_1\.1", "pixels.output.norm"),
    (r"^model\.transformer_module\.queries_embedder", "queries.positions"),
    (r"^model\.transformer_module\.queries_features", "queries.states"),
    (r"^model\.transformer_module\.level_embed\.weight", "pixels.marks"),
    (r"^model\.transformer_module\.decoder\.layernorm", "decoder.norm"),
    (r"^model\.transformer_module\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0", r"heads.masks.mlp.layers.0.layers.\1"),
    (r"^model\.transformer_module\.decoder\.", "decoder."),
    (r"^class_predictor", "heads.labels.linear.layers.0"),
)


def tiny_peer(seed: int = 0, **changes: object) -> nn.Module:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

    stages = [f"stage{i}" for i in range(1, 5)]
    sizes = {
        "backbone_config": ResNetConfig(
            hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", out_features=stages
        ),
        "feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64, "encoder_feedforward_dim": 64, "dim_feedforward": 96,
        "encoder_layers": 2, "decoder_layers": 5, "num_attention_heads": HEADS, "num_queries": 9, "num_labels": CLASSES,
        "train_num_points": POINTS,
    }  # fmt: skip
    torch.manual_seed(seed)
    peer = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**{**sizes, **changes})).eval()
    give_each_parameter_its_own_gain(peer, seed)
    with torch.no_grad():
        peer.model.transformer_module.queries_features.weight.mul_(4)
        peer.get_parameter("model.transformer_module.decoder.mask_predictor.mask_embedder.2.0.weight").mul_(3)
    return peer


def coarse_last(name: str, value: Tensor) -> Tensor:
    """Their levels go from coarse to fine, ours from fine to coarse."""
    if name.endswith(("encoder.levels", "pixels.marks")):
        return value.flip(0)
    if "sampling_offsets" in name or "attention_weights" in name:
        shape = (HEADS, LEVELS, -1, *value.shape[1:])
        return value.view(shape).flip(1).reshape(value.shape)
    return value


def our_state(peer: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for key, value in peer.state_dict().items():
        if key.startswith("criterion") or key.endswith("num_batches_tracked"):
            continue
        for pattern, replacement in RULES:
            key = re.sub(pattern, replacement, key)
        if key.startswith("decoder.layers"):
            for theirs, own in LAYER.items():
                key = key.replace(theirs, own)
        attention = re.fullmatch(r"(.*self_attn)\.([qkv])_proj\.(\w+)", key)
        if attention:
            packed.setdefault(f"{attention[1]}.in_proj_{attention[3]}", {})[attention[2]] = value
        else:
            state[key] = coarse_last(key, value)
    return state | {key: torch.cat([parts[c] for c in "qkv"]) for key, parts in packed.items()}


def ours(peer: nn.Module, see_padding: bool = True) -> QueryModel:
    model = builders.mask2former(
        lambda fit: [LabelHead(fit, CLASSES, cost=2.0, weight=2.0), MaskHead(fit, points=POINTS)], STEERING,
        backbone="resnet18", width=64, num_queries=9, encoder_layers=2, decoder_layers=4, num_heads=HEADS, ffn_width=96,
        encoder_ffn_width=64, see_padding=see_padding,
    )  # fmt: skip
    model.load_state_dict(our_state(peer))
    return model.train()


def masks_of_all(round: Round) -> Tensor:
    """(S,B,Q,h,w)."""
    embedding = round.answers["masks"]["embedding"]
    return torch.einsum("sbqe,behw->sbqhw", embedding, round.contexts["masks"].pixels.map)


@torch.no_grad()
@pytest.mark.parametrize("padded", [True, False])
def test_every_layer(padded: bool) -> None:
    peer = tiny_peer()
    images = padded_batch(128, 192)
    if not padded:
        images = ImageBatch(images.pixels, torch.zeros_like(images.padding), False, torch.tensor([[128, 192]] * 2))
    wanted = peer(images.pixels, pixel_mask=(~images.padding).long(), output_auxiliary_logits=True)
    round = ours(peer)(images).rounds[0]
    assert [stage.kind for stage in round.stages] == ["initial", *["layer"] * 4]
    found = masks_of_all(round)
    assert 0.05 < (found > 0).float().mean() < 0.95 and found.std(2).mean() > 0.1, "masks must differ, and hide something"
    for stage, auxiliary in enumerate(wanted.auxiliary_logits):
        torch.testing.assert_close(
            round.answers["labels"]["logits"][stage], auxiliary["class_queries_logits"], atol=1e-4, rtol=0
        )
        torch.testing.assert_close(found[stage], auxiliary["masks_queries_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(round.answers["labels"]["logits"][-1], wanted.class_queries_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(found[-1], wanted.masks_queries_logits, atol=1e-4, rtol=0)


def targets_for(images: ImageBatch) -> Targets:
    """Blobs anywhere on the canvas, three on the first image and two on the second."""
    generator = torch.Generator().manual_seed(3)
    batch, height, width = images.padding.shape
    masks = torch.zeros(batch, 3, height, width, dtype=torch.bool)
    for image, count in enumerate((3, 2)):
        for target in range(count):
            y, x = (int(torch.randint(0, side // 2, (), generator=generator)) for side in (height, width))
            masks[image, target, y : y + height // 3, x : x + width // 4] = True
    valid = torch.tensor([[True, True, True], [True, True, False]])
    values = {
        "labels": torch.randint(0, CLASSES, (batch, 3), generator=generator),
        "boxes": torch.rand(batch, 3, 4, generator=generator),
        "areas": torch.ones(batch, 3),
        "masks": masks,
    }
    return Targets(
        values, (3, 2), valid, {name: valid for name in values}, {name: (3, 2) for name in values},
        torch.ones(batch, CLASSES, dtype=torch.bool), True, images.sizes, torch.zeros(batch, 0, 4),
    )  # fmt: skip


def same_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mask gets the same points, in both programs, whatever the shape they are drawn in."""

    def rand(*shape: int, **_: object) -> Tensor:
        *rows, count, pair = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        points = torch.empty(count, pair).uniform_(generator=torch.Generator().manual_seed(count))
        return points.expand(*rows, count, pair).clone()

    monkeypatch.setattr(torch, "rand", rand)


@pytest.mark.parametrize("seed", [0, 1])
def test_pairs_losses_and_gradients_with_the_same_points(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    peer, images = tiny_peer(seed), padded_batch(128, 192)
    model, targets = ours(peer), targets_for(images)
    same_points(monkeypatch)
    labels = [targets["labels"][i, :n] for i, n in enumerate(targets.counts)]
    masks = [targets["masks"][i, :n].float() for i, n in enumerate(targets.counts)]
    found_pairs: list[list[tuple[Tensor, Tensor]]] = []
    solve = peer.criterion.matcher.forward
    monkeypatch.setattr(peer.criterion.matcher, "forward", lambda *a, **k: found_pairs.append(pairs := solve(*a, **k)) or pairs)
    wanted = peer(images.pixels, mask_labels=masks, class_labels=labels)
    outputs = model(images)
    criterion = Criterion(model.heads.heads(), STEERING)
    losses = criterion(outputs, targets)
    by_stage, _ = match(outputs.rounds, model.heads.heads(), targets)
    stages = len(outputs.rounds[0].stages)
    for place, pairs in enumerate(found_pairs):  # the last layer first
        stage = stages - 1 if place == 0 else place - 1
        for image, (query, target) in enumerate(pairs):
            mine = (by_stage[0].stage == stage) & (by_stage[0].image == image)
            assert by_stage[0].query[mine].tolist() == query.tolist() and by_stage[0].target[mine].tolist() == target.tolist()
    torch.testing.assert_close(losses.total.detach(), wanted.loss.detach().view(()), atol=1e-4, rtol=0)
    terms = peer.criterion(
        wanted.masks_queries_logits, wanted.class_queries_logits, masks, labels
    )  # of the last layer, unweighted
    stage_terms = losses.stages[0]
    for own, theirs, weight in (
        ("labels.class", "loss_cross_entropy", 2.0), ("masks.entropy", "loss_mask", 5.0), ("masks.dice", "loss_dice", 5.0),
    ):  # fmt: skip
        torch.testing.assert_close(stage_terms[own][-1].detach(), terms[theirs].detach() * weight, atol=1e-4, rtol=0)
    losses.total.backward()
    wanted.loss.sum().backward()
    predictor, pixels = "model.transformer_module.decoder.mask_predictor", "model.pixel_level_module"
    for own, theirs in (
        ("heads.masks.mlp.layers.0.layers.2.weight", f"{predictor}.mask_embedder.2.0.weight"),
        ("pixels.project.weight", f"{pixels}.decoder.mask_projection.weight"),
        ("queries.states.weight", "model.transformer_module.queries_features.weight"),
        ("neck.levels.0.0.weight", f"{pixels}.decoder.input_projections.2.0.weight"),
    ):  # fmt: skip
        mine, peers = model.get_parameter(own).grad, peer.get_parameter(theirs).grad
        torch.testing.assert_close(mine, peers, atol=1e-3 * float(peers.abs().max()), rtol=2e-3)


@torch.no_grad()
def test_padding_can_be_masked() -> None:
    """With `see_padding=False` the memory knows its padding, and points are drawn in the image only."""
    peer, images = tiny_peer(), padded_batch(128, 192)
    model = ours(peer, see_padding=False)
    outputs = model(images)
    hidden = model.encoder(model.neck(model.backbone(images))).padding
    assert hidden is not None and hidden.any()
    assert outputs.rounds[0].contexts["masks"].shares[1].tolist() == pytest.approx([115 / 192, 89 / 128], abs=1e-6)
