"""Results: what a model says about one image, in pixels of the original image.

Letters: k objects, K keypoints. Boxes are (x1, y1, x2, y2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor
from torchvision.ops import nms

from queryvision.data.classes import ClassMap
from queryvision.masks import MaskSource, SegmentMasks
from queryvision.ops.boxes import tight_boxes


@dataclass
class Result:
    """What the model says about one image, best first, in pixels of the original image."""

    scores: Tensor  # (k,)
    labels: Tensor  # (k,) int64 contiguous class index; `names` are their names
    classes: ClassMap
    size: tuple[int, int]  # height, width of the original image
    values: Mapping[str, Tensor | MaskSource]  # {field: (k,...)}: boxes (k,4) x1 y1 x2 y2, masks, keypoints (k,K,3)
    path: str = ""
    maps: Mapping[str, Tensor] = field(default_factory=dict)  # of the whole image: semantic (H,W) int64 class index, -1 unknown
    whole: Result | None = None  # of joint tasks: all objects, before a task made one map of them

    def __len__(self) -> int:
        """Number of objects."""
        return len(self.scores)

    def __getattr__(self, name: str) -> Tensor:
        """A field of `values`: `result.boxes` ...; masks are built now, (k,H,W) bool; without boxes they give those."""
        values: Mapping[str, Tensor | MaskSource] = self.__dict__.get("values", {})
        if name in values:
            value = values[name]
            return value if isinstance(value, Tensor) else value.build()
        if name == "boxes" and "masks" in values:
            masks = values["masks"]
            return tight_boxes(masks) if isinstance(masks, Tensor) else masks.boxes()
        raise AttributeError(f"this result holds {['scores', 'labels', 'names', *values]}, no '{name}'")

    @property
    def names(self) -> list[str]:
        """The class name of each object."""
        return [self.classes.names[i] for i in self.labels.tolist()]

    def cpu(self) -> Result:
        """The same on the host."""
        values = {name: value.cpu() for name, value in self.values.items()}
        maps = {name: value.cpu() for name, value in self.maps.items()}
        whole = None if self.whole is None else self.whole.cpu()
        return replace(self, scores=self.scores.cpu(), labels=self.labels.cpu(), values=values, maps=maps, whole=whole)

    def above(self, threshold: float) -> Result:
        """Only the objects with a score of at least `threshold`."""
        return self._only(self.scores >= threshold)

    def without_overlaps(self, most: float) -> Result:
        """Greedy and whatever the classes: of two boxes with an IoU above `most` the lower score goes. Without boxes: all stay.

        A DETR that is trained to the end gives no duplicates; this is a remedy for one that is not, and costs objects that
        truly overlap. Segments of one map, which share no pixel, all stay.
        """
        if most >= 1 or not self._has_boxes:
            return self
        whole = None if self.whole is None else self.whole.without_overlaps(most)
        if isinstance(self.values.get("masks"), SegmentMasks):
            return replace(self, whole=whole)
        boxes = self.boxes
        found = replace(self, values={**self.values, "boxes": boxes}, whole=whole)
        return found._only(nms(boxes.float(), self.scores.float(), most))

    @property
    def _has_boxes(self) -> bool:
        return "boxes" in self.values or "masks" in self.values

    def _only(self, keep: Tensor) -> Result:
        values = {name: value[keep] for name, value in self.values.items()}
        return replace(self, scores=self.scores[keep], labels=self.labels[keep], values=values)

    def to_supervision(self) -> Any:
        """As `supervision.Detections`.

        Raises:
            ImportError: `supervision` is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision() needs the package: pip install supervision") from error
        if not self._has_boxes:
            raise AttributeError(f"supervision needs boxes; this result holds {list(self.values)}")
        return supervision.Detections(
            xyxy=self.boxes.cpu().numpy(),
            mask=self.masks.cpu().numpy() if "masks" in self.values else None,
            confidence=self.scores.cpu().numpy(),
            class_id=self.labels.cpu().numpy(),
            data={"class_name": np.array(self.names)},
        )
