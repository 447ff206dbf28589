"""Where a training run starts from: a checkpoint of ours, perhaps with other classes, or a backbone's weights.

Tensors of the same name and shape are copied. Rows of per-class parameters (`Head.class_rows`) follow the class by its name.
A table of learned queries (under `queries.`) of another length gives its first rows. Whatever is not loaded is listed.
"""

from __future__ import annotations

import re
import textwrap
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from queryvision.data.classes import ClassMap
from queryvision.engine.checkpoint import FORMAT, load_checkpoint
from queryvision.errors import CheckpointError
from queryvision.model.query_model import QueryModel
from queryvision.weights.sources import fetch, load_backbone

TABLES = "queries."
"""Prefix of parameters whose first axis may be the queries."""


@dataclass
class Taken:
    """What a model took over from a checkpoint; every tensor of either side stands somewhere in it."""

    loaded: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)  # of the model, whose rows were carried over
    new: list[str] = field(default_factory=list)  # classes of the model that the checkpoint does not know
    left: list[str] = field(default_factory=list)  # classes of the checkpoint that the model does not know
    tables: list[str] = field(default_factory=list)  # queries of another number, of which the first rows were taken
    missing: list[str] = field(default_factory=list)  # of the model, not in the checkpoint
    misfit: list[str] = field(default_factory=list)  # of the model, of another shape in the checkpoint
    strange: list[str] = field(default_factory=list)  # of the model, a row a class, of which none is known there
    unused: list[str] = field(default_factory=list)  # of the checkpoint


def start_from(model: QueryModel, classes: ClassMap, source: str) -> str:
    """Fills a model, or its backbone, with the weights that a run starts from.

    Args:
        model: to be filled.
        classes: of the model.
        source: a path or URL of a checkpoint of ours; everything else goes to `load_backbone`.

    Returns:
        Lines for the log: what was loaded from where, and what was not.

    Raises:
        ConfigError: the source does not fit the backbone.
        CheckpointError: it cannot be read, or nothing of it fits.
    """
    path = None if source in ("none", "imagenet") else _our_file(source)
    return load_backbone(model.backbone, source) if path is None else _fine_tune(model, classes, path)


def _our_file(source: str) -> Path | None:
    """The file of a checkpoint of ours, told by its head alone; None: it is something else."""
    path = fetch(source)
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return path if any(FORMAT.encode() in archive.read(name) for name in names) else None
    except (zipfile.BadZipFile, OSError):
        return None  # whoever reads it says what is wrong


