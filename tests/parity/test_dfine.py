"""D-FINE against `transformers`, with weights that went through the reader of published files, and its losses by hand."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import learning_peers
import numpy as np
import published
import pytest
import torch
from peers import (
    HGNETS,
    Noised,
    differences,
    live_norms,
    norms_in_evaluation,
    peer_targets,
    published_hybrid_state,
    same_predictions,
    tiny_dfine_peer,
    varied,
    weighed,
    whole_batch,
)
from samples import targets_of
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config
from transformers.loss.loss_d_fine import DFineLoss
from transformers.models.d_fine import modeling_d_fine as theirs

import queryvision
from queryvision.criterion import Criterion
from queryvision.data.coco_classes import COCO_NAMES
from queryvision.errors import CheckpointError
from queryvision.head import Fit
from queryvision.model import builders
from queryvision.model.denoising import Denoising
from queryvision.model.proposals import grid_anchors
from queryvision.model.query_model import QueryModel
from queryvision.ops.distribution import bin_values, expected_value
from queryvision.structures import Facts, Match, Outputs, Queries, Round, Stage, Targets
from queryvision.tasks.detection import BoxHead, LabelHead
from queryvision.tasks.detection.models import STEERING
from queryvision.weights import dfine as reader
from queryvision.weights import reading
from queryvision.weights.reading import fill

WIDER = {"encoder_hidden_dim": 48, "decoder_in_channels": [48] * 3, "reg_scale": 8.0, "up": 0.4, "max_num_bins": 16}


def fresh(bins: dict[str, Any] | None = None, **changes: Any) -> QueryModel:
    sizes = {
        "backbone": "hgnetv2_b0.unit", "width": 32, "num_queries": 9, "denoising": 6, "decoder_layers": 3, "num_heads": 4,
        "ffn_width": 48, "expansion": 0.5, "depth": 0.34,
    }  # fmt: skip
    return builders.dfine(
        lambda fit: [LabelHead(fit, 5, loss="varifocal", label_noise=0.0), BoxHead(fit, box_noise=1.0, **(bins or {}))],
        STEERING, **{**sizes, **changes},
    )  # fmt: skip


def pair(wider: bool = False) -> tuple[QueryModel, nn.Module]:
    """A tiny model in training mode, norms apart, with the weights of a tiny peer."""
    peer = tiny_dfine_peer(**(WIDER if wider else {}))
    model = fresh({"bins": 16, "bound": 0.4, "scale": 8.0} if wider else None, encoder_width=48 if wider else None)
    fill(model, reader.rename(published_hybrid_state(peer.state_dict()), model.heads.heads()))
    norms_in_evaluation(model.train())
    return model, peer


def of(outputs: Outputs, queries: str, kind: str) -> Round:
    return next(r for r in outputs.rounds if r.queries == queries and r.stages[0].kind == kind)


def answers(*rounds: Round) -> tuple[Tensor, Tensor]:
    """Logits and boxes of all their stages."""
    said = [(r.answers["labels"]["logits"], r.answers["boxes"]["boxes"]) for r in rounds]
    logits, boxes = zip(*said, strict=True)
    return torch.cat(logits), torch.cat(boxes)


def main(outputs: Outputs, queries: str = "main") -> tuple[Tensor, Tensor]:
    """The first guess and every layer."""
    return answers(of(outputs, queries, "initial"), of(outputs, queries, "layer"))


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), atol=tolerance, rtol=0)


def assert_telling(said: Any) -> None:
    """Weights and images by which a difference shows."""
    ranks = said.enc_topk_logits.amax(-1)
    assert (ranks[:, :-1] - ranks[:, 1:]).min() > 1e-4, "who is chosen must not hang on rounding"
    for values, step in ((said.intermediate_logits, 0.03), (said.intermediate_reference_points, 0.003)):
        assert values.std(2).mean() > 0.05, "queries must differ"
        assert (values[:, 1:] - values[:, :-1]).abs().mean() > step, "layers must differ"


# ---------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize(("height", "width", "wider"), [(96, 96, False), (128, 160, True)])
@torch.no_grad()
def test_proposals_first_guess_and_every_layer(height: int, width: int, wider: bool) -> None:
    """In float64: these weights make 2e-4 of rounding in float32."""
    model, peer = (side.double() for side in pair(wider))
    images = whole_batch(height, width)
    images.pixels = images.pixels.double()
    said = peer.model(images.pixels)
    assert_telling(said)
    outputs = model(images)
    proposed = answers(of(outputs, "main", "proposal"))
    for found, wanted in zip(proposed, (said.enc_topk_logits, said.enc_topk_bboxes), strict=True):
        close(found[0], wanted)
    for found, wanted in zip(main(outputs), (said.intermediate_logits, said.intermediate_reference_points), strict=True):
        assert len(found) == 4
        close(found, wanted.transpose(0, 1))
    layers = of(outputs, "main", "layer").answers["boxes"]
    close(layers["corners"].flatten(3), said.intermediate_predicted_corners.transpose(0, 1))
    close(layers["reference"], said.initial_reference_points.transpose(0, 1))
    final = model.eval()(images).final()
    said = peer.eval()(images.pixels)
    assert final.shape[0] == 1
    close(answers(final)[0][0], said.logits)
    close(answers(final)[1][0], said.pred_boxes)


@torch.no_grad()
def test_norms_that_learn() -> None:
    """From the statistics of the batch, which all of them remember as there."""
    model, peer = (side.double() for side in pair(wider=True))
    images = whole_batch(96, 128)
    images.pixels = images.pixels.double()
    ours, statistics = live_norms(model), live_norms(peer)
    before = ours[-1][0].clone()
    found, said = main(model(images)), peer.model(images.pixels)
    close(found[0], said.intermediate_logits.transpose(0, 1))
    close(found[1], said.intermediate_reference_points.transpose(0, 1))
    total = [sum(float(x.sum()) for pair in side for x in pair) for side in (ours, statistics)]
    assert len(ours) == len(statistics) and (ours[-1][0] != before).all() and total[0] == pytest.approx(total[1], rel=1e-6)


def test_values_and_gradients_with_denoising(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many targets in each image: the published padding queries are seen and taught, ours are not. In float64."""
    model, peer = (side.double() for side in pair(wider=True))
    images, targets = whole_batch(96, 128), targets_of([[1, 4], [3, 0]])
    images.pixels, targets.values["boxes"] = images.pixels.double(), targets["boxes"].double()
    seen: list[Queries] = []
    model.decoder.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    outputs = model(images, targets)
    count = of(outputs, "denoising", "layer").shape[2]
    assert count == 12
    fed = Noised(monkeypatch, theirs, seen[0].anchors[:, -count:])
    said = peer.model(images.pixels, labels=peer_targets(targets))
    assert_telling(said)
    close(seen[0].states[:, -count:, 0], fed.content)
    proposed = answers(of(outputs, "main", "proposal"))
    pairs = [(proposed[0][0], said.enc_topk_logits), (proposed[1][0], said.enc_topk_bboxes)]
    for index, values in enumerate((said.intermediate_logits, said.intermediate_reference_points)):
        pairs += [(main(outputs)[index], values[:, :, count:].transpose(0, 1))]
        pairs += [(main(outputs, "denoising")[index], values[:, :, :count].transpose(0, 1))]
    for found, wanted in pairs:
        close(found, wanted)
    weighed(*(found for found, _ in pairs)).backward()
    weighed(*(wanted for _, wanted in pairs)).backward()
    apart = differences(model, peer, lambda state: reader.rename(state, model.heads.heads()))
    single = ("lab.scale", "lab.bias")  # one number each, sums that nearly cancel
    assert len(apart) > 300 and {k: v for k, v in apart.items() if v > (1e-3 if k.endswith(single) else 1e-4)} == {}


