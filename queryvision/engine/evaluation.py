"""The evaluation loop: results of a data set, in pixels of the original images, into the task's evaluator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from queryvision.data.classes import ClassMap
from queryvision.data.loader import ImageInfo
from queryvision.model.query_model import QueryModel
from queryvision.results import Result
from queryvision.structures import Batch, ImageBatch
from queryvision.task import Evaluator, Shareable, Task


@torch.inference_mode()
def results_of(
    model: QueryModel,
    task: Task,
    classes: ClassMap,
    images: ImageBatch,
    sizes: torch.Tensor,
    limit: int,
    paths: list[str],
    overlap: float | None = None,
) -> list[Result]:
    """What the model says about a batch.

    Args:
        model: in evaluation mode.
        task: picks and decodes.
        classes: of the model.
        images: on the model's device.
        sizes: (B,2) height and width of the original images, on the host.
        limit: most results of an image.
        paths: of the images, or empty strings.
        overlap: see `Result.without_overlaps`; None: all stay.

    Returns:
        One result an image, on the host, best first.
    """
    heads, final = model.heads.heads(), model(images).final()
    picks, values = task.decode(heads, final, sizes.to(images.pixels.device), limit)
    results = [
        Result(
            picks.scores[i], picks.classes[i], classes, (height, width), {name: v[i] for name, v in values.items()}, paths[i]
        )
        for i, (height, width) in enumerate(sizes.tolist())
    ]
    results = [result.cpu() for result in (results if task.finish is None else task.finish(heads, final, results))]
    return results if overlap is None else [result.without_overlaps(overlap) for result in results]


def predict_batches(
    model: QueryModel,
    task: Task,
    classes: ClassMap,
    batches: Iterable[tuple[Batch, list[ImageInfo]]],
    limit: int,
    overlap: float | None = None,
) -> Iterator[tuple[ImageInfo, Result]]:
    """Results image by image; the model is put into evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    for batch, infos in batches:
        sizes = torch.tensor([info.size for info in infos])
        paths = [info.path for info in infos]
        results = results_of(model, task, classes, batch.images.to(device), sizes, limit, paths, overlap)
        yield from zip(infos, results, strict=True)


def evaluate(
    model: QueryModel,
    task: Task,
    classes: ClassMap,
    batches: Iterable[tuple[Batch, list[ImageInfo]]],
    evaluator: Evaluator,
    limit: int,
    overlap: float | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Metrics of a model on a data set, the same in every process.

    Args:
        model: any mode; left in evaluation mode.
        task: decodes.
        classes: of the model.
        batches: of `evaluation_loader`, for this process.
        evaluator: of the task; takes in the results, after it those of all processes.
        limit: most results of an image.
        overlap: see `Result.without_overlaps`; None: all stay.
        accelerator: of the run, where there may be several processes.

    Returns:
        {metric: value}.
    """
    for info, result in predict_batches(model, task, classes, batches, limit, overlap):
        evaluator.add(info.image_id, result)
    if accelerator is None or accelerator.num_processes == 1:
        return evaluator.compute()
    if isinstance(evaluator, Shareable):
        evaluator.merge(gather_object([evaluator.state()]))
    found = [evaluator.compute() if accelerator.is_main_process else {}]
    broadcast_object_list(found)
    return found[0]
