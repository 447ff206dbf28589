"""DETR against `transformers`' DetrForObjectDetection, with weights that went through the reader of published checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from peers import every_layer, published_detr_state, tiny_peer
from samples import targets_of
from torch import Tensor

from queryvision.criterion import Criterion
from queryvision.errors import CheckpointError
from queryvision.matching import match
from queryvision.model import builders
from queryvision.model.query_model import QueryModel
from queryvision.structures import ImageBatch, Outputs, Round, Stage, Targets
from queryvision.tasks.detection import BoxHead, LabelHead
from queryvision.tasks.detection import detr_r50 as named_r50
from queryvision.weights import detr as reader
from queryvision.weights.reading import fill


def ours(peer: torch.nn.Module, num_classes: int = 5) -> QueryModel:
    model = builders.detr(
        lambda fit: [LabelHead(fit, num_classes), BoxHead(fit)],
        backbone="resnet18", width=32, num_queries=9, encoder_layers=2, decoder_layers=3, num_heads=4, ffn_width=64,
        dropout=0.0,
    )  # fmt: skip
    fill(model, reader.rename(published_detr_state(peer), model.heads.heads()))
    return model


def padded_batch(height: int, width: int) -> ImageBatch:
    """Two images of different size."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, height, width, generator=generator)
    padding = torch.zeros(2, height, width, dtype=torch.bool)
    padding[1, int(height * 0.7) :] = True
    padding[1, :, int(width * 0.6) :] = True
    sizes = torch.tensor([[height, width], [int(height * 0.7), int(width * 0.6)]])
    return ImageBatch(pixels.masked_fill(padding[:, None], 0), padding, True, sizes)


