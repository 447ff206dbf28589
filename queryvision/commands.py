"""The Python twins of the `qv` commands that use a checkpoint: same names, same defaults. Training stands in `runs`."""

from __future__ import annotations

import inspect
import json as json_module
from collections.abc import Sequence
from pathlib import Path

import torch

from queryvision.assembly import Loaded, build_model, header, load_model, resolve
from queryvision.config import changed, load_config
from queryvision.data.coco import CocoDataset
from queryvision.data.scenes import make_scenes
from queryvision.engine.checkpoint import save_checkpoint
from queryvision.errors import ConfigError, DataError
from queryvision.inference.predictor import Predictor, find_pictures
from queryvision.inference.result_folder import ResultFolder
from queryvision.outputs import writable_file, writable_folder
from queryvision.registry import resolve_task
from queryvision.splits import Evaluation, open_split
from queryvision.task import Evaluator
from queryvision.weights import reader_of
from queryvision.weights.reading import fill


def evaluate(
    checkpoint: str | Path,
    data: str | Path | None = None,
    *,
    split: str | None = None,
    save_json: str | None = None,
    evaluator: str | None = None,
    image_size: int | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    queries: int | None = None,
    layers: int | None = None,
    overlap: float | None = None,
    quiet: bool = False,
) -> dict[str, float]:
    """Measures a checkpoint.

    Args:
        checkpoint: of ours.
        data: folder of the data set; None: the one it was trained on.
        split: which part of it; None: what training evaluated on.
        save_json: write all results there, in COCO's results format; PNGs of segments into a folder of its name.
        evaluator: `auto`, `hotcoco` or `pycocotools`.
        image_size: short side of the input; None: as in training.
        batch_size: images of equal size evaluated at once.
        workers: processes that read images.
        queries: another number of queries than in training, for models that select theirs from proposals.
        layers: how many decoder layers to keep, the first ones.
        overlap: of two boxes with a larger IoU the lower score is dropped, whatever the classes; a remedy for undertrained
            models. None: as in training; 1: none is.
        quiet: no warnings.

    Returns:
        {metric: value}.

    Raises:
        ConfigError: a number is out of range for the model or at all, or `save_json` cannot be written.
        DataError: the data cannot be read, or shares no class with the model.
        CheckpointError: it is no checkpoint of ours.
    """
    loaded = load_model(checkpoint, queries, layers)
    changes = {"data.path": None if data is None else str(data), "data.workers": workers, "data.image_size": image_size}
    judging = {"batch_size": batch_size, "evaluator": evaluator, "overlap": overlap}
    config = changed(loaded.config, {**changes, **{f"evaluation.{key}": value for key, value in judging.items()}})
    results_file = None if save_json is None else writable_file(save_json)
    root = str(make_scenes()) if config.data.path is None else config.data.path
    if data is None and not Path(root).exists():
        raise DataError(f"{root}: what this checkpoint was trained on is not here; name a data set with --data")
    limit = config.data.limit if data is None and split is None else None  # such a run is measured on what it learned from
    dataset = open_split(loaded.task, root, split or (config.data.train_split if limit else config.data.val_split))
    dataset = dataset.subset(limit) if limit else dataset
    _report_classes(loaded, dataset, quiet)
    if dataset.warning() and not quiet:
        print(f"warning: {dataset.warning()}")
    model = loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    metrics, judge = Evaluation(loaded.task, loaded.classes, dataset, config)(model)
    if results_file is not None:
        _save(judge, results_file)
    return metrics


def _save(judge: Evaluator, file: Path) -> None:
    """Writes all results; an evaluator whose records describe further files has a `save` of its own."""
    save = getattr(judge, "save", None)
    if save is None:
        file.write_text(json_module.dumps(judge.records))
    else:
        save(file)


