"""`qv`: a thin face of the Python functions. Heavy imports wait until a command runs."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer

from queryvision.allocation import tune_allocation
from queryvision.parsing import NEWEST, Commands, run_app
from queryvision.weights import FAMILIES

app = typer.Typer(
    cls=Commands,
    help="Query-based vision: one core, one engine, pluggable heads.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Make, check and view data sets.")
app.add_typer(data_app, name="data")

COUNT = "<int> or auto"
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, as in `qv config`.")]
Queries = Annotated[int | None, typer.Option(help="Number of queries, for models that select theirs from proposals.")]
Layers = Annotated[int | None, typer.Option(help="How many decoder layers to keep, the first ones.")]
Overlap = Annotated[float | None, typer.Option(help="Drop the lower score of two boxes with a larger IoU, 0 to 1.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def train(
    task: Annotated[str | None, typer.Option(help="Which task; see `qv tasks`.")] = None,
    config: Annotated[str | None, typer.Option(help="Name of a preset or a YAML file; see `qv config`.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder of the data set. Without: the embedded drawn scenes.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data, instead of steps.")] = None,
    batch_size: Annotated[str | None, typer.Option(metavar=COUNT, help="Images a step and device; as many as fit.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    image_size: Annotated[
        str | None, typer.Option(metavar=COUNT, help="Short side of the input in pixels; chosen from the data.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="none, imagenet, torchvision:NAME, timm:NAME, a path or URL.")] = None,
    devices: Annotated[int | None, typer.Option(help="Number of processes.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16, or auto: bf16 where the device computes in it.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that read images.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the run, a folder under OUTPUT/TASK.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of all runs.")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="[RUN]", help="Go on with the newest run of this name, or with RUN.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse data with a bad annotation.")] = False,
    set_: Set = None,
    debug: Debug = False,
) -> None:
    """Train, evaluate, and leave a run folder with checkpoints, metrics, curves and pictures."""
    from queryvision.runs import train as run

    flags: dict[str, Any] = {
        "data": data, "steps": steps, "epochs": epochs, "batch_size": batch_size, "lr": lr, "image_size": image_size,
        "weights": weights, "devices": devices, "precision": precision, "workers": workers, "seed": seed, "name": name,
        "output": output, "strict": strict or None,
    }  # fmt: skip
    again: bool | str = resume is not None and (True if resume == NEWEST else resume)
    run(task, config, resume=again, settings=set_ or (), **flags)


@app.command()
def profile(
    task: Annotated[str | None, typer.Option(help="Which task; see `qv tasks`.")] = None,
    config: Annotated[str | None, typer.Option(help="Name of a preset or a YAML file; see `qv config`.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder of the data set. Without: the embedded drawn scenes.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps that are measured.")] = 10,
    batch_size: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Short side of the input in pixels.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16, or auto: bf16 where the device computes in it.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that read images.")] = None,
    set_: Set = None,
    debug: Debug = False,
) -> None:
    """Measure where the time of a training step goes."""
    from queryvision.profiling import profile as run

    found = run(
        task, config, data=data, steps=steps, batch_size=batch_size, image_size=image_size, precision=precision,
        workers=workers, settings=set_ or (),
    )  # fmt: skip
    print("\n".join(found.lines()))


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint of ours.")],
    data: Annotated[str | None, typer.Option(help="Folder of the data set. Without: what it was trained on.")] = None,
    split: Annotated[str | None, typer.Option(help="Which part of it. Without: what training evaluated on.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
    save_json: Annotated[str | None, typer.Option(help="Write all results there, in COCO's results format.")] = None,
    evaluator: Annotated[str | None, typer.Option(help="auto, hotcoco or pycocotools.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Short side of the input in pixels.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images of equal size evaluated at once.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = 0,
    queries: Queries = None,
    layers: Layers = None,
    overlap: Overlap = None,
    debug: Debug = False,
) -> None:
    """Measure a checkpoint on a data set."""
    from queryvision.commands import evaluate as run

    metrics = run(
        checkpoint, data, split=split, save_json=save_json, evaluator=evaluator, image_size=image_size,
        batch_size=batch_size, workers=workers, queries=queries, layers=layers, overlap=overlap, quiet=json,
    )  # fmt: skip
    if json:
        print(json_module.dumps(metrics, indent=2))
    else:
        for key, value in metrics.items():
            print(f"{key:24s} {value:.4f}")


@app.command()
def predict(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint of ours.")],
    sources: Annotated[list[str], typer.Argument(help="Pictures, folders, glob patterns.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for overlays and results.json.")] = "predictions",
    threshold: Annotated[float | None, typer.Option(min=0, max=1, help="Least score. Without: the checkpoint's.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the COCO results instead of a summary.")] = False,
    image_size: Annotated[int | None, typer.Option(help="Short side of the input in pixels.")] = None,
    queries: Queries = None,
    layers: Layers = None,
    overlap: Overlap = None,
    debug: Debug = False,
) -> None:
    """Draw what a model sees onto pictures."""
    from queryvision.commands import predict as run

    run(
        checkpoint, sources, output, threshold=threshold, json=json, image_size=image_size, queries=queries, layers=layers,
        overlap=overlap,
    )  # fmt: skip


@app.command()
def trace(
    config: Annotated[str, typer.Option(help="Name of a preset or a YAML file.")] = "detr_r50_coco",
    image: Annotated[str, typer.Option(help="Height x width in pixels.")] = "800x600",
    task: Annotated[str | None, typer.Option(help="Where two tasks have a preset of that name.")] = None,
    debug: Debug = False,
) -> None:
    """Print the journey of an image through a model, measured on the running model."""
    from queryvision.tracing import trace as run

    rows = run(config, image, task=task)
    widths = [max(len(r.part) for r in rows), max(len(r.shape) for r in rows)]
    for row in rows:
        print(f"{row.part:{widths[0]}s}  {row.shape:{widths[1]}s}  {row.what}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Path or URL of a published checkpoint.")],
    family: Annotated[str, typer.Option("--from", help=f"Whose format: {', '.join(FAMILIES)}.")],
    output: Annotated[str, typer.Option("--output", "-o", help="File to write.")],
    dc5: Annotated[bool | None, typer.Option(help="detr: dilated last stage; without: told by the name.")] = None,
    debug: Debug = False,
) -> None:
    """Turn a published checkpoint into one of ours."""
    from queryvision.commands import convert as run

    run(source, family, output, dc5=dc5)


@app.command()
def tasks(debug: Debug = False) -> None:
    """List the tasks."""
    from queryvision.registry import resolve_task, task_names

    for name in task_names():
        print(f"{name:12s} {resolve_task(name).summary}")


@app.command()
def config(
    name: Annotated[str | None, typer.Argument(help="A preset or a YAML file. Without: the list of presets.")] = None,
    task: Annotated[str | None, typer.Option(help="Where two tasks have a preset of that name.")] = None,
    set_: Set = None,
    debug: Debug = False,
) -> None:
    """Print the whole resolved settings of a preset, with their documentation; or list the presets."""
    from queryvision.config import presets

    if name is None:
        for path in presets():
            first = path.read_text().splitlines()[0].removeprefix("# ")
            print(f"{path.parent.name}/{path.stem:24s} {first}")
        return
    from queryvision.describe import describe

    print(describe(name, task, set_ or ()))


@data_app.command(name="make")
def data_make(
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder; without: the cache.")] = None,
    train: Annotated[int | None, typer.Option(min=1, help="Training images.")] = None,
    val: Annotated[int | None, typer.Option(min=1, help="Validation images.")] = None,
    size: Annotated[int | None, typer.Option(min=64, help="Longest side in pixels.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    debug: Debug = False,
) -> None:
    """Draw the embedded data set and write it as COCO files."""
    from queryvision.data.scenes import make_scenes

    chosen = {key: value for key, value in {"train": train, "val": val, "size": size}.items() if value is not None}
    print(make_scenes(output, seed=seed, **chosen))


@data_app.command(name="check")
def data_check(
    path: Annotated[str, typer.Argument(help="Folder of a data set.")],
    task: Annotated[str | None, typer.Option(help="Whose annotations to check. Without: all, in all files.")] = None,
    debug: Debug = False,
) -> None:
    """Report every problem of a data set with file and annotation id; exit code 1 if there is one."""
    from queryvision.data.check import check
    from queryvision.registry import resolve_task

    found = None if task is None else resolve_task(task)
    parts = () if found is None else found.parts or (found,)
    reports = [check(path, part.needs, part.source) for part in parts] or [check(path)]
    print("\n".join(line for report in reports for line in report.lines()))
    raise typer.Exit(0 if all(report.ok for report in reports) else 1)


@data_app.command(name="view")
def data_view(
    path: Annotated[str | None, typer.Argument(help="Folder of a data set. Without: the embedded one.")] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="Picture to write.")] = "data.png",
    task: Annotated[str, typer.Option(help="Whose annotations to show.")] = "detection",
    split: Annotated[str, typer.Option(help="Which part.")] = "train",
    augmentation: Annotated[str, typer.Option(help="detr, light, strong, lsj, flip or none.")] = "light",
    image_size: Annotated[int, typer.Option(help="Short side in pixels.")] = 256,
    count: Annotated[int, typer.Option(min=1, help="Number of samples.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice and the augmentation.")] = 0,
    debug: Debug = False,
) -> None:
    """Write a grid of annotated samples as they look after augmentation."""
    from queryvision.data.scenes import make_scenes
    from queryvision.data.skeletons import flip_orders
    from queryvision.data.transforms import training_transform
    from queryvision.data.view import view
    from queryvision.registry import resolve_task
    from queryvision.splits import open_split

    dataset = open_split(resolve_task(task), str(make_scenes()) if path is None else path, split)
    transform = training_transform(augmentation, image_size, flip_orders(dataset.classes.skeletons))
    view(dataset, transform, output, count=count, seed=seed)
    print(output)


def main() -> None:
    """Entry point."""
    tune_allocation()
    run_app(app)


if __name__ == "__main__":
    main()