# ---------------------------------------------------------------------------------------------------- how it starts
def test_at_first_boxes_are_the_grid_gates_weigh_by_half_and_nobody_is_sure() -> None:
    model, images = norms_in_evaluation(fresh().train()), whole_batch(96, 128)
    outputs = model(images)
    grid, _ = grid_anchors(model.encoder(model.neck(model.backbone(images))))
    chosen = grid.gather(1, of(outputs, "main", "proposal").proposal_index[..., None].expand(-1, -1, 4))
    for boxes in (answers(of(outputs, "main", "proposal"))[1][0], *main(outputs)[1]):
        close(boxes, chosen, 1e-5)
    assert not of(outputs, "main", "layer").answers["boxes"]["confidence"].any()
    edges, labels = model.heads.heads()["boxes"].edges, model.heads.heads()["labels"].linear
    for mlp in [*edges.layers, *edges.judges, *model.heads.heads()["boxes"].mlp.layers]:
        assert not mlp.last.weight.any() and not mlp.last.bias.any() and mlp.layers[0].weight.any()
    for linear in [*labels.layers, labels.proposals]:
        close(linear.bias.sigmoid(), torch.full((5,), 0.01), 1e-6)
    first, second = torch.randn(2, 3, 4, 32)
    for layer in model.decoder.layers:
        close(layer.norm2(first, second), nn.functional.layer_norm((first + second) / 2, (32,)), 1e-5)
    norms = [m for part in (model.neck, model.encoder) for m in part.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) > 40 and all((norm.weight == 1).all() and not norm.bias.any() for norm in norms)


