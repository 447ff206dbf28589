"""Losses and gradients that are not finite: named, left out, and the end of a run only when they stay."""

from __future__ import annotations

import csv
import dataclasses
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from samples import targets_of
from test_optimisation import NormedBackbone
from torch import Tensor
from toys import detection_heads, images, tiny_model

from queryvision.config import TrainSettings
from queryvision.criterion import Criterion
from queryvision.engine.checkpoint import load_checkpoint
from queryvision.engine.health import Health
from queryvision.engine.stopping import Stopped
from queryvision.engine.trainer import Trainer
from queryvision.errors import CheckpointError, QueryVisionError
from queryvision.structures import Batch

SPOILED = 66  # an image id


class Cliff(torch.autograd.Function):
    """Zero, with an infinite slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.inf


class Spoiling(Criterion):
    """Whose box term, or gradient, is not finite for one image."""

    how = "loss"

    def __call__(self, outputs: Any, targets: Any, *given: Any) -> Any:
        losses = super().__call__(outputs, targets, *given)
        if SPOILED not in targets.image_ids:
            return losses
        if self.how == "weightless":  # nothing of it reaches the gradient
            return SimpleNamespace(total=losses.total, terms={**losses.terms, "boxes.giou": losses.terms["boxes.giou"] / 0})
        if self.how == "gradient":
            return SimpleNamespace(total=losses.total + Cliff.apply(losses.total), terms=losses.terms)
        nan = losses.terms["boxes.giou"] * torch.nan
        return SimpleNamespace(total=losses.total * torch.nan, terms={**losses.terms, "boxes.giou": nan})


def run(
    folder: Path,
    bad: tuple[int, ...],
    how: str = "loss",
    pixels: bool = False,
    steps: int = 6,
    accelerator: Accelerator | None = None,
    **settings: Any,
) -> Trainer:
    """A toy run whose steps `bad` meet the image; with `pixels` they are infinite, too."""
    torch.manual_seed(0)
    model = tiny_model(detection_heads(), backbone=NormedBackbone())
    chosen = TrainSettings(**{"lr": 1e-2, "warmup": 0, "schedule": "flat", "ema": 0, "log_every": 3, **settings})

    def batches(start: int) -> Iterator[Batch]:
        number = start
        while True:
            spoiled = number // chosen.accumulate in bad
            seen = images()
            if spoiled and pixels:
                seen = dataclasses.replace(seen, pixels=torch.full_like(seen.pixels, torch.inf))
            yield Batch(seen, dataclasses.replace(targets_of([[0, 1], [2]]), image_ids=(5, SPOILED if spoiled else 6)))
            number += 1

    criterion = Spoiling(model.heads.heads())
    criterion.how = how
    return Trainer(
        model=model, criterion=criterion, settings=chosen, steps=steps, steps_per_epoch=1, batches=batches,
        evaluate=lambda _: {"AP": 0.0}, main_metric="AP", folder=folder, header={"task": "toy", "classes": {"names": ["a"]}},
        accelerator=accelerator,
    )  # fmt: skip


def scaling() -> Accelerator:
    """As with fp16 on a GPU, without the fp16; its scaler cannot scale less."""
    accelerator = Accelerator(cpu=True)
    scaler = accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    accelerator.unscale_gradients = lambda _=None: scaler.unscale_(accelerator._optimizers[0].optimizer)  # type: ignore[method-assign]
    return accelerator


@pytest.mark.parametrize(("how", "named"), [("loss", "boxes.giou"), ("weightless", "boxes.giou"), ("gradient", "the gradient")])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_bad_step_is_named_and_left_out(
    tmp_path: Path, capsys: Any, how: str, named: str, accumulate: int, scaled: bool
) -> None:
    """Weights and moments as if it had not been; the means of the log are those of the other steps."""
    trainer = run(tmp_path / "bad", (1,), how, accelerator=scaling() if scaled else None, accumulate=accumulate)
    trainer.fit()
    told = [line for line in capsys.readouterr().out.splitlines() if "finite" in line]
    ids = ", ".join(["5, 66"] * accumulate)
    assert told == [f"warning: step 2: {named} is not finite (images {ids}): the step is left out"]
    plain = run(tmp_path / "plain", (), steps=5, accumulate=accumulate)
    plain.fit()
    for name, value in plain.state.plain.state_dict().items():
        assert torch.equal(value, trainer.state.plain.state_dict()[name]), name
    rows = list(csv.DictReader((tmp_path / "bad" / "metrics.csv").read_text().splitlines()))
    assert all(torch.tensor(float(row[f"loss/{name}"])).isfinite() for row in rows for name in ("boxes.giou", "labels.class"))
    saved = load_checkpoint(tmp_path / "bad" / "last.pt")
    assert saved["step"] == 6 and all(state["step"] == 5 for state in saved["optimizer"]["state"].values())


def test_pixels_that_are_not_finite_leave_no_trace_in_batch_norm(tmp_path: Path) -> None:
    trainer = run(tmp_path, (2,), pixels=True)
    trainer.fit()
    assert all(value.isfinite().all() for value in trainer.state.plain.state_dict().values())
    assert trainer.state.plain.backbone.norm.num_batches_tracked == 5


def test_bad_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    """The last checkpoint stays; from it the count goes on."""
    with pytest.raises(QueryVisionError) as error:
        run(tmp_path, (4, 5, 6), bad_steps=3, save_every=2, steps=9).fit()
    assert str(error.value).startswith(
        "step 7: boxes.giou is not finite (images 5, 66), one of 3 bad steps in a row, 5 to 7; the last checkpoint is kept"
    )
    last = load_checkpoint(tmp_path / "last.pt")
    assert last["step"] == 6 and last["log"]["in_row"] == 2
    assert all(value.isfinite().all() for value in last["model"].values())
    again = run(tmp_path, (6,), bad_steps=3, steps=9)
    again.load()
    with pytest.raises(QueryVisionError, match="step 7: .* 3 bad steps in a row, 5 to 7"):
        again.fit()


def test_the_first_of_bad_steps_is_named(tmp_path: Path) -> None:
    """It is what people look for; those after it may have other reasons."""
    with pytest.raises(QueryVisionError, match=r"^step 3: boxes.giou is .* 66\), one of 3 bad steps in a row, 3 to 5;"):
        run(tmp_path, (0, 2, 3, 4), bad_steps=3, log_every=20).fit()


def test_the_average_is_evaluated_and_best(tmp_path: Path) -> None:
    seen = []
    trainer = run(tmp_path, (), ema=0.5)
    trainer.evaluate = lambda model: seen.append(model) or {"AP": 0.5}
    trainer.fit()
    last, best = (load_checkpoint(tmp_path / name) for name in ("last.pt", "best.pt"))
    assert seen == [trainer.state.average.model]
    assert all(torch.equal(value, last["ema"][key]) for key, value in best["model"].items())
    assert any(not torch.equal(value, last["model"][key]) for key, value in best["model"].items())


def test_a_step_without_room_loses_nothing_before_it(tmp_path: Path) -> None:
    """Statistics of norms and random numbers are put back: the run goes on as if it had never been tried."""
    trainer = run(tmp_path / "a", (), save_every=100)
    tried = trainer.criterion.__call__

    class Full(Criterion):
        def __call__(self, outputs: Any, targets: Any, *given: Any) -> Any:
            if trainer.progress.step == 4:
                torch.rand(3)  # as dropout does
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nAnd more.")
            return tried(outputs, targets, *given)

    trainer.criterion = Full(trainer.state.plain.heads.heads())
    with pytest.raises(QueryVisionError, match="memory for step 5, the state before it is saved; try a smaller"):
        trainer.fit()
    last, drawn = load_checkpoint(tmp_path / "a" / "last.pt"), torch.Generator().manual_seed(trainer.settings.seed).get_state()
    assert last["step"] == 4 and torch.equal(last["rng"][0]["torch"], drawn)
    again = run(tmp_path / "a", ())
    again.load()
    again.fit()
    whole = run(tmp_path / "b", ())
    whole.fit()
    for name, value in whole.state.plain.state_dict().items():
        assert torch.equal(value, again.state.plain.state_dict()[name]), name


def test_a_checkpoint_that_does_not_say_where_it_stood_is_one_line(tmp_path: Path) -> None:
    run(tmp_path, (), steps=1).fit()
    content = load_checkpoint(tmp_path / "last.pt")
    torch.save({**content, "log": {"unheard": 1}}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="lacks where its run stood"):
        run(tmp_path, ()).load()


def test_half_a_step_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run(tmp_path, (), save_every=2)
    follow = trainer.state.follow

    def full() -> None:
        if trainer.progress.step == 3:
            raise torch.OutOfMemoryError
        follow()

    monkeypatch.setattr(trainer.state, "follow", full)
    with pytest.raises(QueryVisionError, match="not the memory for step 4; try"):
        trainer.fit()
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_breaks_off_an_evaluation_that_is_made_up_for(tmp_path: Path, name: signal.Signals) -> None:
    trainer = run(tmp_path, (), eval_every=2)

    def evaluate(model: Any) -> dict[str, float]:
        signal.raise_signal(name)
        pytest.fail("went on")

    before, trainer.evaluate = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)], evaluate
    with pytest.raises(Stopped, match=f"{name.name}: stopped after step 2; go on with") as stopped:
        trainer.fit()
    assert stopped.value.code == 128 + name and [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    again = run(tmp_path, (), eval_every=2)
    again.load()
    again.fit()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows if row["val/AP"]] == ["2", "4", "6"]


def test_a_scaler_that_has_nothing_left_to_scale_down_does_not_hide_the_gradient() -> None:
    """Its first overflows are its own affair, not those that no scale mends."""
    weight = torch.ones(1, requires_grad=True)
    optimizer, scaler = torch.optim.SGD([weight]), torch.amp.GradScaler("cpu", init_scale=4.0)
    accelerator: Any = SimpleNamespace(scaler=scaler, num_processes=1)
    health = Health(torch.nn.Module(), accelerator, limit=3)
    for step in range(1, 6):
        scaler.scale((weight * torch.nan).sum()).backward()
        scaler.unscale_(optimizer)
        health.end(step, weight.grad.norm(), {"loss": torch.ones(())}, [7])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    health.steps, late = health.steps[:4], health.steps[4:]
    lines, in_row = health.read(0)
    assert lines == [f"step {n}: the gradient is not finite (images 7): the step is left out" for n in (3, 4)] and in_row == 2
    health.steps = late
    with pytest.raises(QueryVisionError, match="step 5: the gradient is not finite .* 3 bad steps in a row, 3 to 5"):
        health.read(in_row)


def test_bad_steps_that_are_not_in_a_row_do_not(tmp_path: Path) -> None:
    run(tmp_path, (0, 1, 3, 4), bad_steps=3).fit()
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 6
