"""DINO against a plain reference and Grounding DINO's parts, with weights that went through the reader."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import published
import pytest
import torch
from peers import padded_batch
from reference_dino import MAIN, Extra, ReferenceDino, boxes, close, generators, logits, of, ours, reference
from samples import targets_of
from torch import Tensor, nn
from transformers import GroundingDinoConfig, ResNetConfig
from transformers.models.grounding_dino import modeling_grounding_dino as grounding

import queryvision
from queryvision.config import load_config
from queryvision.errors import CheckpointError
from queryvision.layers.positions import AnchorPositions, SinePositions
from queryvision.model.encoder import Flatten, map_shapes, memory_padding, valid_ratios
from queryvision.model.proposals import grid_anchors
from queryvision.model.query_model import QueryModel
from queryvision.structures import Features, Memory, Queries, QueryGroup
from queryvision.tasks.detection import dino_r50 as named_r50
from queryvision.weights import dino as reader
from queryvision.weights.reading import fill


# ---------------------------------------------------------------------------------------------------- the reference
def entering(model: QueryModel) -> list[Queries]:
    """Gets the queries of every forward pass that is still to come."""
    seen: list[Queries] = []
    model.decoder.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    return seen


@pytest.mark.parametrize("levels", [4, 5])
def test_values_and_gradients_are_those_of_a_plain_dino_with_denoising(levels: int) -> None:
    """The noise is so large that some anchors have no size: `eps` bounds their logits."""
    wanted = reference(stages=(2, 3, 4) if levels == 4 else (1, 2, 3, 4))
    model = ours(wanted, levels=levels, label_noise=0.0, box_noise=2.0)
    images, targets = padded_batch(96, 160), targets_of([[1, 4], [3, 0]])
    seen = entering(model)
    outputs = model(images, targets, generators=generators())
    plan = model.denoising.plan(targets.counts)
    anchors = seen[0].anchors[:, MAIN:]
    assert (anchors == 0).any() and plan.num_groups == 2
    said = wanted(images.pixels, images.padding, Extra(plan.of(targets["labels"]), anchors, plan.group))
    assert (said.ranks[:, :-1] - said.ranks[:, 1:]).min() > 1e-4, "who is chosen must not hang on rounding"
    pairs = [
        (logits(of(outputs, "main", True))[0], said.proposal_logits),
        (boxes(of(outputs, "main", True))[0], said.proposal_boxes),
        (logits(of(outputs, "main")), said.logits[:, :, :MAIN]),
        (boxes(of(outputs, "main")), said.boxes[:, :, :MAIN]),
        (logits(of(outputs, "denoising")), said.logits[:, :, MAIN:]),
        (boxes(of(outputs, "denoising")), said.boxes[:, :, MAIN:]),
    ]
    for mine, theirs in pairs:
        assert theirs.std(-2).mean() > 0.02, "queries must differ"
        close(mine, theirs)
    mine, theirs = (
        sum((x * torch.linspace(1, 2, x.numel()).view_as(x)).mean() for x in side) for side in zip(*pairs, strict=True)
    )
    mine.backward()
    theirs.backward()
    held = dict(wanted.named_parameters(remove_duplicate=False))
    gradients = {name: held[name].grad if name in held else value for name, value in wanted.state_dict().items()}
    renamed = reader.rename(gradients, model.heads.heads())
    for name, parameter in model.named_parameters():
        scale = renamed[name].abs().max()
        assert scale > 1e-6, f"{name}: no gradient"
        error = (parameter.grad - renamed[name]).abs().max() / scale
        assert error <= 1e-4, f"{name}: {error:.1e} of {scale:.1e}"


@torch.no_grad()
def test_inference_gives_the_last_layer_only_and_the_same() -> None:
    wanted, images = reference(), padded_batch(96, 160)
    said = wanted(images.pixels, images.padding)
    final = ours(wanted).eval()(images).final()
    assert final.shape == (1, 2, MAIN)
    close(logits(final)[0], said.logits[-1])
    close(boxes(final)[0], said.boxes[-1])


# ---------------------------------------------------------------------------------------------------- Grounding DINO's parts
def some_memory(model: QueryModel) -> Memory:
    return model.encoder(model.neck(model.backbone(padded_batch(96, 160))))


def where(memory: Memory) -> dict[str, Any]:
    shapes = list(memory.shapes)
    return {"spatial_shapes": torch.tensor(shapes), "spatial_shapes_list": shapes}


def grounding_decoder(wanted: ReferenceDino) -> nn.Module:
    """Grounding DINO's decoder with the reference's weights; its attention to the text adds nothing."""
    config = GroundingDinoConfig(
        backbone_config=ResNetConfig(), d_model=64, decoder_layers=3, decoder_attention_heads=4, decoder_ffn_dim=48,
        num_feature_levels=4, decoder_n_points=4, num_queries=MAIN, dropout=0.0, disable_custom_kernels=True,
    )  # fmt: skip
    decoder = grounding.GroundingDinoDecoder(config)
    names = {
        "norm.": "layer_norm.", "ref_point_head.": "reference_points_head.", ".norm1.": ".encoder_attn_layer_norm.",
        ".norm2.": ".self_attn_layer_norm.", ".norm3.": ".final_layer_norm.", ".cross_attn.": ".encoder_attn.",
        ".linear1.": ".fc1.", ".linear2.": ".fc2.",
    }  # fmt: skip
    state = {}
    for name, value in wanted.transformer.decoder.state_dict().items():
        if name.startswith(("class_embed", "bbox_embed")):
            continue
        for theirs, new in names.items():
            name = name.replace(theirs, new) if theirs.startswith(".") or name.startswith(theirs) else name
        if "in_proj" in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[name.replace("in_proj_", f"{part}.")] = rows
        else:
            state[name] = value
    missing, left = decoder.load_state_dict(state, strict=False)
    assert not left and all("encoder_attn_text" in name for name in missing)
    for layer in decoder.layers:
        nn.init.zeros_(layer.encoder_attn_text.out_proj.weight)
        nn.init.zeros_(layer.encoder_attn_text.out_proj.bias)
        layer.encoder_attn_text_layer_norm = nn.Identity()
    decoder.bbox_embed = wanted.bbox_embed
    return decoder


@torch.no_grad()
def test_decoder_is_grounding_dinos_without_the_text() -> None:
    wanted = reference()
    model, drawn = ours(wanted), torch.Generator().manual_seed(1)
    memory = some_memory(model)
    states = torch.randn(2, MAIN, 64, generator=drawn)
    anchors = 0.2 + 0.6 * torch.rand(2, MAIN, 4, generator=drawn)
    seen: list[tuple[Tensor, Tensor]] = []

    def ask(stage: Any, normed: Tensor, raw: Tensor, look: Any, _: Any = None) -> Any:
        seen.append((normed[:, :, 0], look.anchors))
        return model.heads.answer(stage, normed, raw, look, {}, {})[1]

    model.decoder(Queries(states[:, :, None], (QueryGroup("main", MAIN),), anchors=anchors), memory, None, ask)
    said = grounding_decoder(wanted)(
        states, memory.tokens, ~memory.padding, text_encoder_hidden_states=torch.zeros(2, 1, 64), reference_points=anchors,
        valid_ratios=memory.valid_ratios, return_dict=True, **where(memory),
    )  # fmt: skip
    for layer, (state, _) in enumerate(seen):
        close(state, said.intermediate_hidden_states[:, layer])
    for layer, (_, refined) in enumerate(seen[1:]):
        theirs = said.intermediate_reference_points[:, layer]
        assert theirs.min() > 1e-3 and theirs.max() < 1 - 1e-3, "there the two bound logits differently"
        close(refined, theirs)


@torch.no_grad()
def test_encoder_layers_are_grounding_dinos() -> None:
    wanted = reference()
    model = ours(wanted)
    features = model.neck(model.backbone(padded_batch(96, 160)))
    found = model.encoder(features)
    tokens, layers = torch.cat([m.flatten(2).mT for m in features.maps], 1), wanted.transformer.encoder.layers
    centres = grounding.GroundingDinoEncoder.get_reference_points(found.shapes, found.valid_ratios, tokens.device)
    config = GroundingDinoConfig(
        backbone_config=ResNetConfig(), d_model=64, encoder_attention_heads=4, encoder_ffn_dim=48, num_feature_levels=4,
        encoder_n_points=4, dropout=0.0, disable_custom_kernels=True,
    )  # fmt: skip
    names = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm", "linear1": "fc1", "linear2": "fc2"}
    for mine in layers:
        layer = grounding.GroundingDinoDeformableLayer(config)
        layer.load_state_dict({".".join([names.get(k, k) for k in key.split(".")]): v for key, v in mine.state_dict().items()})
        tokens = layer(tokens, ~found.padding, found.positions, centres, **where(found))[0]
    close(found.tokens, tokens)


@pytest.mark.parametrize("padded", [True, False])
def test_sine_positions_at_temperature_20_are_grounding_dinos(padded: bool) -> None:
    padding = torch.zeros(2, 7, 9, dtype=torch.bool)
    if padded:
        padding[1, 5:] = padding[1, :, 4:] = True
    config = SimpleNamespace(d_model=64, positional_embedding_temperature=20)
    wanted = grounding.GroundingDinoSinePositionEmbedding(config)(padding, ~padding).flatten(2).mT
    found = SinePositions(64, temperature=20.0)(padding if padded else None, (2, 7, 9), torch.zeros(1)).expand(2, -1, -1)
    real = ~padding.flatten(1)
    close(found[real], wanted[real], 1e-5)


def test_positions_of_anchors_are_grounding_dinos() -> None:
    torch.manual_seed(0)
    mine, theirs = AnchorPositions(64, 4), grounding.GroundingDinoMLPPredictionHead(128, 64, 64, 2)
    theirs.load_state_dict(mine.anchors.state_dict())
    anchors, ratios = torch.rand(2, 9, 4), torch.tensor([[1.0, 0.7], [0.4, 1.0]])
    sines = grounding.encode_sinusoidal_position_embedding(anchors * ratios.repeat(1, 2)[:, None], 32)
    close(mine(anchors, None, ratios)[:, :, 0], theirs(sines), 1e-5)


@torch.no_grad()
def test_the_grid_of_proposals_is_grounding_dinos() -> None:
    padding = [torch.zeros(2, h, w, dtype=torch.bool) for h, w in ((6, 64), (3, 32))]
    padding[0][1, 5:] = padding[0][1, :, 60:] = padding[1][1, :, 30:] = True
    features = Features([torch.randn(2, 8, *p.shape[1:]) for p in padding], padding)
    memory = Memory(Flatten()(features), torch.zeros(1), map_shapes(features), memory_padding(features), valid_ratios(features))
    found, valid = grid_anchors(memory)
    nothing = SimpleNamespace(enc_output=nn.Identity(), enc_output_norm=nn.Identity())
    tokens, wanted = grounding.GroundingDinoModel.generate_encoder_output_proposals(
        nothing, memory.tokens, memory.padding, memory.shapes
    )
    assert torch.equal(valid, wanted.isfinite().all(-1)) and not torch.equal(valid, ~memory.padding) and valid.any()
    close(found[valid], wanted[valid].sigmoid(), 1e-6)
    assert torch.equal(memory.tokens.masked_fill(~valid[..., None], 0.0), tokens)


# ---------------------------------------------------------------------------------------------------- look forward twice
def test_boxes_teach_the_layer_before_through_the_anchors_and_none_further_back() -> None:
    """With states cut between layers, gradients go back through anchors only."""
    model = ours()
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(lambda _m, inputs: (inputs[0].detach(), *inputs[1:]))
    main = of(model(padded_batch(96, 160)), "main")

    def reached(value: Tensor) -> list[int]:
        own = [list(layer.parameters()) for layer in model.decoder.layers]
        found = [torch.autograd.grad(value, p, retain_graph=True, allow_unused=True) for p in own]
        return [i for i, gradients in enumerate(found) if any(g is not None and bool(g.any()) for g in gradients)]

    assert [reached(boxes(main)[i].sum()) for i in range(3)] == [[0], [0, 1], [1, 2]]
    assert [reached(logits(main)[i].sum()) for i in range(3)] == [[0], [1], [2]]


# ---------------------------------------------------------------------------------------------------- published files
def stand_in(levels: int = 4) -> dict[str, Tensor]:
    return published.with_copies(published.stand_ins(published.dino(levels)), shared=True)


@pytest.mark.parametrize("levels", [4, 5])
def test_all_tensors_of_a_published_file_have_a_place(levels: int, tmp_path: Path) -> None:
    path = tmp_path / "some.pth"
    torch.save({"model": stand_in(levels), "epoch": 11, "args": argparse.Namespace(num_queries=900)}, path)
    found = reader.read(str(path))
    assert found["model"] == {"name": "dino_r50", "num_levels": levels, "num_queries": 900}
    assert len(found["classes"]) == 91 and found["classes"].names[1] == "person"
    preset = load_config("detection", found["config"]).model
    assert (preset["name"], preset.get("num_levels", 4)) == ("dino_r50", levels)
    with torch.device("meta"):
        model = named_r50(91, num_levels=levels)
    heads = model.heads.heads()
    assert (heads["labels"].cost_weight, heads["labels"].weights, heads["boxes"].weights) == (
        2,
        {"class": 1},
        {"l1": 5, "giou": 2},
    )
    renamed = reader.rename(found["state"], heads)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_a_file_of_published_size_converts(tmp_path: Path) -> None:
    path, state = tmp_path / "checkpoint0011_5scale.pth", stand_in(5)
    torch.save({"model": state}, path)
    predictor = queryvision.load(queryvision.convert(path, "dino", tmp_path / "ours.pt"))
    assert predictor.loaded.config.name == "dino_r50_5scale_coco" and predictor.classes.ids == tuple(range(91))
    assert predictor.model.backbone.strides == (4, 8, 16, 32) and predictor.model.num_queries == 900
    for theirs, own in (
        ("transformer.decoder.layers.3.norm1.weight", "decoder.layers.3.norm2.weight"),
        ("transformer.enc_out_bbox_embed.layers.2.bias", "heads.boxes.mlp.proposals.layers.2.bias"),
    ):
        assert torch.equal(predictor.model.state_dict()[own], state[theirs])


def test_averaged_weights_are_taken_where_there_are_any(tmp_path: Path) -> None:
    path, state = tmp_path / "some.pth", stand_in()
    averaged = {name: value + 0.5 for name, value in state.items()}
    torch.save({"model": state, "ema_model": averaged}, path)
    assert torch.equal(reader.read(str(path))["state"]["label_enc.weight"], averaged["label_enc.weight"])


def refused(tmp_path: Path, content: object, reason: str) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=reason) as caught:
        reader.read(str(path))
    assert "\n" not in str(caught.value)


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    state = stand_in()
    rest = {k: v for k, v in state.items() if "backbone" not in k}
    nothing = torch.zeros(1)
    refused(tmp_path, {"model": {"a": nothing}}, "no checkpoint of IDEA-Research/DINO")
    refused(tmp_path, {"model": published.stand_ins(published.deformable_detr(True, True))}, "lacks transformer.tgt_embed")
    refused(tmp_path, {"model": rest | {"backbone.0.patch_embed.proj.weight": nothing}}, "a Swin transformer")
    refused(tmp_path, {"model": rest | {"backbone.0.downsample_layers.0.0.weight": nothing}}, "a ConvNeXt")
    refused(tmp_path, {"model": rest}, "an unknown one")
    refused(tmp_path, {"model": state | {"transformer.level_embed": torch.zeros(3, 256)}}, "has 3 levels")
    refused(tmp_path, {"model": stand_in(5) | {"transformer.level_embed": torch.zeros(4, 256)}}, "the finest of 256 channels")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("class_embed.2.weight", "is no copy of"),
        ("transformer.decoder.bbox_embed.1.layers.0.bias", "is no copy of"),
        ("transformer.decoder.norm.bias", "missing .*decoder.norm.bias"),
    ],
)
def test_what_differs_or_is_missing_is_an_error(name: str, reason: str) -> None:
    state = reference().state_dict()
    changed = {**state, name: state[name] + 1} if "copy" in reason else {k: v for k, v in state.items() if k != name}
    model = ours()
    with pytest.raises(CheckpointError, match=reason):
        fill(model, reader.rename(changed, model.heads.heads()))


def test_labels_of_denoising_are_the_first_rows_and_must_be_enough() -> None:
    state = reference().state_dict()
    assert torch.equal(reader.translate(state)["label_enc.weight"], state["label_enc.weight"][:5])
    with pytest.raises(CheckpointError, match="has 4 rows for 5 classes"):
        reader.translate({**state, "label_enc.weight": torch.zeros(4, 64)})
