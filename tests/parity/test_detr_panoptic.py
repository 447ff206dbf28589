"""DETR's masks against `transformers`' DetrForSegmentation, with weights that went through the reader of published files."""

from __future__ import annotations

from pathlib import Path

import published
import pytest
import torch
from peers import padded_batch, peer_targets, published_panoptic_state, tiny_panoptic_peer
from samples import targets_of
from torch import Tensor

import queryvision
from queryvision.criterion import Criterion
from queryvision.data.coco_classes import COCO_NAMES, COCO_STUFF
from queryvision.errors import CheckpointError, ConfigError
from queryvision.head import Fit
from queryvision.matching import match
from queryvision.model import builders
from queryvision.model.query_model import QueryModel
from queryvision.registry import resolve_task
from queryvision.structures import Targets
from queryvision.tasks.detection import BoxHead, LabelHead
from queryvision.tasks.panoptic import AttentionMaskHead
from queryvision.tasks.panoptic import attention_masks as module
from queryvision.weights import detr as reader
from queryvision.weights.reading import fill

CLASSES, QUERIES, WIDTH, HEADS = 5, 9, 64, 8


def ours(peer: torch.nn.Module) -> QueryModel:
    model = builders.detr(
        lambda fit: [LabelHead(fit, CLASSES), BoxHead(fit), AttentionMaskHead(fit, num_heads=HEADS)],
        backbone="resnet18", attention_maps=True, width=WIDTH, num_queries=QUERIES, encoder_layers=2, decoder_layers=3,
        num_heads=HEADS, ffn_width=64, dropout=0.0,
    )  # fmt: skip
    state = {name.removeprefix(reader.PREFIX): value for name, value in published_panoptic_state(peer).items()}
    fill(model, reader.rename(state, model.heads.heads()))
    return model


def masked_targets() -> Targets:
    """Two images, four masks and one, of the size of the padded batch."""
    targets = targets_of([[1, 2, 2, 0], [4]])
    drawn = torch.rand(2, 4, 6, 10, generator=torch.Generator().manual_seed(4)) > 0.6
    masks = drawn.repeat_interleave(16, 2).repeat_interleave(16, 3) & targets.valid[..., None, None]
    targets.values["masks"], targets.has["masks"], targets.num_with["masks"] = masks, targets.valid.clone(), targets.counts
    return targets


@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 160), (90, 150)])
def test_masks_labels_and_boxes_of_a_padded_batch(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    peer, images = tiny_panoptic_peer(), padded_batch(*size)
    said = peer(images.pixels, pixel_mask=(~images.padding).long())
    final = ours(peer).eval()(images).final()
    assert final.shape == (1, 2, QUERIES)
    spread = said.pred_masks.std(1).mean()
    assert spread > 0.01 and said.logits.std(1).mean() > 1e-3, "queries must differ, or a wrong order would pass"
    for found, wanted in (
        (final.answers["masks"]["maps"][0], said.pred_masks),
        (final.answers["labels"]["logits"][0], said.logits),
        (final.answers["boxes"]["boxes"][0], said.pred_boxes),
    ):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_losses_and_gradients_and_that_masks_take_no_part_in_matching() -> None:
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    peer, images, targets = tiny_panoptic_peer(), padded_batch(96, 160), masked_targets()
    model = ours(peer).train()
    outputs = model(images)
    assert [sorted(r.answers) for r in outputs.rounds] == [["boxes", "labels"], ["boxes", "labels", "masks"]]
    heads = model.heads.heads()
    assert heads["masks"].cost(outputs.rounds[1], targets, None) is None
    found = match(outputs.rounds, heads, targets)[0][1]
    losses = Criterion(heads)(outputs, targets)
    said = peer(images.pixels, pixel_mask=(~images.padding).long())
    theirs = {"logits": said.logits, "pred_boxes": said.pred_boxes, "pred_masks": said.pred_masks}
    rows = [{**row, "masks": targets["masks"][i, : targets.counts[i]].float()} for i, row in enumerate(peer_targets(targets))]
    matcher = HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    wanted = {(i, int(q), int(t)) for i, (qs, ts) in enumerate(matcher(theirs, rows)) for q, t in zip(qs, ts, strict=True)}
    assert {(int(i), int(q), int(t)) for i, q, t in zip(found.image, found.query, found.target, strict=True)} == wanted
    terms = ImageLoss(matcher, num_classes=CLASSES, eos_coef=0.1, losses=["masks"])(theirs, rows)
    for own, name in (("masks.focal", "loss_mask"), ("masks.dice", "loss_dice")):
        torch.testing.assert_close(losses.stages[1][own][0], terms[name], atol=1e-5, rtol=1e-4)
    (losses.stages[1]["masks.focal"] + losses.stages[1]["masks.dice"]).sum().backward()
    (terms["loss_mask"] + terms["loss_dice"]).backward()
    gradients = {n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in peer.named_parameters()}
    state = {n.removeprefix(reader.PREFIX): v for n, v in published_panoptic_state(gradients).items()}
    renamed, seen = reader.rename(state, heads), 0
    for name, parameter in model.named_parameters():
        scale = float(renamed[name].abs().max())
        if parameter.requires_grad and scale > 1e-7 and not name.startswith(("heads.labels", "heads.boxes")):
            assert float((parameter.grad - renamed[name]).abs().max()) <= 2e-3 * scale, name
            seen += 1
    assert seen > 60


def test_an_image_without_targets_keeps_the_maps_in_the_graph() -> None:
    model, targets = ours(tiny_panoptic_peer()).train(), targets_of([[], []])
    targets.values["masks"] = torch.zeros(2, 0, 96, 160, dtype=torch.bool)
    targets.has["masks"], targets.num_with["masks"] = targets.valid.clone(), targets.counts
    total = Criterion(model.heads.heads())(model(padded_batch(96, 160)), targets).total
    total.backward()
    assert total.isfinite()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []


@torch.no_grad()
def test_results_are_masks_of_one_map_each() -> None:
    model, images = ours(tiny_panoptic_peer()).eval(), padded_batch(96, 160)
    final, sizes = model(images).final(), torch.tensor([[48, 80], [134, 192]])
    head = model.heads["masks"]
    queries = torch.tensor([[3, 0, 3], [8, 1, 2]])
    sources = head.masks_of(final, queries, sizes)
    maps = final.answers["masks"]["maps"][0]
    assert torch.equal(sources[0].logits(), maps[0, [3, 0, 3]])
    height, width = 17, 24  # of 67 x 96 pixels, in cells of 4
    assert torch.equal(sources[1].logits(), maps[1, [8, 1, 2], :height, :width])
    assert sources[1].build().shape == (3, 134, 192)
    inside = maps[0, 3] > 0
    certain = head.certainty(final, queries)
    assert certain.shape == (2, 3)
    torch.testing.assert_close(certain[0, 0], maps[0, 3].sigmoid()[inside].mean(), atol=1e-5, rtol=0)
    assert (head.merging, head.least) == ("detr", 0.85)


def test_the_architecture_decides_which_head_makes_masks() -> None:
    task = resolve_task("panoptic")
    make = task.make_heads(4, {"attention_masks": {"least": 0.5}, "masks": {"least": 0.6}})
    kinds = {bool(fit.maps): {h.name: h for h in make(fit)} for fit in (Fit(32), Fit(32, maps=(8, 16, 32, 32)))}
    assert isinstance(kinds[True]["masks"], AttentionMaskHead) and kinds[True]["masks"].least == 0.5
    assert not isinstance(kinds[False]["masks"], AttentionMaskHead) and kinds[False]["masks"].least == 0.6
    assert "attention_masks" not in kinds[True]


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ConfigError, match="take detr_masks_r50"):
        AttentionMaskHead(Fit(32))
    with pytest.raises(ConfigError, match="must divide the width 32"):
        AttentionMaskHead(Fit(32, maps=(8, 16, 32, 32)), num_heads=5)
    with pytest.raises(ConfigError, match=r"model\.stride = 4"):
        builders.detr(lambda fit: [BoxHead(fit)], stride=4, attention_maps=True)


