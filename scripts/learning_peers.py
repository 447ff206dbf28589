"""The detectors of `transformers` that `compare_learning.py` trains, on this project's backbone, batches and results.

A peer has the sizes of the default configuration: width 128, one encoder layer, three decoder layers of four heads,
feed-forward parts of 512, 100 queries, 40 denoising queries where it has any, no dropout. Other parts, the number of levels and
losses are its own.
`transformers` 5.23 differs from the published models in ways that cost a model that is trained from the start: a `_shipped`
peer is left as it comes, the one without the suffix is repaired.
    rtdetrv2: gains of batch norms are 1, as published and as in PyTorch; shipped: drawn from N(0, 0.01).
    deformable: the proposals have a loss, class losses weigh 2, class biases start at a prior of 0.01, box heads at zero, as
        in Deformable-DETR; shipped: the head that chooses the proposals is never trained.
    dfine: a layer's corner distributions are judged beside its own boxes, the last layer's, too, as in D-FINE; shipped: beside
        those of the layer before, and the last layer's not at all (there is an entry more of boxes than of distributions).

Letters: B images, Q queries, C classes, T targets of an image, L decoder layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.loss.loss_d_fine import DFineLoss
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

from queryvision.data.classes import ClassMap
from queryvision.data.loader import ImageInfo
from queryvision.model.backbone import Backbone
from queryvision.model.backbone_base import filled_up
from queryvision.ops.boxes import cxcywh_to_xyxy
from queryvision.results import Result
from queryvision.structures import Batch, ImageBatch

SIZES = {
    "d_model": 128, "encoder_layers": 1, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "num_queries": 100, "dropout": 0.0,
}  # fmt: skip
MULTIPLE = 32  # to which the hybrid encoders need their images filled up, in pixels
Labels = list[dict[str, Tensor]]  # of each image {"class_labels": (T,) int64, "boxes": (T,4) cx cy w h, 0..1}
Further = Callable[[Any, Labels], Tensor]


class Peer(nn.Module):
    """A detector of `transformers` on a backbone of this project.

    Args:
        backbone: its maps are all that the detector sees.
        detector: `...ForObjectDetection`; its own backbone is replaced.
        blind: it knows nothing of padding: images are filled up to `MULTIPLE`, boxes are relative to the filled-up image.
        softmax: it has a no-object class; every query gives its best class. Else: the best of all pairs of query and class.
        further: (outputs, labels) -> a loss to add to its own.
    """

    def __init__(
        self,
        backbone: Backbone,
        detector: nn.Module,
        blind: bool = False,
        softmax: bool = False,
        further: Further | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone  # first, so that its parameters go by this name
        self.detector: Any = detector
        self.detector.model.backbone = _Maps(backbone)
        self.blind, self.softmax, self.further = blind, softmax, further
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1) * 255)

    def loss(self, batch: Batch) -> Tensor:
        """The total loss of a batch, a scalar."""
        pixels, mask, share = self._inputs(batch.images)
        targets = batch.targets
        labels = [
            {"class_labels": targets["labels"][i, :count], "boxes": targets["boxes"][i, :count] * share[i]}
            for i, count in enumerate(targets.counts)
        ]
        outputs = self.detector(pixels, pixel_mask=mask, labels=labels)
        return outputs.loss if self.further is None else outputs.loss + self.further(outputs, labels)

    @torch.inference_mode()
    def results(self, images: ImageBatch, classes: ClassMap, infos: Sequence[ImageInfo], limit: int) -> list[Result]:
        """At most `limit` results an image, boxes (k,4) x1 y1 x2 y2 in pixels of the original image, best first."""
        pixels, mask, share = self._inputs(images)
        outputs = self.detector(pixels, pixel_mask=mask)
        if self.softmax:
            best, labels = outputs.logits.softmax(-1)[..., :-1].max(-1)
            scores, queries = best.topk(min(limit, best.shape[1]), 1)
            labels = labels.gather(1, queries)
        else:
            every, num_classes = outputs.logits.sigmoid().flatten(1), outputs.logits.shape[-1]
            scores, index = every.topk(min(limit, every.shape[1]), 1)
            queries, labels = index // num_classes, index % num_classes
        boxes = cxcywh_to_xyxy(outputs.pred_boxes / share[:, None]).gather(1, queries[..., None].expand(-1, -1, 4))
        sizes = torch.tensor([info.size for info in infos])
        boxes = boxes * sizes.flip(-1).repeat(1, 2)[:, None]
        return [
            Result(scores[i], labels[i], classes, info.size, {"boxes": boxes[i]}, info.path) for i, info in enumerate(infos)
        ]

    def _inputs(self, images: ImageBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised pixels (B,3,H,W), mask (B,H,W) int64 with 1 = image, what boxes 0..1 are to be multiplied by (B,4)."""
        pixels = images.pixels.contiguous(memory_format=torch.channels_last)
        pixels = ((pixels - self.mean) / self.std).masked_fill(images.padding[:, None], 0.0)
        if not self.blind:
            return pixels, (~images.padding).long(), torch.ones(len(pixels), 4)
        pixels = filled_up(pixels, MULTIPLE)
        height, width = pixels.shape[-2:]
        share = images.sizes.flip(-1) / torch.tensor([width, height])
        return pixels, torch.ones(len(pixels), height, width, dtype=torch.long), share.repeat(1, 2)


