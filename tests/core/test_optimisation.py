"""What is trained how fast: parameter groups, frozen parts, the schedule, the averaged weights."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import WIDTH, TinyBackbone, detection_heads, images, make_targets, tiny_model

from queryvision.config import TrainSettings, load_config
from queryvision.criterion import Criterion
from queryvision.engine.checkpoint import load_checkpoint
from queryvision.engine.optimisation import AveragedWeights, freeze, lr_factor, parameter_groups
from queryvision.engine.trainer import Trainer
from queryvision.errors import CheckpointError, ConfigError
from queryvision.model.query_model import QueryModel
from queryvision.structures import Batch


class NormedBackbone(TinyBackbone):
    """With live batch norm behind its first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def maps(self, pixels):
        return [self.conv2(self.norm(self.conv1(pixels)).relu())]


@pytest.fixture
def model() -> QueryModel:
    """A tiny DETR whose cross-attention has the two modules of deformable attention, and one of them in the backbone, too."""
    torch.manual_seed(0)
    model = tiny_model(detection_heads(), backbone=NormedBackbone())
    model.decoder.layers[0].cross_attn.sampling_offsets = nn.Linear(4, 4)
    model.queries.reference_points = nn.Linear(4, 2)
    model.backbone.sampling_offsets = nn.GroupNorm(2, 4)
    return model


def trained_how(groups) -> dict[str, tuple[float, float]]:
    """{parameter: (learning rate, weight decay)}; the names must be those of the parameters."""
    for group in groups:
        assert len(group["params"]) == len(group["names"])
    pairs = [(name, (group["lr"], group["weight_decay"])) for group in groups for name in group["names"]]
    assert len(dict(pairs)) == len(pairs), "a parameter stands in two groups"
    return dict(pairs)


# ---------------------------------------------------------------------------------------------------- groups
def test_every_parameter_has_its_rate_and_its_decay(model: QueryModel) -> None:
    groups = parameter_groups(model, 1.0, weight_decay=0.5, backbone_lr=0.25, offsets_lr=0.125)
    found, parameters = trained_how(groups), dict(model.named_parameters())
    assert set(found) == set(parameters)
    assert all(p is parameters[n] for g in groups for n, p in zip(g["names"], g["params"], strict=True))
    assert found["encoder.layers.0.ffn.linear1.weight"] == found["queries.positions.weight"] == (1.0, 0.5)
    assert found["backbone.conv1.weight"] == (0.25, 0.5) and found["backbone.conv1.bias"] == (0.25, 0.5)
    assert found["backbone.norm.weight"] == found["backbone.norm.bias"] == (0.25, 0.0)
    assert found["backbone.sampling_offsets.weight"] == (0.25, 0.0), "the backbone's rate is the backbone's"
    assert found["decoder.layers.0.cross_attn.sampling_offsets.weight"] == (0.125, 0.5)
    assert found["queries.reference_points.bias"] == (0.125, 0.5)
    assert found["decoder.norm.weight"] == found["encoder.layers.0.norm1.bias"] == (1.0, 0.0)
    bare = {name for name, (_, decay) in found.items() if not decay}
    assert bare == {name for name in parameters if "norm" in name or name.startswith("backbone.sampling_offsets")}
    assert len({lr for lr, _ in found.values()}) == 3 and groups[0]["lr"] == 1.0


def test_norms_decay_where_they_are_told_to(model: QueryModel) -> None:
    found = trained_how(parameter_groups(model, 1.0, weight_decay=0.5, backbone_lr=0.25, norm_decay=True))
    assert {decay for _, decay in found.values()} == {0.5} and {lr for lr, _ in found.values()} == {1.0, 0.25}


def test_defaults_and_the_published_recipe() -> None:
    assert not TrainSettings().norm_decay and TrainSettings().offsets_lr == 0.1
    for name in ("detr_r50_coco", "detr_r101_coco", "detr_r50_dc5_coco"):
        assert load_config(None, name).train.norm_decay, "published DETR decays every parameter"


