"""The journey of an image through a model, measured by forward hooks on the running model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from queryvision.assembly import build_model, resolve
from queryvision.config import load_config
from queryvision.data.classes import ClassMap
from queryvision.data.skeletons import COCO_SIGMAS, Skeleton
from queryvision.errors import ConfigError
from queryvision.head import Head, View
from queryvision.model.cross_attention import DeformableCrossAttention
from queryvision.model.decoder import Decoder, DecoderLayer
from queryvision.model.deformable_encoder import DeformableEncoderLayer
from queryvision.model.hybrid_encoder import HybridEncoder
from queryvision.model.neck import Pyramid
from queryvision.model.proposals import SelectedQueries
from queryvision.model.query_model import QueryModel
from queryvision.registry import resolve_task
from queryvision.splits import open_split
from queryvision.structures import Features, ImageBatch, Memory, Queries

COCO_ROWS = 91
"""Ids 0..90, as in the published checkpoints."""
PERSON = 1
"""The only one of them with keypoints."""


@dataclass(frozen=True)
class Step:
    """One line of the journey."""

    part: str
    what: str
    shape: str


def trace(config: str = "detr_r50_coco", image: str = "800x600", *, task: str | None = None) -> list[Step]:
    """Runs a model of random weights on a random image and says what every part gave out.

    A configuration without a data path gets COCO's classes: ids 0..90, as in the published checkpoints, persons with keypoints.

    Args:
        config: name of a preset or a YAML file.
        image: height x width in pixels.
        task: where two tasks have a preset of that name.

    Raises:
        ConfigError: no such preset, or the size is no height x width.
    """
    height, _, width = image.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) >= 32 and int(width) >= 32):
        raise ConfigError(f"--image {image}: write height x width in pixels, at least 32, for example 800x600")
    chosen = load_config(task, config)
    found = resolve_task(chosen.task)
    settings = resolve(chosen, found)
    if settings.data.path:
        classes = open_split(found, settings.data.path, settings.data.train_split).classes
    else:
        classes = _coco_classes()
    return trace_model(build_model(settings, found, classes), int(height), int(width))


def _coco_classes() -> ClassMap:
    """COCO's, as far as shapes depend on them; a person's 17 keypoints by name, without limbs."""
    nose, *pairs = COCO_SIGMAS
    names = [nose, *(f"{side}_{part}" for part in pairs for side in ("left", "right"))]
    person, rows = Skeleton.from_category({"keypoints": names}), range(COCO_ROWS)
    skeletons = tuple(person if i == PERSON else None for i in rows)
    return ClassMap(tuple(rows), tuple(map(str, rows)), (True,) * COCO_ROWS, skeletons)


@torch.inference_mode()
def trace_model(model: QueryModel, height: int, width: int) -> list[Step]:
    """The journey of one random image through a given model."""
    model.eval()
    device = next(model.parameters()).device
    pixels = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, device=device)
    size = torch.tensor([[height, width]], device=device)
    images = ImageBatch(pixels, torch.zeros(1, height, width, dtype=torch.bool, device=device), False, size)
    parts = _parts(model)
    # A part that contains others ends after them; the lines stand in the order of the journey.
    found: list[list[Step]] = [[] for _ in parts]
    handles = []

    def watch(module: nn.Module, part: str, what: str, own: list[Step]) -> None:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            name = part + _place(inputs[0]) if isinstance(module, Head) else part
            own.extend(Step(name, label, shape) for label, shape in _shapes(module, what, output))

        handles.append(module.register_forward_hook(hook))

    for (module, part, what), own in zip(parts, found, strict=True):
        watch(module, part, what, own)
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return [Step("image", "pixels, uint8 RGB", _shape(pixels)), *(step for own in found for step in own)]


def _place(view: View) -> str:
    """Where a head was asked, unless it is the last layer."""
    stage = view.stage
    if stage.last:
        return ""
    return {"proposal": ", proposals", "initial": ", first guess"}.get(stage.kind, f", layer {stage.index + 1}")


def _parts(model: QueryModel) -> list[tuple[nn.Module, str, str]]:
    """The parts worth a line, as far as this model has them."""
    pyramid, selected = isinstance(model.neck, Pyramid), isinstance(model.queries, SelectedQueries)
    convolutions = "a convolution a level" if pyramid else "1x1 convolution"
    parts: list[tuple[nn.Module, str, str]] = [
        (model.backbone, "backbone", "feature map"),
        (model.neck, "neck", f"{convolutions} to the width of the transformer"),
    ]
    texts = {
        "flatten": "every cell a token; no patches, no class token",
        "positions": "2-D sine positions, added in attention to queries and keys, not to values",
    }
    tokens = [(getattr(model.encoder, name), name, what) for name, what in texts.items() if hasattr(model.encoder, name)]
    encoder_layers: Any = getattr(model.encoder, "layers", [])
    layers = []
    for index, layer in enumerate(encoder_layers):
        where = "tokens look at all tokens"
        if isinstance(layer, DeformableEncoderLayer):
            where = "tokens look at a few places on every level"
        if isinstance(model.encoder, HybridEncoder):
            where = "the coarsest level's cells look at each other; then levels are fused by convolutions"
        layers.append((layer, f"encoder layer {index + 1}", where))
    parts += [*layers, *tokens] if isinstance(model.encoder, HybridEncoder) else [*tokens, *layers]
    parts.append((model.encoder, "memory", "what the decoder may look at"))
    source = "chosen among the tokens' proposals" if selected else "the decoder's input, not image features"
    parts.append((model.queries, "object queries", source))
    decoder_layers: Any = model.decoder.layers
    for index, layer in enumerate(decoder_layers):
        around = isinstance(layer.cross_attn, DeformableCrossAttention)
        look = "look around their anchors" if around else "look at the memory"
        parts.append((layer, f"decoder layer {index + 1}", f"queries talk to each other, then {look}"))
    parts.append((model.decoder, "decoder", "normed states of the last layer"))
    parts += [(head, f"head '{name}'", "") for name, head in model.heads.items()]
    return parts


def _shapes(module: nn.Module, what: str, output: Any) -> list[tuple[str, str]]:
    """(what, shape) of whatever a part gave out."""
    if isinstance(output, Tensor):
        return [(what, _states_shape(output) if isinstance(module, Decoder | DecoderLayer) else _shape(output))]
    if isinstance(output, Features):
        return [(what, _shape(level)) for level in output.maps]
    if isinstance(output, Memory):
        return [(what, _shape(output.tokens))]
    if isinstance(output, Queries):
        return [(what, _states_shape(output.states))]
    if isinstance(output, dict):
        return [(name, _shape(value)) for name, value in output.items()]
    return []


def _shape(x: Tensor) -> str:
    return f"({','.join(map(str, x.shape))})"


def _states_shape(states: Tensor) -> str:
    """Query states (B,Q,1+P,D); the slot axis is left out where queries have no slots."""
    return _shape(states[:, :, 0] if states.shape[2] == 1 else states)
