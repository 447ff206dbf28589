"""On a GPU: the numbers of the CPU, half precision, no waiting, and runs that go on where they stood. Skipped without one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TASKS, trainer_of
from torch import Tensor

import queryvision
from queryvision import matching
from queryvision.engine.checkpoint import load_checkpoint
from queryvision.engine.memory import BESIDE, PARAMETER, kept
from queryvision.engine.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Terms = dict[str, float]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Float32 in full, and random numbers drawn on the host, so that both devices get the same."""
    draw = torch.rand

    def drawn(*shape: Any, device: Any = None, generator: Any = None, **given: Any) -> Tensor:
        return draw(*shape, generator=torch.Generator().manual_seed(1), **given).to(device or "cpu")

    monkeypatch.setattr(torch, "rand", drawn)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def losses_of(trainer: Trainer, batch: Any, device: str, precision: torch.dtype | None = None) -> tuple[Terms, Terms]:
    """Loss terms, and the norm of each parameter's gradient."""
    model = trainer.state.plain.to(device).train()
    model.zero_grad(set_to_none=True)
    moved = batch.to(device)
    with torch.autocast(device, precision or torch.bfloat16, enabled=precision is not None):
        outputs = model(moved.images, moved.targets)
    losses = trainer.criterion(outputs, moved.targets)
    losses.total.backward()
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    return {name: float(value) for name, value in losses.terms.items()}, norms


@pytest.mark.parametrize("task", TASKS)
def test_a_gpu_computes_what_a_cpu_computes(task: str, tmp_path: Path, exact: None) -> None:
    trainer = trainer_of(task, tmp_path, "model.denoising=10")
    batch = next(trainer.batches(0))
    (terms, norms), (gpu_terms, gpu_norms) = (losses_of(trainer, batch, device) for device in ("cpu", "cuda"))
    assert gpu_terms == pytest.approx(terms, rel=2e-3, abs=1e-4)
    largest = max(norms.values())
    # Proposals of random weights are nearly alike, so the last digit may give a target to another one.
    assert gpu_norms == pytest.approx(norms, rel=5e-2, abs=5e-3 * largest)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("task", TASKS)
def test_half_precision_is_near(task: str, precision: torch.dtype, tmp_path: Path, exact: None) -> None:
    trainer = trainer_of(task, tmp_path, "model.denoising=10")
    batch = next(trainer.batches(0))
    terms, _ = losses_of(trainer, batch, "cuda")
    half, norms = losses_of(trainer, batch, "cuda", precision)
    assert half == pytest.approx(terms, rel=0.15, abs=0.05)
    assert precision == torch.float16 or all(map(math.isfinite, norms.values()))  # fp16 needs its scaler


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("task", TASKS)
def test_the_host_waits_for_the_assignment_alone(
    task: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(task, tmp_path, **{"train.precision": precision})
    assign, calls = matching.assign, []

    def waiting(*given: Any) -> Any:
        calls.append(torch.cuda.get_sync_debug_mode())
        torch.cuda.set_sync_debug_mode("default")
        try:
            return assign(*given)
        finally:
            torch.cuda.set_sync_debug_mode(calls[-1])

    batches = trainer.batches(0)
    trainer.log = _Quiet()  # type: ignore[assignment]
    for step in range(2):  # what is made once may wait
        trainer._step(step, batches)
    monkeypatch.setattr(matching, "assign", waiting)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._step(2, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert calls == [2]
    assert not trainer.health.read(0)[0]


class _Quiet:
    def advance(self, *_: Any) -> None:
        """Shows nothing."""

    say = advance


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_breaks_and_goes_on(task: str, precision: str, tmp_path: Path) -> None:
    """Of the eight steps, the sixth fails once."""
    settings = ["data.limit=8", "model.num_queries=20", "train.warmup=0", "train.save_every=4", "evaluation.pictures=1"]
    step, broken = Trainer._step, [5]

    def breaking(self: Trainer, number: int, batches: Any) -> None:
        if number in broken:
            raise MemoryError(broken.pop())
        step(self, number, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", breaking)
        with pytest.raises(MemoryError):
            queryvision.train(
                task, image_size=64, batch_size=4, weights="none", steps=8, workers=2, output=tmp_path, precision=precision,
                settings=settings,
            )  # fmt: skip
    (last,) = tmp_path.rglob("last.pt")
    assert load_checkpoint(last)["step"] == 4
    folder = queryvision.train(resume=last.parent)
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert metrics and all(map(math.isfinite, metrics.values()))
    assert load_checkpoint(last)["step"] == 8 and (folder / "predictions.png").exists()


@pytest.mark.parametrize("task", ["detection", "instance"])
def test_what_is_kept_is_what_the_device_holds(task: str, tmp_path: Path) -> None:
    trainer = trainer_of(task, tmp_path, **{"data.image_size": 320})
    model, batch = trainer.state.plain.train(), next(trainer.batches(0)).to("cuda")
    guess = kept(model, trainer.criterion, batch)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    losses = trainer.criterion(model(batch.images, batch.targets), batch.targets)
    held = torch.cuda.memory_allocated() - before
    losses.total.backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert guess == pytest.approx(held, rel=0.25)
    assert peak < BESIDE * guess + 4 * PARAMETER * sum(p.numel() for p in model.parameters())


def test_compiled_parts_train(tmp_path: Path) -> None:
    words = {"image_size": 64, "batch_size": 4, "weights": "none", "steps": 6, "output": tmp_path}
    settings = ["data.limit=8", "model.num_queries=20", "train.warmup=0", "evaluation.pictures=0", "data.multiple=64",
                "train.compile=[backbone, encoder, decoder.layers]"]  # fmt: skip
    folder = queryvision.train("detection", **words, settings=settings)  # type: ignore[arg-type]
    assert load_checkpoint(folder / "last.pt")["step"] == 6