# ---------------------------------------------------------------------------------------------------- frozen parts
def test_frozen_parts_are_not_trained(model: QueryModel) -> None:
    names = ["backbone", "heads.labels", "decoder.layers.0", "queries.positions.weight"]
    held = freeze(model, names)
    found = trained_how(parameter_groups(model, 1.0, weight_decay=0.5))
    prefixes = tuple(f"{name}." for name in names[:3])
    wanted = {n for n, _ in model.named_parameters() if not n.startswith(prefixes) and n != names[3]}
    assert set(found) == wanted and "decoder.layers.1.norm1.weight" in wanted
    assert held == [model.backbone.norm]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("backbon", ("no part 'backbon'", "did you mean 'backbone'", "decoder, encoder, heads, neck, queries")),
        ("decoder.layrs.0", ("'decoder.layrs.0'", "did you mean 'layers'", "in 'decoder'", "backbone, neck, encoder, queries")),
        ("heads.label", ("did you mean 'labels'", "in 'heads'")),
        ("decoder.layers.7", ("Valid: 0, 1", "in 'decoder.layers'")),
        ("queries.positions.weight.x", ("'queries.positions.weight.x'", "in 'queries.positions'", "Valid: weight")),
        ("", ("no part ''", "Valid: backbone")),
    ],
)
def test_a_part_that_is_not_there(model: QueryModel, name: str, says: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        freeze(model, ["backbone", name])
    assert all(text in str(error.value) for text in says) and len(str(error.value).splitlines()) == 1


def test_nothing_left_to_train(model: QueryModel) -> None:
    freeze(model, ["backbone", "neck", "encoder", "queries", "decoder", "heads"])
    with pytest.raises(ConfigError, match="nothing to train"):
        parameter_groups(model, 1.0, weight_decay=0.5)


# ---------------------------------------------------------------------------------------------------- in the trainer
def trainer_of(model: QueryModel, folder: Path, steps: int = 2, **settings: object) -> Trainer:
    chosen = TrainSettings(**{"lr": 1e-2, "warmup": 0, "schedule": "flat", "ema": 0, "log_every": 1, **settings})

    def batches(start: int):
        while True:
            yield Batch(images(), make_targets([2, 1]))

    return Trainer(
        model=model, criterion=Criterion(model.heads.heads()), settings=chosen, steps=steps, steps_per_epoch=1, batches=batches,
        evaluate=lambda _: {"AP": 0.0}, main_metric="AP", folder=folder, header={"task": "toy", "classes": {"names": ["a"]}},
    )  # fmt: skip


@pytest.mark.parametrize("settings", [{"freeze": ["backbone", "neck", "decoder.layers.1"]}, {"backbone_lr": 0}])
def test_what_is_frozen_stays_as_it_was(tmp_path: Path, settings: dict[str, object]) -> None:
    """Weights and the statistics of batch norm; the rest moves."""
    model = tiny_model(detection_heads(), backbone=NormedBackbone())
    model.neck.levels[0] = nn.Sequential(model.neck.levels[0], nn.BatchNorm2d(WIDTH))
    before = copy.deepcopy(model.state_dict())
    trainer_of(model, tmp_path, **settings).fit()
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    parts = tuple(f"{part}." for part in settings.get("freeze", ["backbone"]))
    lazy = {"decoder.layers.0.self_attn.in_proj_weight"}  # its states are all zero
    assert {name for name in before if name.startswith(parts)} == same - lazy
    assert "backbone.norm.running_mean" in same and "encoder.layers.0.norm1.weight" not in same
    assert ("neck.levels.0.1.running_mean" in same) == ("freeze" in settings)


def test_batch_norm_that_is_trained_goes_on_counting(tmp_path: Path) -> None:
    model = tiny_model(detection_heads(), backbone=NormedBackbone())
    trainer_of(model, tmp_path).fit()
    assert model.backbone.norm.num_batches_tracked == 2


def test_decay_and_rate_are_those_of_the_settings_when_a_run_goes_on(tmp_path: Path) -> None:
    def model() -> QueryModel:
        return tiny_model(detection_heads(), backbone=NormedBackbone())

    trainer_of(model(), tmp_path, weight_decay=0.25, save_every=1).fit()
    again = trainer_of(model(), tmp_path, steps=3, weight_decay=0.5, lr=0.125, backbone_lr=0.5)
    again.load()
    again.fit()
    found = trained_how(again.state.optimizer.param_groups)
    assert found["encoder.layers.0.norm1.weight"] == (0.125, 0.0), "a norm must not begin to decay"
    assert found["backbone.norm.bias"] == (0.0625, 0.0)
    assert found["backbone.conv1.weight"] == (0.0625, 0.5)
    assert found["decoder.layers.0.ffn.linear1.weight"] == (0.125, 0.5)


@pytest.mark.parametrize("settings", [{"freeze": ["heads.boxes"]}, {"norm_decay": True}, {"freeze": ["decoder.layers.1"]}])
def test_a_run_cannot_go_on_with_other_parts(tmp_path: Path, settings: dict[str, object]) -> None:
    """Also where as many parameters of the same shapes are trained: their moments belong to others."""
    trainer_of(tiny_model(detection_heads()), tmp_path, steps=1, freeze=["decoder.layers.0"]).fit()
    other = trainer_of(tiny_model(detection_heads()), tmp_path, steps=2, **settings)
    with pytest.raises(CheckpointError, match="trained other parts"):
        other.load()


# ---------------------------------------------------------------------------------------------------- schedule and average
def test_the_learning_rate_over_the_steps() -> None:
    def factors(schedule, warmup=0, steps=11):
        return [lr_factor(step, steps, schedule, warmup, flat=0.5, final=0.1, drop_at=0.8) for step in range(steps)]

    assert factors("flat", warmup=3) == [0.25, 0.5, 0.75, *[1.0] * 8]
    assert factors("step") == [*[1.0] * 9, 0.1, 0.1]
    cosine = factors("cosine")
    assert cosine[:6] == [1.0] * 6 and cosine[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(cosine[5:], cosine[6:], strict=False))


def test_averaged_weights_follow_faster_at_first() -> None:
    layer = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = AveragedWeights(layer, decay=0.9, warmup=4)
    wanted = {key: value.clone() for key, value in layer.state_dict().items()}
    for update in range(1, 4):
        with torch.no_grad():
            for value in layer.state_dict().values():
                value.add_(update)
        average.update(layer)
        decay = 0.9 * (1 - math.exp(-update / 4))
        for key, value in layer.state_dict().items():
            follows = decay * wanted[key] + (1 - decay) * value if value.is_floating_point() else value
            wanted[key] = follows.clone()
    assert wanted.keys() == average.model.state_dict().keys()
    for key, value in average.model.state_dict().items():
        torch.testing.assert_close(value, wanted[key])
    assert not average.model.training and not any(p.requires_grad for p in average.model.parameters())
    fresh = AveragedWeights(layer, decay=0.9, warmup=4)
    fresh.load(average.model.state_dict(), average.updates)
    for one in (fresh, average):
        one.update(layer)
    for key, value in average.model.state_dict().items():
        assert torch.equal(value, fresh.model.state_dict()[key]), "an average goes on from a checkpoint as if nothing had been"


@pytest.mark.parametrize(("found", "last"), [((0.1, 0.3, 0.2, 0.3, 0.2, 0.9), 4), ((0.1, 0.3, 0.2, 0.4, 0.2, 0.3), 6)])
def test_patience_ends_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], found: tuple[float, ...], last: int) -> None:
    """After two evaluations without a better one; the last state is saved, and going on does nothing more."""
    trainer = trainer_of(tiny_model(detection_heads()), tmp_path, steps=6, eval_every=1, save_every=6, patience=2)
    values = iter(found)
    trainer.evaluate = lambda _: {"AP": next(values)}
    assert trainer.fit().step == last == load_checkpoint(tmp_path / "last.pt")["step"]
    assert ("no better AP in 2 evaluations" in capsys.readouterr().out) == (last == 4)
    again = trainer_of(tiny_model(detection_heads()), tmp_path, steps=6, eval_every=1, patience=2)
    again.load()
    assert again.fit().step == last and again.progress.best == max(found[:last])
