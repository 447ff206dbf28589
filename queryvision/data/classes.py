"""ClassMap: dataset id <-> contiguous index <-> name. Built from the data, stored in checkpoints, carried by results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from queryvision.data.skeletons import Skeleton
from queryvision.errors import ConfigError, DataError

Color = tuple[int, int, int]


@dataclass(frozen=True)
class ClassMap:
    """The classes of a model or a data set; index i is row i of a head.

    Attributes:
        ids: dataset (category) id of each class, ascending.
        names: name of each class.
        things: True for countable things, False for stuff.
        skeletons: keypoints of each class, None for a class without; left out: no class has any.
        colors: what segments of each class are drawn in, RGB, None for any; left out: no class says.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    things: tuple[bool, ...]
    skeletons: tuple[Skeleton | None, ...] = ()
    colors: tuple[Color | None, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not self.colors:
            object.__setattr__(self, "colors", (None,) * len(self.ids))
        if not self.skeletons:
            object.__setattr__(self, "skeletons", (None,) * len(self.ids))
        if not len(self.ids) == len(self.names) == len(self.things) == len(self.skeletons):
            raise ValueError(f"{len(self.ids)} ids, {len(self.names)} names, {len(self.things)} things")
        for kind, values in (("id", self.ids), ("name", self.names)):
            twice = {str(v) for v in values if list(values).count(v) > 1}
            if twice:
                raise DataError(f"categories: {kind} {', '.join(sorted(twice))} occurs twice; make each unique")

    @classmethod
    def from_categories(cls, categories: Iterable[Mapping[str, Any]], where: str = "categories") -> ClassMap:
        """Builds the map from COCO `categories` (`id`, `name`, optional `isthing` and `color`), sorted by id.

        Raises:
            DataError: an entry lacks its id or name, or occurs twice; or see `Skeleton.from_category`.
        """
        rows = []
        for row in categories:
            if not isinstance(row, Mapping) or not isinstance(row.get("id"), int) or not isinstance(row.get("name"), str):
                raise DataError(f"{where}: category {row!r} needs an integer 'id' and a 'name'")
            skeleton, color = Skeleton.from_category(row, where), _color(row.get("color"))
            rows.append((row["id"], row["name"], bool(row.get("isthing", 1)), skeleton, color))
        rows.sort(key=lambda row: row[:2])
        if not rows:
            raise DataError(f"{where}: there is no category; a COCO file lists its classes under 'categories'")
        return cls(*zip(*rows, strict=True))

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.ids)

    @cached_property
    def index_of_id(self) -> dict[int, int]:
        """Dataset id -> contiguous index."""
        return {id_: index for index, id_ in enumerate(self.ids)}

    @cached_property
    def index_of_name(self) -> dict[str, int]:
        """Name -> contiguous index."""
        return {name: index for index, name in enumerate(self.names)}

    def to_dict(self) -> dict[str, list[Any]]:
        """Plain lists, for checkpoints and JSON."""
        skeletons = [None if skeleton is None else skeleton.to_dict() for skeleton in self.skeletons]
        found: dict[str, list[Any]] = {"ids": list(self.ids), "names": list(self.names), "things": list(self.things)}
        if any(skeletons):
            found["skeletons"] = skeletons
        if any(self.colors):
            found["colors"] = [None if color is None else list(color) for color in self.colors]
        return found

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ClassMap:
        """Inverse of `to_dict`."""
        ids, names, things = (tuple(value[key]) for key in ("ids", "names", "things"))
        skeletons = tuple(None if row is None else Skeleton.from_dict(row) for row in value.get("skeletons", ()))
        return cls(ids, names, things, skeletons, tuple(_color(row) for row in value.get("colors", ())))

    def union(self, other: ClassMap) -> ClassMap:
        """All classes of both, this map's first.

        Raises:
            ConfigError: a name stands for different ids, for a thing here and stuff there, or for different keypoints.
        """
        ids, names, things = list(self.ids), list(self.names), list(self.things)
        skeletons, colors = list(self.skeletons), list(self.colors)
        for id_, name, thing, skeleton, color in zip(
            other.ids, other.names, other.things, other.skeletons, other.colors, strict=True
        ):
            known = self.index_of_name.get(name)
            if known is None:
                if id_ in self.index_of_id:
                    mine = self.names[self.index_of_id[id_]]
                    raise ConfigError(f"class id {id_} is '{mine}' in one data set and '{name}' in the other; renumber one")
                ids.append(id_)
                names.append(name)
                things.append(thing)
                skeletons.append(skeleton)
                colors.append(color)
            elif None not in (skeleton, skeletons[known]) and skeleton != skeletons[known]:
                raise ConfigError(f"class '{name}' has other keypoints in one data set than in the other")
            elif (self.ids[known], self.things[known]) != (id_, thing):
                raise ConfigError(f"class '{name}' is defined differently (id {self.ids[known]} and {id_}, or thing and stuff)")
            else:
                skeletons[known] = skeletons[known] or skeleton
        return ClassMap(tuple(ids), tuple(names), tuple(things), tuple(skeletons), tuple(colors))


def _color(value: Any) -> Color | None:
    """RGB, if it is a colour and not black, which is void."""
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in value):
        return None
    return (value[0], value[1], value[2]) if any(value) else None