class _Maps(nn.Module):
    """A backbone of this project behind the interface of those in `transformers`."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.model = backbone

    def forward(self, pixels: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Normalised pixels (B,3,H,W), mask (B,H,W) with 1 = image -> of each level map (B,C_l,H_l,W_l) and mask, bool."""
        padding = mask == 0
        sizes = torch.stack((mask[:, :, 0].sum(1), mask[:, 0].sum(1)), 1)
        features = self.model(ImageBatch(pixels, padding, bool(padding.any()), sizes))
        masks = [
            m.new_ones(len(m), *m.shape[-2:], dtype=torch.bool) if p is None else ~p
            for m, p in zip(features.maps, features.paddings, strict=True)
        ]
        return list(zip(features.maps, masks, strict=True))


def _common(channels: Sequence[int], num_classes: int) -> dict[str, Any]:
    """Settings of every peer, with a stand-in of few parameters for the backbone, which only says the levels' channels."""
    stages = len(channels) + 1
    stand_in = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, *channels],
        depths=[1] * stages,
        layer_type="basic",
        out_features=[f"stage{i}" for i in range(2, stages + 1)],
    )
    return {**SIZES, "num_labels": num_classes, "backbone_config": stand_in, "auxiliary_loss": True}


def _hybrid(channels: Sequence[int], num_classes: int) -> dict[str, Any]:
    """Settings of the peers with a hybrid encoder."""
    widths = {"encoder_hidden_dim": 128, "encoder_in_channels": list(channels), "decoder_in_channels": [128] * 3}
    return {**_common(channels, num_classes), **widths, "hidden_expansion": 0.5, "num_denoising": 40}


def detr(backbone: Backbone, num_classes: int) -> Peer:
    """DETR (arXiv 2005.12872)."""
    config = transformers.DetrConfig(**_common(backbone.channels, num_classes))
    return Peer(backbone, transformers.DetrForObjectDetection(config), softmax=True)


def deformable(backbone: Backbone, num_classes: int, shipped: bool = False) -> Peer:
    """Two-stage Deformable DETR with refined boxes (arXiv 2010.04159)."""
    config = transformers.DeformableDetrConfig(
        **_common(backbone.channels, num_classes),
        two_stage=True,
        with_box_refine=True,
        two_stage_num_proposals=SIZES["num_queries"],
        num_feature_levels=len(backbone.channels),
        class_cost=1 if shipped else 2,
    )
    detector = transformers.DeformableDetrForObjectDetection(config)
    if shipped:
        return Peer(backbone, detector)
    for classify, refine in zip(detector.class_embed, detector.bbox_embed, strict=True):
        nn.init.constant_(classify.bias, -math.log(99))
        nn.init.zeros_(refine.layers[-1].weight)
        nn.init.zeros_(refine.layers[-1].bias)
    return Peer(backbone, detector, further=lambda outputs, labels: _missing_losses(outputs, labels, config))