# ---------------------------------------------------------------------------------------------------- losses of a stage
def drawn_stage(targets: Targets, stages: int, queries: int, seed: int, bins: int = 32) -> dict[str, Tensor]:
    """Boxes near targets and far from them; some targets lie beyond the outermost bins of their reference."""
    generator = torch.Generator().manual_seed(seed)
    shape = (stages, len(targets.counts), queries)
    boxes = 0.05 + 0.4 * torch.rand(*shape, 4, generator=generator)
    for image, count in enumerate(targets.counts):
        near = targets["boxes"][image, :count]
        boxes[:, image, :count] = near + 0.04 * torch.randn(stages, count, 4, generator=generator)
    reference = (boxes + 0.05 * torch.randn(*shape, 4, generator=generator)).clamp(min=0.02)
    return {
        "logits": (2 * torch.randn(*shape, 5, generator=generator) - 1).requires_grad_(),
        "boxes": boxes.clamp(min=0.02).requires_grad_(),
        "corners": (2 * torch.randn(*shape, 4, bins + 1, generator=generator)).requires_grad_(),
        "reference": reference,
    }


def round_of(drawn: dict[str, Tensor], kind: str, final: dict[str, Tensor] | None = None, **more: Any) -> Round:
    fields = ("boxes", "corners", "reference") if kind == "layer" else ("boxes",)
    said = {"boxes": {name: drawn[name] for name in fields}, "labels": {"logits": drawn["logits"]}}
    last = final or {name: value[-1] for name, value in drawn.items()}
    ends = {"boxes": {n: last[n] for n in ("boxes", "corners", "reference")}, "labels": {"logits": last["logits"]}}
    count = len(drawn["boxes"])
    stages = tuple(Stage(kind, i, kind == "layer" and i == count - 1) for i in range(count))  # type: ignore[arg-type]
    return Round(more.pop("queries", "main"), stages, said, {}, ends, proposals=kind == "proposal", **more)


def heads_of(bins: int = 32, bound: float = 0.5, scale: float = 4.0) -> dict[str, Any]:
    fit = Fit(8, 3, per_layer=True, proposals="all", anchors=4, distributions=True)
    return {"boxes": BoxHead(fit, bins=bins, bound=bound, scale=scale), "labels": LabelHead(fit, 5, loss="varifocal")}


