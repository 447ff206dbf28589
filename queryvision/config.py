"""Typed settings: a YAML file names what differs from the defaults, `--set section.key=value` what differs from the file.

A default lives in one place: here for the engine and the data, in a builder's signature for `model.*`, in a head's constructor
for `heads.<head>.*`. An unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from queryvision.errors import ConfigError, nearest
from queryvision.settings_file import parse_setting, read_settings

PRESETS = Path(__file__).parent / "configs"


class Settings(BaseModel):
    """Base of all sections: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class DataSettings(Settings):
    """What to learn from."""

    path: str | None = Field(None, min_length=1, description="folder of the data set; empty: the embedded drawn scenes")
    train_split: str = Field("train", description="name of the split to train on")
    val_split: str = Field("val", description="name of the split to evaluate on")
    image_size: Annotated[int, Field(ge=32)] | Literal["auto"] = Field(
        128, description="short side in pixels, or auto: chosen from the data; the long side is capped at 1333/800 of it"
    )
    augmentation: Literal["strong", "lsj", "flip", "detr", "light", "none"] = Field(
        "light", description="strong: RT-DETR's, then flip; detr: as published; light; lsj: large-scale jitter; flip; none"
    )
    mosaic: float = Field(0.0, ge=0, le=1, description="probability that four images share one")
    mixup: float = Field(0.0, ge=0, le=1, description="probability that a second image is blended in")
    copy_blend: float = Field(0.0, ge=0, le=1, description="probability that objects of another image are blended in")
    strong_until: float = Field(
        0.9, ge=0, le=1, description="share of all steps with strong, mosaic, mixup and copy_blend, where they are on"
    )
    multiple: int = Field(1, ge=1, description="sides of a training batch are multiples of so many px: fewer shapes to compile")
    skip_empty: bool = Field(False, description="train on images with an object only")
    limit: int | None = Field(None, ge=1, description="use only so many training images, and evaluate on the same ones")
    workers: int = Field(0, ge=0, description="processes that read images; 0: the training process itself")
    cache: str | None = Field(None, min_length=1, description="folder that keeps decoded images for all processes and runs")
    strict: bool = Field(False, description="refuse a data set with a bad annotation instead of dropping it")

    @property
    def side(self) -> int:
        """The image size, once it is chosen.

        Raises:
            ConfigError: it is still to be chosen from data.
        """
        if self.image_size == "auto":
            raise ConfigError("data.image_size = auto is chosen when a training starts; give a number: --image-size 256")
        return self.image_size


class TrainSettings(Settings):
    """How to learn."""

    steps: int | None = Field(None, ge=1, description="optimiser steps; give this or epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the training images; give this or steps")
    min_steps: int = Field(0, ge=0, description="with epochs: at least so many steps, for small data sets")
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        8, description="images a step and device, or auto: as many as fit into memory, at most 64; lr stays as it is"
    )
    accumulate: int = Field(1, ge=1, description="batches summed up for one optimiser step")
    lr: float = Field(1e-4, gt=0, description="AdamW learning rate of the transformer and the heads")
    backbone_lr: float = Field(0.1, ge=0, description="the backbone's learning rate as a share of lr; 0: not trained")
    offsets_lr: float = Field(0.1, gt=0, description="the same for what places deformable attention's points; never 0")
    freeze: list[str] = Field([], description="parts that are not trained: backbone, heads.labels, decoder.layers.0 ...")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay")
    norm_decay: bool = Field(False, description="whether weights and biases of norms decay, too, as in the published DETR")
    clip: float = Field(0.1, ge=0, description="largest norm of the gradient; 0: no clipping")
    bad_steps: int = Field(5, ge=1, description="steps in a row without finite losses and gradients that end a run")
    schedule: Literal["cosine", "step", "flat"] = Field("cosine", description="after warm-up: flat, then cosine; step; flat")
    warmup: int = Field(100, ge=0, description="steps over which the learning rate rises from 0")
    flat: float = Field(0.5, ge=0, le=1, description="cosine: share of all steps before the learning rate falls")
    final: float = Field(0.01, ge=0, le=1, description="cosine: last learning rate as a share of the first")
    drop_at: float = Field(2 / 3, gt=0, le=1, description="step: share of all steps after which the rate is a tenth")
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights, which are evaluated; 0: no average")
    ema_warmup: int = Field(200, ge=1, description="steps over which the decay rises")
    recompute: list[str] = Field([], description="parts computed once more in the backward pass, for memory: backbone, encoder")
    compile: list[str] = Field([], description="parts run by torch.compile, for speed: backbone, encoder, decoder.layers")
    precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        "fp32", description="of the forward pass, losses are always fp32; auto: bf16 where the device computes in it, else fp32"
    )
    devices: int | None = Field(None, ge=1, description="processes, a GPU each; empty: as many as a launcher started, else 1")
    shard: bool = Field(False, description="share out weights, gradients and moments among the processes (FSDP2)")
    seed: int = Field(0, ge=0, description="of weights, order, augmentation and dropout")
    log_every: int = Field(20, ge=1, description="steps between lines of metrics.csv")
    eval_every: int = Field(200, ge=1, description="steps between evaluations; the last step is always evaluated")
    patience: int = Field(0, ge=0, description="evaluations in a row without a better main metric that end a run; 0: none do")
    save_every: int = Field(100, ge=1, description="steps between checkpoints; the last step is always saved")

    @property
    def images(self) -> int:
        """The batch size, once it is chosen.

        Raises:
            ConfigError: it is still to be chosen.
        """
        if self.batch_size == "auto":
            raise ConfigError("train.batch_size = auto is chosen when a training starts; give a number: --batch-size 8")
        return self.batch_size