def _missing_losses(outputs: Any, labels: Labels, config: Any) -> Tensor:
    """What `transformers` leaves out of the loss of a two-stage Deformable DETR: the proposals', and half of the classes'."""
    matcher = DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    judge = DeformableDetrImageLoss(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"])
    anything = [{**label, "class_labels": torch.zeros_like(label["class_labels"])} for label in labels]
    proposals = {"logits": outputs.enc_outputs_class, "pred_boxes": outputs.enc_outputs_coord_logits.sigmoid()}
    terms = judge(proposals, anything)
    own = 2 * terms["loss_ce"] + config.bbox_loss_coefficient * terms["loss_bbox"]
    classes = sum(term for name, term in outputs.loss_dict.items() if name.startswith("loss_ce"))
    return own + config.giou_loss_coefficient * terms["loss_giou"] + classes


def rtdetrv2(backbone: Backbone, num_classes: int, shipped: bool = False) -> Peer:
    """RT-DETRv2 (arXiv 2407.17140)."""
    detector = transformers.RTDetrV2ForObjectDetection(transformers.RTDetrV2Config(**_hybrid(backbone.channels, num_classes)))
    if not shipped:
        for module in detector.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
    return Peer(backbone, detector, blind=True)


def dfine(backbone: Backbone, num_classes: int, shipped: bool = False) -> Peer:
    """D-FINE (arXiv 2410.13842) with the depth and expansion of D-FINE-S."""
    config = transformers.DFineConfig(**_hybrid(backbone.channels, num_classes), depth_mult=0.34, eval_idx=-1)
    detector = transformers.DFineForObjectDetection(config)
    if not shipped:
        detector.loss_function = _dfine_loss
    return Peer(backbone, detector, blind=True)


def _dfine_loss(
    logits: Tensor, labels: Labels, device: Any, boxes: Tensor, config: Any, scores: Tensor, found: Tensor, **parts: Any
) -> tuple[Tensor, dict[str, Tensor], None]:
    """D-FINE's loss by the loss class of `transformers`, each layer's boxes beside its own distributions.

    It stands in for `DFineForObjectDetection.loss_function`. `scores` (B,1+L,Q,C) and `found` boxes (B,1+L,Q,4): the first are
    those before any distribution; `parts` holds distributions (B,L,Q,4 x bins), what they refine (B,L,Q,4), and proposals.
    """
    noise = parts["denoising_meta_values"]  # None: without denoising queries
    split = noise["dn_num_split"] if noise else [0, scores.shape[2]]
    fields = (scores, found.clamp(0, 1), parts["predicted_corners"], parts["initial_reference_points"])
    noisy, main = ([field.split(split, 2)[part] for field in fields] for part in (0, 1))

    def answers(part: list[Tensor]) -> list[dict[str, Tensor]]:
        logits, boxes, corners, references = part
        teacher = {"teacher_corners": corners[:, -1], "teacher_logits": logits[:, -1]}
        layers = [
            {"logits": s, "pred_boxes": b, "pred_corners": c, "ref_points": r, **teacher}
            for s, b, c, r in zip(*(x.unbind(1) for x in (logits[:, 1:], boxes[:, 1:], corners, references)), strict=True)
        ]
        return [{"logits": logits[:, 0], "pred_boxes": boxes[:, 0]}, *layers]

    *others, last = answers(main)
    proposals = {"logits": parts["enc_topk_logits"], "pred_boxes": parts["enc_topk_bboxes"].clamp(0, 1)}
    outputs: dict[str, Any] = {**last, "auxiliary_outputs": [*others, proposals]}
    if noise:
        outputs |= {"dn_auxiliary_outputs": answers(noisy), "denoising_meta_values": noise}
    terms = DFineLoss(config).to(device)(outputs, labels)
    return torch.stack([term.sum() for term in terms.values()]).sum(), terms, None


PEERS: dict[str, Callable[[Backbone, int], Peer]] = {
    "dfine": dfine,
    "dfine_shipped": lambda backbone, num_classes: dfine(backbone, num_classes, shipped=True),
    "rtdetrv2": rtdetrv2,
    "rtdetrv2_shipped": lambda backbone, num_classes: rtdetrv2(backbone, num_classes, shipped=True),
    "deformable": deformable,
    "deformable_shipped": lambda backbone, num_classes: deformable(backbone, num_classes, shipped=True),
    "detr": detr,
}
STRIDES = {"detr": (16,)}  # DETR's single level as with DC5: at 32 an image would be 16 cells
PUBLISHED_STRIDES = (8, 16, 32)  # of the others
OFFSETS = {"deformable": 0.1, "deformable_shipped": 0.1}  # rate of sampling offsets as a share of the others', as published
