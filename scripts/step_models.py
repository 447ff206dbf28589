"""The models that `benchmark_step.py` compares: ours, and those of `transformers` with the same sizes.

Either side's libraries are imported when its model is made, so that a process that measures memory holds only its own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from queryvision.structures import ImageBatch, Targets

CLASSES = 91


def random_targets(batch: int, count: int, device: str = "cpu") -> Targets:
    boxes = torch.cat((0.3 + 0.4 * torch.rand(batch, count, 2), 0.05 + 0.3 * torch.rand(batch, count, 2)), -1)
    valid = torch.ones(batch, count, dtype=torch.bool)
    counts = (count,) * batch
    return Targets(
        values={"labels": torch.randint(0, CLASSES, (batch, count)), "boxes": boxes},
        counts=counts,
        valid=valid,
        has={"labels": valid, "boxes": valid},
        num_with={"labels": counts, "boxes": counts},
        covers=torch.ones(batch, CLASSES, dtype=torch.bool),
        covers_all=True,
        sizes=torch.full((batch, 2), 480),
        ignore_boxes=torch.zeros(batch, 0, 4),
    ).to(device)


def training_work(device: str, batch: int = 2) -> tuple[torch.Tensor, Targets]:
    """Pixels and targets of a training step."""
    return torch.randn(batch, 3, 480, 640, device=device), random_targets(batch, 8, device)


def images_of(pixels: torch.Tensor) -> ImageBatch:
    batch, _, height, width = pixels.shape
    padding = torch.zeros(batch, height, width, dtype=torch.bool, device=pixels.device)
    return ImageBatch(pixels, padding, False, torch.tensor([[height, width]] * batch, device=pixels.device))


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Clipping and the optimiser's step, the same on both sides."""
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "detr": ("detr_r50", {}),
    "deformable": ("deformable_detr_r50", {"refine": True, "two_stage": True}),
    "dino": ("dino_r50", {}),
    "dino without denoising": ("dino_r50", {"denoising": 0}),
    "rtdetrv2": ("rtdetrv2_r18", {"frozen_norm": True}),
    "dfine": ("dfine_s", {"frozen_norm": True}),
    "laptop": ("dfine_small", {}),
}
REAL_TIME = ("rtdetrv2", "dfine")
"""Models whose peers take images of sides that are multiples of 32 only, and train their whole backbone."""


class Ours:
    """A model of this project.

    Args:
        name: of the model.
        compiled: whether backbone, encoder and decoder layers are.
        device: that it runs on.
        half: forward passes in bfloat16 where autocast allows it.
    """

    def __init__(self, name: str, compiled: bool = False, device: str = "cpu", half: bool = False) -> None:
        from queryvision.criterion import Criterion
        from queryvision.tasks import detection

        builder, settings = OURS[name]
        self.model: Any = getattr(detection, builder)(CLASSES, **settings).to(device)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=half)
        if compiled:
            from queryvision.engine.compilation import compile_parts

            compile_parts(self.model, ["backbone", "encoder", "decoder.layers"])
        self.criterion = Criterion(self.model.heads.heads(), self.model.steering)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def train(self, pixels: torch.Tensor, targets: Targets) -> None:
        self.model.train()
        with self.autocast:
            outputs = self.model(images_of(pixels), targets)
        self.criterion(outputs, targets).total.backward()
        update(self.model, self.optimizer)

    def infer(self, pixels: torch.Tensor) -> None:
        self.model.eval()
        with torch.inference_mode(), self.autocast:
            self.model(images_of(pixels))


class OnnxRuntime:
    """Our model exported and run by ONNX Runtime on as many threads; answers of its last layer only.

    Args:
        name: of the model.
        pixels: images of the size it is exported for.
    """

    def __init__(self, name: str, pixels: torch.Tensor) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # else they hold the cores while we run
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / "model.onnx"
            torch.onnx.export(
                LastLayer(Ours(name).model).eval(), (pixels,), path, input_names=["pixels"], dynamo=True, verbose=False
            )
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def infer(self, pixels: torch.Tensor) -> None:
        self.session.run(None, {"pixels": pixels.numpy()})