def _report_classes(loaded: Loaded, dataset: CocoDataset, quiet: bool) -> None:
    """Classes are matched by name; none in common is an error, some missing are named."""
    missing = [name for name in dataset.classes.names if name not in loaded.classes.index_of_name]
    if len(missing) == len(dataset.classes):
        theirs, ours = ", ".join(missing[:5]), ", ".join(loaded.classes.names[:5])
        raise DataError(f"{dataset.file}: the model knows none of its classes ({theirs}); it knows {ours} …")
    if missing and not quiet:
        print(f"warning: the model does not know {len(missing)} classes of the data: {', '.join(missing[:10])}")


def predict(
    checkpoint: str | Path,
    sources: str | Path | Sequence[str | Path],
    output: str | Path = "predictions",
    *,
    threshold: float | None = None,
    json: bool = False,
    image_size: int | None = None,
    queries: int | None = None,
    layers: int | None = None,
    overlap: float | None = None,
) -> Path:
    """Draws results onto pictures, as viewers show them: turned as their EXIF says.

    What was done when something ends it is kept, and the JSON files tell about it.

    Args:
        checkpoint: of ours.
        sources: a file, a folder, a glob pattern, or several of them; see `find_pictures`.
        output: folder for the overlays and `results.json` (COCO results format; `image_id` counts the pictures from 1).
        threshold: least score; None: that of the checkpoint's settings.
        json: print the results, too, and nothing else.
        image_size: short side of the input; None: as in training.
        queries: another number of queries than in training, for models that select theirs from proposals.
        layers: how many decoder layers to keep, the first ones.
        overlap: of two boxes with a larger IoU the lower score is dropped, whatever the classes; a remedy for undertrained
            models. None: as in training; 1: none is.

    Returns:
        The output folder.

    Raises:
        ConfigError: a number is out of range for the model or at all, or the results cannot be written.
        DataError: a picture cannot be read; the others are drawn.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(f"threshold = {threshold}: must be at least 0 and at most 1")
    predictor = Predictor(load_model(checkpoint, queries, layers), image_size=image_size, overlap=overlap)
    pictures, folder = find_pictures(sources, output), writable_folder(output)
    found = ResultFolder(predictor, folder, pictures, quiet=json)
    found.fill(threshold)
    summary = f"{len(found.images)} pictures, {len(found.records)} objects -> {folder}"
    print(json_module.dumps(found.records) if json else summary)
    if unread := found.unread:
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        raise DataError(f"{len(unread)} of {len(pictures)} pictures cannot be read: {', '.join(unread[:5])}{more}")
    return folder


def convert(source: str | Path, family: str, output: str | Path, *, dc5: bool | None = None) -> Path:
    """Turns a published checkpoint into one of ours.

    Args:
        source: path or URL.
        family: whose format, a key of `queryvision.weights.FAMILIES`.
        output: file to write.
        dc5: only of `detr`: whether its last stage is dilated; None: told by the file's name.

    Raises:
        CheckpointError: it is something else.
        ConfigError: nobody reads that family, or it knows no `dc5`.
    """
    reader = reader_of(family)
    if dc5 is not None and "dc5" not in inspect.signature(reader.read).parameters:
        raise ConfigError(f"--dc5: checkpoints of --from {family} are never dilated")
    writable_file(output)
    found = reader.read(str(source)) if dc5 is None else reader.read(str(source), dc5)
    task = resolve_task(found.get("task", reader.TASK))
    preset = load_config(task.name, found["config"])
    heads = {name: {**preset.heads.get(name, {}), **given} for name, given in found.get("heads", {}).items()}
    config = resolve(preset.model_copy(update={"model": found["model"], "heads": {**preset.heads, **heads}}), task)
    model = build_model(config, task, found["classes"])
    fill(model, reader.rename(found["state"], model.heads.heads()))
    content = {**header(config, task, found["classes"]), "model": model.state_dict(), "step": 0, "metrics": {}}
    save_checkpoint(Path(output), content)
    print(f"{source} -> {output}: {found['model']['name']}, {len(found['classes'])} classes")
    return Path(output)