def assert_same(model: QueryModel, peer: torch.nn.Module, images: ImageBatch) -> None:
    with torch.no_grad():
        answers = model.train()(images).rounds[0].answers
    logits, boxes = every_layer(peer, images.pixels, images.padding)
    spread = logits.std(2).mean()
    assert spread > 1e-3, "queries must differ, or a wrong order would pass"
    torch.testing.assert_close(answers["labels"]["logits"], logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(answers["boxes"]["boxes"], boxes, atol=1e-4, rtol=0)


def test_every_layer_of_a_tiny_model_in_a_padded_batch() -> None:
    peer = tiny_peer()
    assert_same(ours(peer), peer, padded_batch(96, 160))


def test_every_layer_of_full_size_detr_r50_in_a_padded_batch() -> None:
    peer = tiny_peer(num_labels=91, full=True)
    model = named_r50(91)
    fill(model, reader.rename(published_detr_state(peer), model.heads.heads()))
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    assert_same(model, peer, padded_batch(192, 256))


def test_inference_gives_the_last_layer_only_and_the_same() -> None:
    peer = tiny_peer()
    model, images = ours(peer).eval(), padded_batch(96, 160)
    with torch.no_grad():
        outputs = model(images)
        wanted = peer(images.pixels, pixel_mask=(~images.padding).long())
    assert outputs.rounds[0].shape[0] == 1
    torch.testing.assert_close(outputs.final().answers["labels"]["logits"][0], wanted.logits, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------- matcher and losses
def random_outputs(stages: int, batch: int, queries: int, classes: int, seed: int) -> tuple[Outputs, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(stages, batch, queries, classes + 1, generator=generator)
    boxes = torch.rand(stages, batch, queries, 4, generator=generator) * 0.5 + 0.1
    answers = {"labels": {"logits": logits.requires_grad_()}, "boxes": {"boxes": boxes.requires_grad_()}}
    final = {head: {name: value[-1] for name, value in answer.items()} for head, answer in answers.items()}
    stage = tuple(Stage("layer", i, i == stages - 1) for i in range(stages))
    return Outputs([Round("main", stage, answers, {}, final)]), logits, boxes


def peer_targets(targets: Targets) -> list[dict[str, Tensor]]:
    rows = []
    for index, count in enumerate(targets.counts):
        rows.append({"class_labels": targets["labels"][index, :count], "boxes": targets["boxes"][index, :count]})
    return rows


@pytest.mark.parametrize("labels", [[[1, 2, 2, 0], [4]], [[], [3, 3, 1]], [[0], [1], list(range(5)) * 3]])
def test_matcher_and_every_loss_term(labels: list[list[int]]) -> None:
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    targets = targets_of(labels)
    outputs, logits, boxes = random_outputs(4, len(labels), 12, 5, seed=3)
    heads = {"labels": LabelHead(8, 5), "boxes": BoxHead(8)}
    found = match(outputs.rounds, heads, targets)[0][0]
    losses = Criterion(heads)(outputs, targets)
    matcher = HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    judge = ImageLoss(matcher, num_classes=5, eos_coef=0.1, losses=["labels", "boxes"])
    for stage in range(4):
        said = {"logits": logits[stage], "pred_boxes": boxes[stage]}
        indices = matcher(said, peer_targets(targets))
        wanted = {(i, int(q), int(t)) for i, (qs, ts) in enumerate(indices) for q, t in zip(qs, ts, strict=True)}
        mine = {
            (int(i), int(q), int(t))
            for s, i, q, t in zip(found.stage, found.image, found.query, found.target, strict=True)
            if s == stage
        }
        assert mine == wanted
        terms = judge(said, peer_targets(targets))
        for ours_, theirs, weight in (
            ("labels.class", "loss_ce", 1),
            ("boxes.l1", "loss_bbox", 5),
            ("boxes.giou", "loss_giou", 2),
        ):
            torch.testing.assert_close(losses.stages[0][ours_][stage], weight * terms[theirs], atol=1e-5, rtol=1e-5)


def test_gradients_of_the_total_loss() -> None:
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    targets = targets_of([[1, 2, 2, 0], [4]])
    outputs, logits, boxes = random_outputs(3, 2, 12, 5, seed=5)
    Criterion({"labels": LabelHead(8, 5), "boxes": BoxHead(8)})(outputs, targets).total.backward()
    mine = logits.grad.clone(), boxes.grad.clone()
    logits.grad = boxes.grad = None
    judge = ImageLoss(HungarianMatcher(1, 5, 2), num_classes=5, eos_coef=0.1, losses=["labels", "boxes"])
    total = torch.zeros(())
    for stage in range(3):
        terms = judge({"logits": logits[stage], "pred_boxes": boxes[stage]}, peer_targets(targets))
        total = total + terms["loss_ce"] + 5 * terms["loss_bbox"] + 2 * terms["loss_giou"]
    total.backward()
    torch.testing.assert_close(mine[0], logits.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mine[1], boxes.grad, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- published files
@pytest.fixture(scope="module")
def published_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the layout of detr-r50-e632da11.pth and random weights."""
    path = tmp_path_factory.mktemp("published") / "detr-r50-00000000.pth"
    state = published_detr_state(tiny_peer(num_labels=91, full=True))
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4)}, path)
    return path


def test_convert_gives_a_checkpoint_of_ours_with_the_coco_classes(published_file: Path, tmp_path: Path) -> None:
    import queryvision

    out = queryvision.convert(str(published_file), "detr", str(tmp_path / "detr_r50.pt"))
    predictor = queryvision.load(out)
    assert len(predictor.classes) == 91
    assert predictor.classes.names[1] == "person" and predictor.classes.names[90] == "toothbrush"
    assert predictor.classes.ids == tuple(range(91))
    assert predictor.model.heads["labels"].linear.layers[0].out_features == 92
    images = padded_batch(128, 96)
    peer = tiny_peer(num_labels=91, full=True)
    with torch.no_grad():
        logits = predictor.model(images).final().answers["labels"]["logits"][0]
        wanted = peer(images.pixels, pixel_mask=(~images.padding).long()).logits
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_every_variant_converts(tmp_path: Path) -> None:
    import queryvision

    for name, builder in (("detr_r50", builders.detr_r50), ("detr_r101", builders.detr_r101)):
        for dc5 in (False, True):
            model = builder(lambda fit: [LabelHead(fit, 91), BoxHead(fit)], dc5=dc5)
            path = tmp_path / f"{name}{'-dc5' if dc5 else ''}.pth"
            torch.save({"model": published_names(model)}, path)
            loaded = queryvision.load(queryvision.convert(path, "detr", tmp_path / f"{path.stem}.pt"))
            config = loaded.loaded.config.model
            assert (config["name"], config["dc5"], loaded.model.backbone.strides) == (name, dc5, (16 if dc5 else 32,))
            for key, value in model.state_dict().items():
                assert torch.equal(value, loaded.model.state_dict()[key]), key


def published_names(model: QueryModel) -> dict[str, Tensor]:
    """Our state dict under the published names, by turning the reader's answer around."""
    theirs = published_detr_state(tiny_peer(num_labels=91, full=True))
    ours_of = {key: next(iter(reader.rename({key: value}, model.heads.heads()))) for key, value in theirs.items()}
    deeper = [key for key in model.state_dict() if key not in ours_of.values() and "layer3" in key]
    names = {ours: theirs for theirs, ours in ours_of.items()} | {k: k.replace("backbone.", "backbone.0.", 1) for k in deeper}
    return {names[key]: value for key, value in model.state_dict().items()}


def test_the_reader_tells_r50_r101_and_dc5_apart(published_file: Path, tmp_path: Path) -> None:
    assert reader.read(str(published_file))["model"] == {"name": "detr_r50", "dc5": False, "num_queries": 100}
    named = tmp_path / "detr-r50-dc5-0.pth"
    named.symlink_to(published_file)
    assert reader.read(str(named))["model"]["dc5"] is True
    assert reader.read(str(named), dc5=False)["model"]["dc5"] is False


def test_a_missing_or_left_over_tensor_is_an_error(published_file: Path) -> None:
    state = torch.load(published_file, weights_only=False)["model"]
    model = named_r50(91)
    less = {key: value for key, value in state.items() if key != "transformer.encoder.layers.0.norm1.weight"}
    with pytest.raises(CheckpointError, match="missing .*encoder.layers.0.norm1.weight"):
        fill(model, reader.rename(less, model.heads.heads()))
    with pytest.raises(CheckpointError, match="belongs to no part"):
        fill(model, reader.rename({**state, "mask_head.lay1.weight": torch.zeros(1)}, model.heads.heads()))


def test_a_file_that_is_something_else(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"model": {"a": torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match="no box checkpoint of facebookresearch/detr"):
        reader.read(str(path))
