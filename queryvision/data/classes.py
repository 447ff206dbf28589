"""ClassMap: dataset id <-> contiguous index <-> name. Built from the data, stored in checkpoints, carried by results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from queryvision.data.skeletons import Skeleton
from queryvision.errors import ConfigError, DataError


@dataclass(frozen=True)
class ClassMap:
    """The classes of a model or a data set; index i is row i of a head.

    Attributes:
        ids: dataset (category) id of each class, ascending.
        names: name of each class.
        things: True for countable things, False for stuff.
        skeletons: keypoints of each class, None for a class without; left out: no class has any.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    things: tuple[bool, ...]
    skeletons: tuple[Skeleton | None, ...] = ()

    def __post_init__(self) -> None:
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
        """Builds the map from COCO `categories` (`id`, `name`, optional `isthing`), sorted by id.

        Raises:
            DataError: an entry lacks its id or name, or occurs twice; or see `Skeleton.from_category`.
        """
        rows = []
        for row in categories:
            if not isinstance(row, Mapping) or not isinstance(row.get("id"), int) or not isinstance(row.get("name"), str):
                raise DataError(f"{where}: category {row!r} needs an integer 'id' and a 'name'")
            rows.append((row["id"], row["name"], bool(row.get("isthing", 1)), Skeleton.from_category(row, where)))
        rows.sort(key=lambda row: row[:2])
        if not rows:
            raise DataError(f"{where}: there is no category; a COCO file lists its classes under 'categories'")
        ids, names, things, skeletons = zip(*rows, strict=True)
        return cls(ids, names, things, skeletons)

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
        return found

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ClassMap:
        """Inverse of `to_dict`."""
        ids, names, things = (tuple(value[key]) for key in ("ids", "names", "things"))
        rows = value.get("skeletons", ())
        return cls(ids, names, things, tuple(None if row is None else Skeleton.from_dict(row) for row in rows))

    def union(self, other: ClassMap) -> ClassMap:
        """All classes of both, this map's first.

        Raises:
            ConfigError: a name stands for different ids, for a thing here and stuff there, or for different keypoints.
        """
        ids, names, things, skeletons = list(self.ids), list(self.names), list(self.things), list(self.skeletons)
        for id_, name, thing, skeleton in zip(other.ids, other.names, other.things, other.skeletons, strict=True):
            known = self.index_of_name.get(name)
            if known is None:
                if id_ in self.index_of_id:
                    mine = self.names[self.index_of_id[id_]]
                    raise ConfigError(f"class id {id_} is '{mine}' in one data set and '{name}' in the other; renumber one")
                ids.append(id_)
                names.append(name)
                things.append(thing)
                skeletons.append(skeleton)
            elif None not in (skeleton, skeletons[known]) and skeleton != skeletons[known]:
                raise ConfigError(f"class '{name}' has other keypoints in one data set than in the other")
            elif (self.ids[known], self.things[known]) != (id_, thing):
                raise ConfigError(f"class '{name}' is defined differently (id {self.ids[known]} and {id_}, or thing and stuff)")
            else:
                skeletons[known] = skeletons[known] or skeleton
        return ClassMap(tuple(ids), tuple(names), tuple(things), tuple(skeletons))
