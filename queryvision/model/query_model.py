"""The whole model: backbone, neck, encoder, queries, decoder and the heads' panel.

Legend: B images, Q queries, P slots, N memory tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from queryvision.errors import ConfigError
from queryvision.head import Feedback, Head, Scene, Steering
from queryvision.model.backbone import Backbone
from queryvision.model.backbone_base import filled_up
from queryvision.model.cross_attention import Look
from queryvision.model.decoder import Decoder
from queryvision.model.denoising import Denoising
from queryvision.model.groups import Entry, make_rounds, unseen
from queryvision.model.panel import Panel
from queryvision.model.queries import Carried, carry
from queryvision.ops.pixels import normalised
from queryvision.structures import Answer, ImageBatch, Outputs, Stage, Targets


class QueryModel(nn.Module):
    """A query-based vision model made of parts; what it answers is a matter of its heads.

    Args:
        backbone: pixels -> Features.
        neck: Features -> Features of width D.
        encoder: Features -> Memory.
        queries: (Memory, Panel, contexts, the decoder's norm) -> Queries; has `num_queries`.
        decoder: Queries and Memory -> states, asking the heads on the way.
        heads: in the order in which they answer.
        steering: who steers; nobody in DETR.
        denoising: adds denoising queries in training; None: no denoising.
        pixels: (Features of the backbone, Memory) -> Memory with a pixel map; None: no head reads one.
        canvas: images are filled up to multiples of this many pixels, and all padding counts as image, as published Mask2Former
            has it; None: padding is masked.

    Raises:
        ConfigError: the steering and the heads do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        neck: nn.Module,
        encoder: nn.Module,
        queries: nn.Module,
        decoder: Decoder,
        heads: Sequence[Head],
        steering: Steering | None = None,
        denoising: Denoising | None = None,
        pixels: nn.Module | None = None,
        canvas: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.encoder = encoder
        self.queries = queries
        self.decoder = decoder
        self.heads = Panel(heads, steering or Steering())
        self.denoising = denoising
        self.pixels = pixels
        self.canvas = canvas
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1) * 255, persistent=False)

    @property
    def steering(self) -> Steering:
        """Who steers."""
        return self.heads.steering

    @property
    def num_queries(self) -> int:
        """Size of the main group, without carried queries."""
        return int(self.queries.num_queries)  # type: ignore[arg-type]

    def set_num_queries(self, count: int) -> None:
        """Another number of queries from now on, where they are selected among proposals.

        Raises:
            ConfigError: they are learned one by one, or the number is out of range.
        """
        choose = getattr(self.queries, "set_num_queries", None)
        if choose is None:
            raise ConfigError(f"queries = {count}: this model's {self.num_queries} queries are learned one by one")
        choose(count)

    def keep_layers(self, count: int) -> None:
        """Leaves out the decoder layers after the first `count` (early exit).

        Raises:
            ConfigError: there are not so many, or none is wanted.
        """
        layers = self.decoder.layers
        if not 1 <= count <= len(layers):
            raise ConfigError(f"layers = {count}: must be at least 1 and at most {len(layers)}")
        self.decoder.layers = layers[:count]

    def group_sizes(self, counts: Sequence[int]) -> dict[str, tuple[int, int]]:
        """{query group: (queries, repeats)} of a training step on images with so many targets; known beforehand."""
        groups = {"main": (self.num_queries, 1)}
        if self.denoising is not None:
            groups["denoising"] = (self.denoising.size(counts), self.denoising.num_groups(counts))
        return groups

    def normalise(self, images: ImageBatch) -> ImageBatch:
        """Pixels 0..255 (uint8) -> normalised for the backbone, zero in the padding; floating pixels pass as they are."""
        if images.pixels.is_floating_point():
            return images
        pixels = normalised(images.pixels, self.mean, self.std)
        if images.padded:
            pixels = pixels.masked_fill(images.padding[:, None], 0.0)
        return replace(images, pixels=pixels)

    def forward(
        self,
        images: ImageBatch,
        targets: Targets | None = None,
        *,
        carried: Carried | None = None,
        extras: Mapping[str, Any] | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Outputs:
        """Predicts.

        Args:
            images: uint8, or floating and already normalised.
            targets: needed for denoising in training, ignored otherwise.
            carried: queries that join the main group (tracks).
            extras: handed to the heads' `prepare` (a prompt).
            generators: one an image, for the heads' noise.

        Returns:
            Rounds; at inference only what the last stage (and whoever steers) said.
        """
        images = self.normalise(images)
        if self.canvas is not None:
            images = replace(images, pixels=filled_up(images.pixels, self.canvas), padded=False)
        trunk = self.backbone(images)
        features = self.neck(trunk)
        memory = self.encoder(features)
        if self.pixels is not None:
            memory = self.pixels(trunk, memory)
        contexts = self.heads.prepare(Scene(memory, features, trunk, extras or {}))
        queries = self.queries(memory, self.heads, contexts, self.decoder.norm)
        if carried is not None:
            queries = carry(queries, carried)
        if self.training and self.denoising is not None and targets is not None:
            queries = self.denoising(queries, targets, self.heads, generators)
        entries: list[Entry] = []
        states: list[Tensor] = []  # of the layers so far

        def ask(stage: Stage, normed: Tensor, raw: Tensor, look: Look, once: Tensor | None = None) -> Feedback:
            previous: Mapping[str, Answer] = entries[-1][1] if entries else {}
            earlier = states[-1] if states else None
            answers, feedback = self.heads.answer(stage, normed, raw, look, previous, contexts, earlier, once=once)
            entries.append((stage, answers))
            if stage.kind == "layer":
                states.append(normed)
            return feedback

        hidden = unseen(queries.groups, len(memory.tokens), memory.tokens.device)
        self.decoder(queries, memory, hidden, ask)
        return Outputs([*queries.rounds, *make_rounds(entries, queries.groups, contexts)])