class EvaluationSettings(Settings):
    """How to measure and to show."""

    batch_size: int = Field(8, ge=1, description="images of equal size evaluated at once")
    max_results: int = Field(100, ge=1, description="most results of an image, as in COCO AP")
    evaluator: Literal["auto", "hotcoco", "pycocotools"] = Field("auto", description="auto: hotcoco where it imports")
    threshold: float = Field(0.5, ge=0, le=1, description="least score that is drawn")
    overlap: float | None = Field(
        None, ge=0, le=1, description="of two boxes with a larger IoU the lower score is dropped; empty: none is"
    )
    pictures: int = Field(12, ge=0, description="validation images in the picture grid")


class Config(Settings):
    """A whole run."""

    task: str = Field("detection", description="a name of `qv tasks`, a dotted module, or several joined by +")
    name: str = Field("run", pattern=r"^[^./\\][^/\\]*$", description="of the run, a folder under output/<task>")
    output: str = Field("runs", min_length=1, description="folder of all runs")
    weights: str = Field("none", description="none, imagenet, torchvision:NAME, timm:NAME, a path or a URL; one of ours, too")
    model: dict[str, Any] = Field(default_factory=dict, description="name of a builder and its keyword arguments")
    heads: dict[str, dict[str, Any]] = Field(default_factory=dict, description="keyword arguments of each head")
    data: DataSettings = Field(default_factory=DataSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)

    @field_validator("task")
    @classmethod
    def _one_name(cls, name: str) -> str:
        return task_name(name)


def task_name(name: str) -> str:
    """One name for a task: several of the package's own are the same in any order, `a+b`; with others the first one leads."""
    return name if "." in name else "+".join(sorted(name.split("+")))


def load_config(
    task: str | None = None,
    config: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    settings: Sequence[str] = (),
) -> Config:
    """Reads a preset or a file and lays overrides over it.

    Args:
        task: name of the task; where no `config` is given, its `default.yaml`, or `custom.yaml` if `data.path` is overridden.
        config: name of a preset or path of a YAML file.
        overrides: {"section.key": value}; None values are left out.
        settings: `section.key=value`, the value in YAML.

    Raises:
        ConfigError: no such preset, unknown key, wrong value.
    """
    changes = {key: value for key, value in (overrides or {}).items() if value is not None}
    changes |= dict(parse_setting(text) for text in settings)
    task = None if task is None else task_name(task)
    path, values = _chosen(task, config, custom=changes.get("data.path") is not None)
    if task is not None:
        if config is not None and task_name(values.get("task", task)) != task:
            raise ConfigError(f"{path}: this configuration is for task '{values['task']}', not '{task}'")
        values["task"] = task
    if "train.steps" in changes and "train.epochs" not in changes:
        values.get("train", {}).pop("epochs", None)
    if "train.epochs" in changes and "train.steps" not in changes:
        values.get("train", {}).pop("steps", None)
        values.get("train", {}).pop("min_steps", None)  # a floor under the file's epochs, not under other ones
    for key, value in changes.items():
        _put(values, key, value)
    result = make_config(values)
    if (result.train.steps is None) == (result.train.epochs is None):
        raise ConfigError("train: give either train.steps or train.epochs (--steps or --epochs)")
    return result


def _chosen(task: str | None, config: str | None, custom: bool) -> tuple[Path | None, dict[str, Any]]:
    """A preset or a file and what it says. A joint task without a preset takes its first part's.

    What the others say about heads counts where they have the same architecture.
    """
    path = find_preset(task, config, custom)
    values = _read(path)
    if path is None and task is not None and "+" in task:
        names = task.split("+")
        path = find_preset(names[0], None, custom)
        values = _read(path)
        for name in names[1:]:
            other = _read(find_preset(name, None, custom))
            if other.get("model", {}).get("name") == values.get("model", {}).get("name"):
                values["heads"] = {**other.get("heads", {}), **values.get("heads", {})}
    return path, values