def _fine_tune(model: QueryModel, classes: ClassMap, path: Path) -> str:
    content = load_checkpoint(path)
    state = content.get("ema", content.get("model"))
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds no weights where they should be")
    try:
        known = ClassMap.from_dict(content["classes"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its classes are malformed") from error
    taken = take_over(model, classes, state, known)
    _check_fit(model, taken, content, path)
    return _report(taken, content, path)


def take_over(model: QueryModel, classes: ClassMap, state: Mapping[str, Tensor], known: ClassMap) -> Taken:
    """Copies what fits into a model; what does not keeps its value.

    Args:
        model: to be filled.
        classes: of the model.
        state: weights by their names in another such model.
        known: classes of that model.
    """
    pairs = match_classes(classes, known)
    per_class = _per_class(model)
    taken = Taken(classes=[classes.names[i] for i in pairs], new=[n for i, n in enumerate(classes.names) if i not in pairs])
    taken.left = [name for index, name in enumerate(known.names) if index not in pairs.values()]
    own = model.state_dict()
    for name, mine in own.items():
        if name not in state:
            taken.missing.append(name)
            continue
        rows = None
        if name in per_class:
            rows = _class_rows(mine, state[name], len(classes), len(known), pairs)
        elif mine.shape == state[name].shape:
            mine.copy_(state[name])
            taken.loaded.append(name)
            continue
        elif name.startswith(TABLES) and _same_but_rows(mine, state[name]):
            rows = [(i, i) for i in range(min(len(mine), len(state[name])))]
            taken.tables.append(f"the first {len(rows)} rows of {name} ({len(state[name])} there, {len(mine)} here)")
        if rows == []:
            taken.strange.append(name)
        elif rows is not None:
            mine_rows, their_rows = zip(*rows, strict=True)
            mine[list(mine_rows)] = state[name][list(their_rows)].to(mine)
            taken.loaded.append(name)
        else:
            taken.misfit.append(f"{name} {tuple(state[name].shape)} there, {tuple(mine.shape)} here")
    used = set(taken.loaded)
    taken.unused = [name for name in state if name not in used and not _counter(name)]
    taken.missing = [name for name in taken.missing if not _counter(name)]
    return taken


def match_classes(mine: ClassMap, theirs: ClassMap) -> dict[int, int]:
    """Index here -> index there of classes of the same name; where none is, of the same name in other case."""
    pairs = {i: theirs.index_of_name[name] for i, name in enumerate(mine.names) if name in theirs.index_of_name}
    free = {name.casefold(): i for name, i in reversed(theirs.index_of_name.items()) if i not in pairs.values()}
    for index, name in enumerate(mine.names):
        if index not in pairs and name.casefold() in free:
            pairs[index] = free.pop(name.casefold())
    return dict(sorted(pairs.items()))


def _per_class(model: QueryModel) -> set[str]:
    """Names of the parameters whose first axis is the classes, by what the heads declare."""
    return {
        f"heads.{head}.{name}"
        for head, part in model.heads.heads().items()
        for name in part.state_dict()
        if any(re.fullmatch(pattern, name) for pattern in part.class_rows)
    }


def _class_rows(mine: Tensor, theirs: Tensor, here: int, there: int, pairs: Mapping[int, int]) -> list[tuple[int, int]] | None:
    """(row here, row there) of a per-class tensor; rows behind the classes are the last (no object). None: it does not fit."""
    if not _same_but_rows(mine, theirs):
        return None
    extra = len(mine) - here
    if extra != len(theirs) - there:
        return None
    return [*pairs.items(), *((here + i, there + i) for i in range(extra))]


def _same_but_rows(mine: Tensor, theirs: Tensor) -> bool:
    return mine.ndim == theirs.ndim > 0 and mine.shape[1:] == theirs.shape[1:]


def _counter(name: str) -> bool:
    """Batch norm's counter of batches, which nothing depends on."""
    return name.endswith("num_batches_tracked")


def _check_fit(model: QueryModel, taken: Taken, content: Mapping[str, Any], path: Path) -> None:
    """Refuses another architecture; the model is not to be used after that.

    Raises:
        CheckpointError: nothing fits, or nothing of the backbone.
    """
    config = content.get("config")
    settings = config.get("model") if isinstance(config, Mapping) else None
    made = f" (it was made with {_described(settings)})" if isinstance(settings, Mapping) else ""
    if not taken.loaded:
        raise CheckpointError(f"{path}: none of its tensors fits this model; take the model it was made with{made}")
    trunk = any(name.startswith("backbone.") for name in model.state_dict())
    if trunk and not any(name.startswith("backbone.") for name in taken.loaded):
        name = getattr(model.backbone, "name", type(model.backbone).__name__)
        raise CheckpointError(f"{path}: nothing of it fits the backbone '{name}'; take the model it was made with{made}")


def _described(settings: Mapping[str, Any]) -> str:
    chosen = [f"model.{key}={settings[key]}" for key in ("name", "backbone") if key in settings]
    return ", ".join(chosen) or "other settings"


def _report(taken: Taken, content: Mapping[str, Any], path: Path) -> str:
    total = sum(map(len, (taken.loaded, taken.missing, taken.misfit, taken.strange)))
    where = f"{path} (task {content.get('task', '?')}, step {content.get('step', '?')})"
    lines = [
        f"weights: {len(taken.loaded)} of {total} tensors from {where}",
        *_line("classes carried over by name", taken.classes),
        *_line("new classes", taken.new),
        *_line("classes left behind", taken.left, always=False),
        *_line("queries", taken.tables, always=False),
        *_line("not loaded", taken.missing, always=not (taken.misfit or taken.strange)),
        *_line("not loaded, of another shape", taken.misfit, always=False),
        *_line("not loaded, no class in common", taken.strange, always=False),
        *_line("not used", taken.unused),
    ]
    return "\n".join(lines)


def _line(title: str, names: Sequence[str], always: bool = True) -> list[str]:
    if not names and not always:
        return []
    text = f"  {title}: {', '.join(names) or 'nothing'}"
    return textwrap.wrap(text, 128, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