class LastLayer(torch.nn.Module):
    """Images (B,3,H,W) -> what the heads say behind the last layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        answers = self.model(images_of(pixels)).rounds[-1].answers
        return [field[-1] for answer in answers.values() for field in answer.values()]


class Transformers:
    """The model of `transformers` with its default attention and the losses of all layers.

    Args:
        name: of the model.
        dropout: of attention weights and inside the feed-forward parts: 0.1 as published and ours; its default is 0.
        device: that it runs on.
        half: forward passes and losses in bfloat16 where autocast allows it.
    """

    def __init__(self, name: str, dropout: float = 0.1, device: str = "cpu", half: bool = False) -> None:
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=half)
        if name in REAL_TIME:
            self.model = peer_real_time(name)
        else:
            self.model = peer_detr(dropout) if name == "detr" else peer_deformable(dropout, name == "dino")
            self._freeze()
        self.model.to(device)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def _freeze(self) -> None:
        for key, parameter in self.model.model.backbone.named_parameters():
            # As published: stem and first stage frozen. transformers 5.23 freezes all of its own ResNet, which is less work.
            parameter.requires_grad_(any(f"stages.{i}" in key for i in (1, 2, 3)) and "normalization" not in key)

    def train(self, pixels: torch.Tensor, targets: Targets) -> None:
        self.model.train()
        labels = [{"class_labels": c, "boxes": b} for c, b in zip(targets["labels"], targets["boxes"], strict=True)]
        with self.autocast:
            loss = self.model(pixels, labels=labels).loss
        loss.backward()
        update(self.model, self.optimizer)

    def infer(self, pixels: torch.Tensor) -> None:
        self.model.eval()
        with torch.inference_mode(), self.autocast:
            self.model(pixels)


def peer_detr(dropout: float) -> Any:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(out_features=["stage4"])
    config = DetrConfig(
        num_labels=CLASSES, auxiliary_loss=True, backbone_config=backbone, attention_dropout=dropout, activation_dropout=dropout
    )
    return DetrForObjectDetection(config)


def peer_deformable(dropout: float, large: bool) -> Any:
    """Two-stage Deformable DETR; `large`: with DINO's sizes, and no dropout at all, as DINO."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    rates = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    if not large:
        rates = {"dropout": 0.1, "attention_dropout": dropout, "activation_dropout": dropout}
    queries, ffn = (900, 2048) if large else (300, 1024)
    config = DeformableDetrConfig(
        num_labels=CLASSES,
        auxiliary_loss=True,
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        backbone_config=ResNetConfig(out_features=["stage2", "stage3", "stage4"]),
        with_box_refine=True,
        two_stage=True,
        num_queries=queries,
        two_stage_num_proposals=queries,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        **rates,
    )
    return DeformableDetrForObjectDetection(config)


def peer_real_time(name: str) -> Any:
    """RT-DETRv2-R18 or D-FINE-S: 300 queries, 100 denoising queries, 3 decoder layers, frozen batch norm in the backbone."""
    from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config, RTDetrResNetConfig, RTDetrV2Config
    from transformers import RTDetrV2ForObjectDetection as RTDetrV2

    if name == "rtdetrv2":
        body: Any = RTDetrResNetConfig(
            hidden_sizes=[64, 128, 256, 512],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        )
        channels = [128, 256, 512]
        return RTDetrV2(
            RTDetrV2Config(
                num_labels=CLASSES, backbone_config=body, encoder_in_channels=channels, decoder_layers=3, hidden_expansion=0.5
            )
        )
    body = HGNetV2Config(
        depths=[3, 4, 6, 3],
        stem_channels=[3, 16, 16],
        stage_in_channels=[16, 64, 256, 512],
        stage_mid_channels=[16, 32, 64, 128],
        stage_out_channels=[64, 256, 512, 1024],
        hidden_sizes=[64, 256, 512, 1024],
        stage_num_blocks=[1, 1, 2, 1],
        stage_numb_of_layers=[3, 3, 3, 3],
        use_learnable_affine_block=True,
        out_features=["stage2", "stage3", "stage4"],
    )
    return DFineForObjectDetection(
        DFineConfig(
            num_labels=CLASSES,
            backbone_config=body,
            encoder_in_channels=[256, 512, 1024],
            decoder_layers=3,
            decoder_n_points=[3, 6, 3],
            hidden_expansion=0.5,
            depth_mult=0.34,
        )
    )