def _read(path: Path | None) -> dict[str, Any]:
    """What a file says, checked, so that what is wrong in it is told with its name; None says nothing."""
    values = read_settings(path) if path else {}
    make_config(values, str(path))
    return values


def make_config(values: Mapping[str, Any], where: str = "") -> Config:
    """Checks plain values; `where` they come from is told with what is wrong.

    Raises:
        ConfigError: unknown key or wrong value.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}{': ' if where else ''}{explain(error, Config)}") from error


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with other values: {"section.key": value}; None values are left out.

    Raises:
        ConfigError: unknown key or wrong value.
    """
    values = config.model_dump()
    for key, value in changes.items():
        if value is not None:
            _put(values, key, value)
    return make_config(values)


def find_preset(task: str | None, config: str | None, custom: bool = False) -> Path | None:
    """The YAML file of a preset's name or a path; None for a task that has no preset of its own.

    A task from elsewhere (`package.module`) brings its own beside its module: `default.yaml`, `custom.yaml`.

    Raises:
        ConfigError: there is no such preset or file.
    """
    if config is None:
        folder = _folder_of(task or "detection")
        files = [folder / name for name in (["custom.yaml", "default.yaml"] if custom else ["default.yaml"])]
        mine = files[:1] if folder.parent == PRESETS else files  # of a stranger's task, one may serve both
        return next((path for path in mine if path.exists()), None)
    if Path(config).suffix in (".yaml", ".yml") or Path(config).is_file():
        if not Path(config).is_file():
            raise ConfigError(f"there is no configuration file {config}")
        return Path(config)
    mine = [p for p in presets() if task is None or p.parent.name == task]
    found = [p for p in mine if config in (p.stem, f"{p.parent.name}/{p.stem}")]
    if not found:
        raise ConfigError(f"there is no configuration '{config}'; {nearest(config, {p.stem for p in mine})}")
    usual = [p for p in found if p.parent.name == (task or "detection")]
    if len(found) > 1 and len(usual) == 1:
        return usual[0]
    if len(found) > 1:
        names = ", ".join(f"{p.parent.name}/{p.stem}" for p in found)
        raise ConfigError(f"several tasks have a configuration '{config}': {names}; choose with --task")
    return found[0]


def _folder_of(task: str) -> Path:
    """Where a task's presets lie."""
    if "." not in task or "+" in task:
        return PRESETS / task
    try:
        found = find_spec(task)
    except (ImportError, ValueError):
        found = None
    return Path(found.origin).parent if found is not None and found.origin else PRESETS / task


def presets() -> list[Path]:
    """All configurations that come with the package."""
    return sorted(PRESETS.glob("*/*.yaml"))


def arguments(function: Callable[..., Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checks settings against the keyword-only arguments of a builder or a head.

    Returns:
        All of them, with defaults filled in.

    Raises:
        ConfigError: unknown key or wrong type; `where` is named.
    """
    target = function.__init__ if inspect.isclass(function) else function
    hints = get_type_hints(target)
    keywords = [p for p in inspect.signature(target).parameters.values() if p.kind is p.KEYWORD_ONLY]
    fields: dict[str, Any] = {p.name: (hints.get(p.name, Any), ... if p.default is p.empty else p.default) for p in keywords}
    rules = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    model = create_model("Arguments", __config__=rules, **fields)
    try:
        checked = model.model_validate(dict(given))
    except ValidationError as error:
        raise ConfigError(explain(error, model, where)) from error
    return {name: getattr(checked, name) for name in fields}


def explain(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """The first complaint of pydantic as one line for people."""
    first, *others = error.errors()
    tags = ("constrained-int", "literal[")  # which member of a union it was
    names = [where, *(str(part) for part in first["loc"] if not str(part).startswith(tags))]
    key = ".".join(name for name in names if name)
    if first["type"] == "extra_forbidden":
        return f"there is no setting '{key}'; {nearest(str(first['loc'][-1]), _fields(model, first['loc'][:-1]))}"
    if first["type"] == "model_type" and key:
        return f"{key} = {first['input']!r}: a section holds settings, such as {key}.{next(iter(_fields(model, first['loc'])))}"
    words = [e["ctx"]["expected"] for e in others if e["type"] == "literal_error" and e["loc"][:-1] == first["loc"][:-1]]
    return f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}{''.join(f', or {word}' for word in words)}"


def _fields(model: Any, path: Sequence[int | str]) -> dict[str, Any]:
    """The settings of a section."""
    for part in path:
        model = model.model_fields[part].annotation
    return model.model_fields  # type: ignore[no-any-return]


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {key}: '{section}' is a setting, not a section")
    values[last] = value