@pytest.mark.parametrize(("bins", "bound", "scale"), [(32, 0.5, 4.0), (16, 0.4, 8.0)])
@pytest.mark.parametrize("labels", [[[1, 2, 2, 0], [4]], [[], [3, 3]]])
def test_fgl_and_ddf_of_a_stage(labels: list[list[int]], bins: int, bound: float, scale: float) -> None:
    targets = targets_of(labels)
    drawn, teacher = (drawn_stage(targets, 1, 9, seed, bins) for seed in (1, 2))
    end = {name: value[0] for name, value in teacher.items()}
    round = replace(round_of(drawn, "layer", end), stages=(Stage("layer", 1),))
    order = [torch.randperm(9, generator=torch.Generator().manual_seed(7))[:count] for count in targets.counts]
    pairs = [(i, int(q), t) for i, row in enumerate(order) for t, q in enumerate(row)]
    images, queries, chosen = (torch.tensor(column) for column in zip(*pairs, strict=True))
    match = Match(torch.zeros_like(images), images, queries, chosen, 1)
    share, known = len(pairs) / (2 * 9), torch.ones(len(pairs), dtype=torch.bool)
    facts = Facts(float(len(pairs)), torch.ones(len(pairs)), known, None, share)
    mine = heads_of(bins, bound, scale)["boxes"].loss(round, match, targets, facts)
    judge = DFineLoss(DFineConfig(num_labels=5, max_num_bins=bins, up=bound, reg_scale=scale))
    outputs = {
        "pred_corners": drawn["corners"][0].flatten(2), "ref_points": drawn["reference"][0], "pred_boxes": drawn["boxes"][0],
        "teacher_corners": end["corners"].flatten(2), "teacher_logits": end["logits"],
    }  # fmt: skip
    indices = [(row, torch.arange(len(row))) for row in order]
    wanted = judge.loss_local(outputs, peer_targets(targets), indices, len(pairs))
    beyond, right, _ = judge.fgl_targets
    assert ((beyond == 0) | (beyond > bins - 1)).any() and ((right > 0.1) & (right < 0.9)).any(), "within and beyond the bins"
    for name in ("fgl", "ddf"):
        assert wanted[f"loss_{name}"] > 0.05
        close(mine[name][0], wanted[f"loss_{name}"])
    by_mine, by_theirs = (
        torch.autograd.grad(fgl + 2 * ddf, drawn["corners"])[0]
        for fgl, ddf in ((mine["fgl"][0], mine["ddf"][0]), (wanted["loss_fgl"], wanted["loss_ddf"]))
    )
    assert by_theirs.abs().max() > 1e-3
    close(by_mine, by_theirs, 1e-6)


# ---------------------------------------------------------------------------------------------------- all losses, by hand
WEIGHTS = {"class": 1.0, "l1": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5}
Row = dict[str, float]


def corners(box: Any) -> list[float]:
    x, y, w, h = (float(v) for v in box)
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def overlap(one: Any, other: Any) -> tuple[float, float]:
    """IoU and generalised IoU of two boxes cx cy w h."""
    (a, b, c, d), (e, f, g, h) = corners(one), corners(other)
    common = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    union = (c - a) * (d - b) + (g - e) * (h - f) - common
    hull = (max(c, g) - min(a, e)) * (max(d, h) - min(b, f))
    return common / union, common / union - (hull - union) / hull


def sigmoid(x: Any) -> float:
    return 1 / (1 + math.exp(-float(x)))


def softmax(row: Any) -> list[float]:
    powers = [math.exp(float(v)) for v in row]
    return [p / sum(powers) for p in powers]


def assigned(logits: Any, boxes: Any, labels: list[int], wanted: Any) -> list[tuple[int, int]]:
    """Pairs (query, target) of one image at one stage."""
    cost = np.zeros((len(boxes), len(labels)))
    for q, t in np.ndindex(*cost.shape):
        p = sigmoid(logits[q][labels[t]])
        focal = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
        distance = sum(abs(float(a) - float(b)) for a, b in zip(boxes[q], wanted[t], strict=True))
        cost[q, t] = 2 * focal + 5 * distance - 2 * overlap(boxes[q], wanted[t])[1]
    return list(zip(*(x.tolist() for x in linear_sum_assignment(cost)), strict=True))