# ---------------------------------------------------------------------------------------------------- published files
def test_all_tensors_of_a_published_file_have_a_place(tmp_path: Path) -> None:
    path, state = tmp_path / "detr-r50-panoptic-00000000.pth", published.stand_ins(published.detr_panoptic())
    torch.save({"model": state}, path)
    found = reader.read(str(path))
    assert (found["task"], found["config"]) == ("panoptic", "detr_r50_panoptic_coco")
    assert found["model"] == {"name": "detr_masks_r50", "dc5": False, "num_queries": 100}
    with torch.device("meta"):
        model = builders.detr_masks_r50(resolve_task("panoptic").make_heads(250, {}))
    renamed = reader.rename(found["state"], model.heads.heads())
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert len({float(value.flatten()[0]) for value in renamed.values()}) == len(state)
    lands = {
        "heads.masks.attention.k_linear.bias": "bbox_attention.k_linear.bias",
        "heads.masks.finer.adapter2.weight": "mask_head.adapter2.weight",
        "heads.labels.linear.layers.0.weight": "detr.class_embed.weight",
        "backbone.body.layer3.5.conv2.weight": "detr.backbone.0.body.layer3.5.conv2.weight",
    }
    assert all(torch.equal(renamed[own], state[name]) for own, name in lands.items())


def test_a_file_of_published_size_converts_and_predicts(tmp_path: Path) -> None:
    path = tmp_path / "detr-r50-dc5-panoptic-00000000.pth"
    state = published_panoptic_state(tiny_panoptic_peer(full=True))
    torch.save({"model": state}, path)
    predictor = queryvision.load(queryvision.convert(path, "detr", tmp_path / "ours.pt"))
    classes, loaded = predictor.classes, predictor.loaded
    assert loaded.task.name == "panoptic" and loaded.config.model["name"] == "detr_masks_r50"
    assert predictor.model.backbone.strides == (4, 8, 16, 16)
    assert len(classes) == 250 and classes.ids == tuple(range(250))
    assert {i: n for i, n in enumerate(classes.names) if not n.startswith("unused")} == COCO_NAMES | COCO_STUFF
    assert classes.things == tuple(i <= 90 for i in range(250))
    assert isinstance(predictor.model.heads["masks"], AttentionMaskHead)
    for name, own in (("mask_head.gn5.bias", "heads.masks.finer.gn5.bias"), ("detr.input_proj.bias", "neck.levels.0.bias")):
        assert torch.equal(predictor.model.state_dict()[own], state[name])


@pytest.mark.parametrize("lacks", ["mask_head.out_lay.weight", "mask_head.lay3.weight", "detr.transformer.decoder.norm.weight"])
def test_a_file_that_lacks_something_is_refused(lacks: str, tmp_path: Path) -> None:
    state: dict[str, Tensor] = published.stand_ins(published.detr_panoptic())
    torch.save({"model": {k: v for k, v in state.items() if k != lacks}}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError) as caught:
        queryvision.convert(tmp_path / "less.pth", "detr", tmp_path / "ours.pt")
    own = "heads.masks.finer.lay3.weight" if "lay3" in lacks else lacks.removeprefix("detr.")
    assert own in str(caught.value) and "\n" not in str(caught.value)