def most_often(votes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of pairs, each query with the target it was given most often."""
    kept: dict[int, int] = {}
    for (query, target), _ in sorted(Counter(votes).items(), key=lambda item: (-item[1], item[0])):
        kept.setdefault(query, target)
    return list(kept.items())


def bin_edges() -> list[float]:
    step = 3.0 ** (2 / 30)  # bound 0.5, scale 4, 32 bins
    return [-4.0, *(1 - step**i for i in range(15, 0, -1)), 0.0, *(step**i - 1 for i in range(1, 16)), 4.0]


def fine_grained(logits: Any, reference: Any, wanted: Any) -> float:
    """Cross entropy of four edges to the two bins around each."""
    x, y, w, h = (float(v) for v in reference)
    a, b, c, d = corners(wanted)
    edges, total = bin_edges(), 0.0
    for row, place in zip(logits, ((x - a) / w, (y - b) / h, (c - x) / w, (d - y) / h), strict=True):
        place = min(max(4 * place - 2, edges[0]), edges[-1])
        low = max(i for i in range(32) if edges[i] <= place)
        right = (place - edges[low]) / (edges[low + 1] - edges[low])
        p = softmax(row)
        total -= (1 - right) * math.log(p[low]) + right * math.log(p[low + 1])
    return total


def divergence(logits: Any, teacher: Any) -> list[float]:
    """25 KL of each of the four edges, at temperature 5."""
    both = [[softmax([float(v) / 5 for v in row]) for row in side] for side in (logits, teacher)]
    return [25 * sum(t * math.log(t / s) for s, t in zip(*rows, strict=True)) for rows in zip(*both, strict=True)]


def by_hand(
    said: dict[str, Any], stage: int, own: list[list[tuple[int, int]]], union: list[list[tuple[int, int]]], goal: list[Any],
    counts: tuple[float, float], balance: tuple[float, float], real: list[int], teacher: dict[str, Any] | None,
) -> Row:  # fmt: skip
    """Weighted losses of one stage; `real` of each image's queries count, those behind are padding."""
    row = dict.fromkeys(WEIGHTS, 0.0)
    paired: list[float] = []
    others: list[float] = []
    for image, (labels, wanted) in enumerate(goal):
        boxes, logits = said["boxes"][stage][image], said["logits"][stage][image]
        given = dict(own[image])
        for q in range(real[image]):
            for c in range(5):
                p = sigmoid(logits[q][c])
                target, weight = 0.0, 0.75 * p**2
                if q in given and labels[given[q]] == c:
                    target = weight = overlap(boxes[q], wanted[given[q]])[0]
                row["class"] -= weight * (target * math.log(p) + (1 - target) * math.log(1 - p)) / counts[0]
        chosen = dict(union[image])
        for q, t in chosen.items():
            iou, giou = overlap(boxes[q], wanted[t])
            row["l1"] += sum(abs(float(a) - float(b)) for a, b in zip(boxes[q], wanted[t], strict=True)) / counts[1]
            row["giou"] += (1 - giou) / counts[1]
            if teacher is not None:
                edge = fine_grained(said["corners"][stage][image][q], said["reference"][stage][image][q], wanted[t])
                row["fgl"] += iou * edge / counts[1]
        for q in range(real[image]) if teacher is not None else ():
            sure = max(sigmoid(v) for v in teacher["logits"][image][q])
            apart = divergence(said["corners"][stage][image][q], teacher["corners"][image][q])
            weight = overlap(boxes[q], wanted[chosen[q]])[0] if q in chosen else sure
            (paired if q in chosen else others).extend(weight * v for v in apart)
    if teacher is not None:
        means = [sum(x) / len(x) if x else 0.0 for x in (paired, others)]
        many, rest = (v**0.5 for v in balance)
        row["ddf"] = (means[0] * many + means[1] * rest) / (many + rest)
    return {name: WEIGHTS[name] * value for name, value in row.items()}


@pytest.mark.parametrize("labels", [[[1, 2, 2, 0], [4]], [[], [1, 4]]])
def test_with_pairs_of_each_stage_all_losses_are_those_of_transformers(labels: list[list[int]]) -> None:
    """Which has no union of pairs; the first guess is handed to it as one more layer without distributions."""
    targets, queries = targets_of(labels), 8
    drawn = {name: drawn_stage(targets, count, queries, seed) for name, count, seed in (
        ("proposal", 1, 3), ("initial", 1, 2), ("layer", 3, 1)
    )}  # fmt: skip
    end = {name: value[-1] for name, value in drawn["layer"].items()}
    index = torch.zeros(2, queries, dtype=torch.long)
    rounds = [round_of(x, name, end, **({"proposal_index": index} if name == "proposal" else {})) for name, x in drawn.items()]
    heads = heads_of()
    heads["boxes"].matched_by = "stage"
    mine = Criterion(heads, STEERING)(Outputs(rounds), targets)

    plain = [{"logits": drawn[name]["logits"][0], "pred_boxes": drawn[name]["boxes"][0]} for name in ("proposal", "initial")]
    layers = [
        {"logits": logits, "pred_boxes": boxes, "pred_corners": corners.flatten(2), "ref_points": reference,
         "teacher_corners": end["corners"].flatten(2), "teacher_logits": end["logits"]}
        for logits, boxes, corners, reference in zip(*drawn["layer"].values(), strict=True)
    ]  # fmt: skip
    judge = DFineLoss(DFineConfig(num_labels=5))
    wanted = judge({**layers[-1], "auxiliary_outputs": [*plain, *layers[:-1]]}, peer_targets(targets))
    names = {"labels.class": "vfl", "boxes.l1": "bbox", "boxes.giou": "giou", "boxes.fgl": "fgl", "boxes.ddf": "ddf"}
    stages = [{n: t[i] for n, t in terms.items()} for terms in mine.stages for i in range(len(terms["boxes.l1"]))]
    compared = 0
    for row, tail in zip(stages, ["_aux_0", "_aux_1", "_aux_2", "_aux_3", ""], strict=True):
        for own, theirs_name in names.items():
            key = f"loss_{theirs_name}{tail}"
            if key in wanted:
                close(row[own], wanted[key], 1e-4 * max(1.0, float(wanted[key].detach())))
                compared += 1
    assert compared == len(wanted) == 2 * 3 + 3 * 5 and wanted["loss_ddf_aux_3"] > 0.01
    inputs = [drawn["layer"][name] for name in ("logits", "boxes", "corners")]
    for found, expected in zip(
        torch.autograd.grad(mine.total, inputs), torch.autograd.grad(sum(wanted.values()), inputs), strict=True
    ):
        assert expected.abs().max() > 1e-3
        close(found, expected, 1e-5)

    # The peer of `scripts/compare_learning.py`, whose answers come with the batch in front.
    def in_front(name: str, *kinds: str) -> Tensor:
        return torch.cat([drawn[kind][name] for kind in kinds]).transpose(0, 1)

    total, _, _ = learning_peers._dfine_loss(
        torch.empty(0), peer_targets(targets), "cpu", torch.empty(0), DFineConfig(num_labels=5),
        in_front("logits", "initial", "layer"), in_front("boxes", "initial", "layer"),
        predicted_corners=in_front("corners", "layer").flatten(3), initial_reference_points=in_front("reference", "layer"),
        enc_topk_logits=drawn["proposal"]["logits"][0], enc_topk_bboxes=drawn["proposal"]["boxes"][0],
        denoising_meta_values=None,
    )  # fmt: skip
    torch.testing.assert_close(total, mine.total)


@pytest.mark.parametrize("labels", [[[1, 2, 2, 0], [4]], [[2, 0, 3, 1], [3, 3, 1, 2]], [[], [1, 4]]])
def test_all_losses_are_those_of_the_published_criterion(labels: list[list[int]]) -> None:
    """Padding of denoising queries apart, which is taught there and not here."""
    targets, queries = targets_of(labels), 8
    drawn = {name: drawn_stage(targets, count, queries, seed) for name, count, seed in (
        ("layer", 3, 1), ("initial", 1, 2), ("proposal", 1, 3)
    )}  # fmt: skip
    plan = Denoising(6, 8).plan(targets.counts)
    pins = torch.where(plan.positive | (plan.target < 0), plan.target, -2)
    noised = {
        name: drawn_stage(targets, count, pins.shape[1], seed) for name, count, seed in (("layer", 3, 4), ("initial", 1, 5))
    }
    end, noised_end = ({name: value[-1] for name, value in x["layer"].items()} for x in (drawn, noised))
    more = {"queries": "denoising", "pins": pins, "real": pins != -3, "repeats": plan.num_groups}
    rounds = [
        round_of(drawn["proposal"], "proposal", end, proposal_index=torch.zeros(2, queries, dtype=torch.long)),
        round_of(drawn["initial"], "initial", end),
        round_of(drawn["layer"], "layer", end),
        round_of(noised["initial"], "initial", noised_end, **more),
        round_of(noised["layer"], "layer", noised_end, **more),
    ]
    heads = heads_of()
    mine = Criterion(heads, STEERING)(Outputs(rounds), targets)

    goal = [(row, targets["boxes"][image, : len(row)].tolist()) for image, row in enumerate(labels)]
    plain = {n: {k: v.detach().tolist() for k, v in x.items()} for n, x in drawn.items()}
    own = {
        (name, stage): [assigned(x["logits"][stage][i], x["boxes"][stage][i], *goal[i]) for i in range(2)]
        for name, x in plain.items() for stage in range(len(x["boxes"]))
    }  # fmt: skip
    votes = [[pair for pairs in own.values() for pair in pairs[image]] for image in range(2)]
    union = [most_often(v) for v in votes]
    total, size = sum(map(len, labels)), sum(map(len, union))
    assert size > total, "layers must disagree"
    assert any(len({t for q, t in set(v) if q == query}) > 1 for v in votes for query in range(queries)) or total < 3
    balance = (float(size), float(2 * queries - size))
    wanted: list[Row] = []
    for name in ("proposal", "initial", "layer"):
        teacher = {k: v[-1] for k, v in plain["layer"].items()} if name == "layer" else None
        for stage in range(len(plain[name]["boxes"])):
            counts, real = (float(total), float(size)), [queries, queries]
            wanted += [by_hand(plain[name], stage, own[name, stage], union, goal, counts, balance, real, teacher)]
    rows = [[(q, t) for q, t in enumerate(row) if t >= 0] for row in pins.tolist()]
    last = [[(q, t) for q, t in enumerate(row) if t != -3] for row in pins.tolist()]
    for name in ("initial", "layer"):
        x = {k: v.detach().tolist() for k, v in noised[name].items()}
        x = {k: [[[image[q] for q, _ in last[i]] for i, image in enumerate(stage)] for stage in v] for k, v in x.items()}
        kept = [[([q for q, _ in last[i]].index(q), t) for q, t in row] for i, row in enumerate(rows)]
        teacher = {k: v[-1] for k, v in x.items()} if name == "layer" else None
        for stage in range(len(x["boxes"])):
            count = float(total * plan.num_groups)
            wanted += [by_hand(x, stage, kept, kept, goal, (count, count), balance, [len(r) for r in last], teacher)]

    found = [{n: t[i] for n, t in terms.items()} for terms in mine.stages for i in range(len(terms["boxes.l1"]))]
    assert len(found) == len(wanted) == 9
    for mine_row, row in zip(found, wanted, strict=True):
        for name, value in row.items():
            head = "labels" if name == "class" else "boxes"
            close(mine_row[f"{head}.{name}"], torch.tensor(value), 1e-4 * max(1.0, abs(value)))
    assert wanted[2]["ddf"] > 0.01 and wanted[4]["ddf"] == 0 and wanted[6]["fgl"] > 0.01
    close(mine.total, torch.tensor(sum(sum(row.values()) for row in wanted)), 1e-2)


# ---------------------------------------------------------------------------------------------------- published files
def settings_of(size: str, **changes: Any) -> dict[str, Any]:
    """As the published settings of D-FINE."""
    backbone = {"n": "hgnetv2_b0", "s": "hgnetv2_b0", "m": "hgnetv2_b2", "l": "hgnetv2_b4", "x": "hgnetv2_b5"}[size]
    more: dict[str, Any] = {
        "n": {
            "decoder_layers": 3, "hidden_expansion": 0.34, "depth_mult": 0.5, "d_model": 128, "encoder_hidden_dim": 128,
            "encoder_in_channels": [512, 1024], "decoder_in_channels": [128, 128], "feat_strides": [16, 32],
            "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "num_feature_levels": 2, "encode_proj_layers": [1],
            "decoder_n_points": [6, 6],
        },
        "s": {"decoder_layers": 3, "hidden_expansion": 0.5, "depth_mult": 0.34, "encoder_in_channels": [256, 512, 1024]},
        "m": {"decoder_layers": 4, "depth_mult": 0.67, "encoder_in_channels": [384, 768, 1536]},
        "l": {},
        "x": {
            "encoder_hidden_dim": 384, "decoder_in_channels": [384] * 3, "encoder_ffn_dim": 2048, "reg_scale": 8.0,
        },
    }[size]  # fmt: skip
    levels = ["stage3", "stage4"] if size == "n" else ["stage2", "stage3", "stage4"]
    return {
        "backbone_config": HGNetV2Config(**HGNETS[backbone], out_features=levels), "decoder_n_points": [3, 6, 3],
        "id2label": dict(enumerate(COCO_NAMES.values())), **more, **changes,
    }  # fmt: skip


def read_of(monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    monkeypatch.setattr(reading, "open_safetensors", lambda _source: (state, settings))
    return reader.read("some.safetensors")


PUBLISHED: dict[str, dict[str, Any]] = {
    "n": {
        "name": "dfine", "backbone": "hgnetv2_b0.unit", "strides": (16, 32), "width": 128, "num_points": (6, 6),
        "ffn_width": 512, "decoder_layers": 3, "expansion": 42 / 128, "depth": 0.67,
    },
    "s": {"name": "dfine_s", "backbone": "hgnetv2_b0.unit"},
    "m": {"name": "dfine_m", "backbone": "hgnetv2_b2.unit"},
    "l": {"name": "dfine_l", "backbone": "hgnetv2_b4.unit"},
    "x": {"name": "dfine", "backbone": "hgnetv2_b5.unit", "encoder_width": 384, "encoder_ffn_width": 2048},
}  # fmt: skip


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("alone", [False, True])
def test_sizes_are_told_by_tensors_and_all_of_them_have_a_place(
    size: str, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, settings = published.of_transformers(DFineForObjectDetection, settings_of(size))
    assert "model.encoder.encoder.0.layers.0.fc2.weight" in state and "model.decoder.layers.0.fc1.bias" in state
    found = read_of(monkeypatch, state, {} if alone else settings)
    assert found["model"] == {**PUBLISHED[size], "num_queries": 300, "denoising": 100}
    assert found["config"] == f"dfine_{dict(n='s', x='l').get(size, size)}_coco"
    assert found["heads"] == {"boxes": {"bins": 32, "bound": 0.5, "scale": 8.0 if size == "x" else 4.0}} and found[
        "classes"
    ].ids == tuple(COCO_NAMES)
    keywords = {key: value for key, value in found["model"].items() if key != "name"}
    with torch.device("meta"):
        made = getattr(builders, found["model"]["name"])(lambda fit: [LabelHead(fit, 80), BoxHead(fit)], STEERING, **keywords)
    renamed = reader.rename(found["state"], made.heads.heads())
    wanted = {k: v.shape for k, v in made.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert {k: v.shape for k, v in renamed.items()} == wanted


def test_a_file_of_published_size_answers_the_same(tmp_path: Path) -> None:
    """12 queries, so that who is chosen does not hang on rounding, and other bins; a file of `transformers` itself."""
    torch.manual_seed(0)
    settings = settings_of("s", num_queries=12, reg_scale=8.0, up=0.4)
    peer = varied(DFineForObjectDetection(DFineConfig(**settings))).eval()
    peer.save_pretrained(tmp_path / "dfine-small-coco")
    ours = queryvision.convert(tmp_path / "dfine-small-coco", "dfine", tmp_path / "ours.pt")
    predictor = queryvision.load(ours, image_size=320, overlap=1.0)
    config = predictor.loaded.config
    assert config.model["name"] == "dfine_s" and config.name == "dfine_s_coco" and predictor.model.num_queries == 12
    assert [config.heads["boxes"][key] for key in ("bins", "scale", "box_noise")] == [32, 8.0, 1.0]
    assert config.heads["boxes"]["bound"] == pytest.approx(0.4) and config.heads["labels"]["loss"] == "varifocal"
    same_predictions(predictor, peer)


def test_what_cannot_be_read_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    state, settings = published.of_transformers(DFineForObjectDetection, settings_of("s"))

    def refused(reason: str, without: str = "-", extra: dict[str, Tensor] | None = None, **changes: Any) -> None:
        held = {k: v for k, v in state.items() if without not in k}
        with pytest.raises(CheckpointError, match=reason) as caught:
            read_of(monkeypatch, {**held, **(extra or {})}, {**settings, **changes})
        assert "\n" not in str(caught.value)

    layers = {k.replace("decoder.layers.2", "decoder.layers.3"): v for k, v in state.items() if "decoder.layers.2." in k}
    refused(r"layers follow the one that answers \(eval_idx = 1\)", eval_idx=1)
    refused("layers follow the one that answers", extra=layers)
    refused("model_type = rt_detr_v2; this reader takes d_fine", model_type="rt_detr_v2")
    refused("is no d_fine checkpoint of transformers, it lacks model.decoder.reg_scale", without="reg_scale")
    refused("lqe_layers = 3; only 2", lqe_layers=3)
    refused("decoder_method = discrete; only default", decoder_method="discrete")


def test_edges_are_exact_under_autocast() -> None:
    """A mean made by a product of matrices would be rounded to bfloat16: a pixel of a box of 512."""
    logits, values = torch.randn(3, 7, 4, 33), bin_values(32, 0.5, 4.0)
    with torch.autocast("cpu", torch.bfloat16):
        half = expected_value(logits, values)
    assert half.dtype == torch.float32 and torch.equal(half, expected_value(logits, values))
    torch.testing.assert_close(half, logits.softmax(-1) @ values)
