"""Time and memory of a published model against a named peer, side by side in one run, interleaved.

    python scripts/benchmark_step.py --peer transformers [--model detr deformable dino rtdetrv2 dfine]
                                     [--only training inference compiled onnx assignment criterion memory laptop]
                                     [--rounds 7] [--device cuda] [--half] [--apart]

Models: `rtdetrv2` has a ResNet-18 and `dfine` an HGNetv2-B0, the others a ResNet-50. `deformable` is the two-stage Deformable
DETR; `dino` has 900 queries and feed-forward parts of 2048, and its peer is a two-stage Deformable DETR of the same sizes
(without denoising queries, which `transformers` does not have: the figure `same work` leaves them out of ours, too).
Training step: forward, loss, backward, AdamW, at 2x480x640. Inference: 1x800x1066, of the last two 1x640x640; `laptop` adds the
model of `qv train --data` at that size beside both peers, `compiled` ours with compiled parts beside the eager peer, and with
`onnx` beside ONNX Runtime on the same model, exported (needs onnx, onnxscript and onnxruntime).
Assignment: costs and matching of 6 layers x 16 images x 100 or 300 queries x 20 targets against the published way (a matrix
over all images, layer by layer). Criterion: the same and losses with their gradients, all layers at once and layer by layer.
Peak memory is that of a process of its own which imports what its side needs and does three training steps: of all of it,
above what it took once its model was made, and of its tensors (what counts on a GPU). `--half` runs both sides in bfloat16
(autocast). `--apart`: each model has a process of its own in training steps, inference and memory, and that of the peer manages
memory as glibc does, as its users run it; without, both keep what they free (`queryvision.allocation`), as `qv` does. Needs the
test extra.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from step_models import CLASSES, REAL_TIME, OnnxRuntime, Ours, Transformers, random_targets, training_work

from queryvision.allocation import tune_allocation
from queryvision.structures import Round, Stage, Targets


@dataclass(frozen=True)
class Where:
    """What both sides run on."""

    device: str
    half: bool
    apart: bool

    def ours(self, name: str, compiled: bool = False) -> Ours | Apart:
        make = Apart if self.apart else Ours
        return make(name, compiled, self.device, self.half)

    def peer(self, name: str, dropout: float = 0.1) -> Transformers | Apart:
        make = Apart if self.apart else Transformers
        return make(name, dropout, self.device, self.half)

    def tune(self, side: str) -> None:
        """Memory as that side has it."""
        if side == "ours" or not self.apart:
            tune_allocation()


class Apart:
    """A side in a process of its own; takes the arguments of `Ours` (compiled) or of `Transformers` (dropout)."""

    def __init__(self, name: str, variant: bool | float, device: str, half: bool) -> None:
        side = "ours" if isinstance(variant, bool) else "peer"
        run = [sys.executable, __file__, "--serve", json.dumps([side, name, variant, device, half]), "--apart"]
        self.process = subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ask({})

    def _ask(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        if not any(line == "done\n" for line in self.process.stdout):
            raise SystemExit("a process that was measured has ended")

    def close(self) -> None:
        """Ends it, and waits until its memory is free."""
        self.process.kill()
        self.process.communicate()

    def train(self, pixels: torch.Tensor, targets: Targets) -> None:
        self._ask({"train": list(pixels.shape)})

    def infer(self, pixels: torch.Tensor) -> None:
        self._ask({"infer": list(pixels.shape)})


def end(sides: Iterable[Any]) -> None:
    """Ends those that have a process of their own."""
    for side in sides:
        if isinstance(side, Apart):
            side.close()


def serve(side: str, name: str, variant: bool | float, device: str, half: bool) -> None:
    """Does what its parent writes, and says when it is done."""
    model: Any = (Ours if side == "ours" else Transformers)(name, variant, device, half)  # type: ignore[arg-type]
    torch.manual_seed(0)  # for both sides the same images and objects
    work: dict[str, tuple[Any, ...]] = {}
    for line in sys.stdin:
        for kind, shape in json.loads(line).items():
            if kind not in work:
                work[kind] = training_work(device, shape[0]) if kind == "train" else (torch.randn(shape, device=device),)
            getattr(model, kind)(*work[kind])
        now()
        print("done", flush=True)


def now() -> float:
    """Seconds; on a GPU, of work that is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(name: str, ours: Callable[[], Any], peer: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Median milliseconds of both, measured in turns after one unmeasured turn each."""
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for turn in range(rounds + 1):
        for key, work in (("ours", ours), ("peer", peer)):
            began = now()
            work()
            if turn:
                times[key].append(1000 * (now() - began))
    a, b = statistics.median(times["ours"]), statistics.median(times["peer"])
    spread = max((max(t) - min(t)) / statistics.median(t) for t in times.values())
    print(f"{name:52s} ours {a:8.1f} ms   peer {b:8.1f} ms   ratio {a / b:.2f}   spread {spread:.0%}", flush=True)
    return {"name": name, "ours_ms": a, "peer_ms": b, "ratio": a / b}


def published_matching(logits: torch.Tensor, boxes: torch.Tensor, targets: Targets) -> None:
    """The published way (detr:models/matcher.py), as a plain sketch: one matrix over all images, layer by layer."""
    from scipy.optimize import linear_sum_assignment
    from torchvision.ops import generalized_box_iou

    from queryvision.ops.boxes import cxcywh_to_xyxy

    labels, wanted = targets["labels"].flatten(), targets["boxes"].flatten(0, 1)
    for layer_logits, layer_boxes in zip(logits, boxes, strict=True):
        probability, found = layer_logits.flatten(0, 1).softmax(-1), layer_boxes.flatten(0, 1)
        giou = generalized_box_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))
        cost = 5 * torch.cdist(found, wanted, p=1) - probability[:, labels] - 2 * giou
        parts = cost.view(*layer_logits.shape[:2], -1).cpu().split(list(targets.counts), -1)
        [linear_sum_assignment(part[index]) for index, part in enumerate(parts)]


def layers_of(where: Where, queries: int) -> tuple[dict[str, Any], list[Round], Targets]:
    """DETR's heads, and what six layers answer on 16 images of 20 objects each."""
    from queryvision.tasks.detection import BoxHead, LabelHead

    logits = torch.randn(6, 16, queries, CLASSES + 1, device=where.device)
    boxes = torch.rand(6, 16, queries, 4, device=where.device) * 0.4 + 0.1
    answers = {"labels": {"logits": logits}, "boxes": {"boxes": boxes}}
    round = Round("main", tuple(Stage("layer", i, i == 5) for i in range(6)), answers, {}, {})
    return {"labels": LabelHead(8, CLASSES), "boxes": BoxHead(8)}, [round], random_targets(16, 20, where.device)


def criterion(where: Where, rounds: int, queries: int) -> list[dict[str, Any]]:
    """Costs, assignment, losses and their gradients: all layers at once, and the same layer by layer, as published."""
    from queryvision.criterion import Criterion
    from queryvision.structures import Outputs

    heads, (whole,), targets = layers_of(where, queries)
    judge = Criterion(heads)

    def once(chosen: slice) -> None:
        answers = {head: {k: v[chosen].clone().requires_grad_() for k, v in a.items()} for head, a in whole.answers.items()}
        judge(Outputs([replace(whole, answers=answers, stages=whole.stages[chosen])]), targets).total.backward()

    name = f"criterion 6x16x{queries}x20 / layer by layer"
    return [interleaved(name, lambda: once(slice(6)), lambda: [once(slice(i, i + 1)) for i in range(6)], max(rounds, 15))]


def assignment(where: Where, rounds: int, queries: int) -> list[dict[str, Any]]:
    from transformers.loss.loss_for_object_detection import HungarianMatcher

    from queryvision.matching import match

    heads, layers, targets = layers_of(where, queries)
    logits, boxes = (layers[0].answers[head][field] for head, field in (("labels", "logits"), ("boxes", "boxes")))
    peer = HungarianMatcher(1, 5, 2)
    rows = [{"class_labels": c, "boxes": b} for c, b in zip(targets["labels"], targets["boxes"], strict=True)]
    results = []

    def ours() -> None:
        match(layers, heads, targets)

    def layer_by_layer() -> None:
        for index in range(6):
            peer({"logits": logits[index], "pred_boxes": boxes[index]}, rows)

    for name, work in (("published way", lambda: published_matching(logits, boxes, targets)), ("transformers", layer_by_layer)):
        results.append(interleaved(f"assignment 6x16x{queries}x20 / {name}", ours, work, max(rounds, 15)))
        print(f"{'':52s} {1 / results[-1]['ratio']:.1f} times faster")
    return results


def peak_memory(side: str, name: str, where: Where) -> list[float]:
    """MB of a fresh process that does three training steps: its peak, what the steps added, and the tensors' peak."""
    run = [sys.executable, __file__, "--child", side, "--model", name, "--device", where.device]
    run += [*["--half"] * where.half, *["--apart"] * where.apart]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    return [float(number) for number in printed.split()[-3:]]


def child(side: str, name: str, where: Where) -> None:
    model: Any = (Ours if side == "ours" else Transformers)(name, device=where.device, half=where.half)
    made = resident("VmRSS")
    pixels, targets = training_work(where.device)
    for _ in range(3):
        model.train(pixels, targets)
    peak = resident("VmHWM")  # getrusage would count what the parent held when it forked
    print(peak, peak - made, tensor_peak(lambda: model.train(pixels, targets), where.device))


def tensor_peak(step: Callable[[], Any], device: str) -> float:
    """MB that PyTorch's allocator gave out at most during a step, above what it had given out before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results = profile.profiler.kineto_results.events()
    moves = sorted((event.start_ns(), event.nbytes()) for event in results if event.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in moves)) / 2**20


def resident(field: str) -> float:
    """A figure of this process in MB, by its name in /proc (Linux)."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def compare(model: str, only: Sequence[str], where: Where, rounds: int) -> list[dict[str, Any]]:
    """Training, inference and peak memory of one model."""
    results: list[dict[str, Any]] = []
    if {"training", "inference"} & set(only):
        ours, peer = where.ours(model), where.peer(model)
        both = [ours, peer]
    if "training" in only:
        pixels, targets = training_work(where.device)
        pairs = [("as published", ours, peer)]
        if model in REAL_TIME:
            pairs = [("as published", ours, peer)]
        elif model == "dino":
            pairs.append(("same work", where.ours("dino without denoising"), peer))
        else:
            pairs.append(("its default, less dropout", ours, where.peer(model, dropout=0.0)))
        for what, a, b in pairs:
            steps = (lambda m=a: m.train(pixels, targets), lambda m=b: m.train(pixels, targets))
            results.append(interleaved(f"{model}: training step 2x480x640 / {what}", *steps, rounds))
            end(side for side in (a, b) if side not in both)
        if "compiled" in only:
            quick = where.ours(model, compiled=True)
            steps = (lambda: quick.train(pixels, targets), lambda: peer.train(pixels, targets))
            results.append(interleaved(f"{model}: training step 2x480x640 / compiled", *steps, rounds))
            end([quick])
        del pairs
    if "inference" in only:
        height, width = (640, 640) if model in REAL_TIME else (800, 1066)
        photo = torch.randn(1, 3, height, width, device=where.device)
        looks = (lambda: ours.infer(photo), lambda: peer.infer(photo))
        results.append(interleaved(f"{model}: inference 1x{height}x{width}", *looks, rounds))
        if {"compiled", "onnx"} & set(only):
            quick = where.ours(model, compiled=True)
            others = {"compiled": lambda: peer.infer(photo)} if "compiled" in only else {}
            if "onnx" in only:
                exported = OnnxRuntime(model, photo)
                others["compiled, ONNX Runtime" + " in float32" * where.half] = lambda: exported.infer(photo)
            for what, look in others.items():
                name = f"{model}: inference 1x{height}x{width} / {what}"
                results.append(interleaved(name, lambda: quick.infer(photo), look, rounds))
            end([quick])
    if {"training", "inference"} & set(only):
        end(both)
    if "memory" in only:
        names = ("peak of a training process", "what the steps added", "peak of a step's tensors")
        for what, a, b in zip(names, *(peak_memory(side, model, where) for side in ("ours", "peer")), strict=True):
            print(f"{model + ': ' + what:52s} ours {a:8.0f} MB   peer {b:8.0f} MB   ratio {a / b:.2f}")
            results.append({"name": f"{model}: {what}", "ours_mb": a, "peer_mb": b, "ratio": a / b})
    return results


def laptop(where: Where, rounds: int) -> list[dict[str, Any]]:
    """Inference of the model of `qv train --data` beside the real-time peers, batch 1, 640x640."""
    ours, photo = where.ours("laptop"), torch.randn(1, 3, 640, 640, device=where.device)
    results = []
    for name in REAL_TIME:
        peer = where.peer(name)
        looks = (lambda: ours.infer(photo), lambda p=peer: p.infer(photo))
        results.append(interleaved(f"laptop / transformers' {name}: 1x640x640", *looks, rounds))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["transformers"], default="transformers")
    parser.add_argument("--model", nargs="*", choices=["detr", "deformable", "dino", *REAL_TIME], default=["detr"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=["training", "inference", "assignment", "criterion", "memory"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--half", action="store_true", help="bfloat16 autocast on both sides")
    parser.add_argument("--apart", action="store_true", help="each side in a process of its own, the peer as its users run it")
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=["ours", "peer"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    where = Where(options.device, options.half, options.apart)
    if options.serve:
        side, *arguments = json.loads(options.serve)
        where.tune(side)
        serve(side, *arguments)
        return
    where.tune(options.child or "peer")
    if options.child:
        child(options.child, options.model[0], where)
        return
    torch.manual_seed(0)
    machine = torch.cuda.get_device_name() if where.device == "cuda" else f"{torch.get_num_threads()} threads"
    precision = "bfloat16" if where.half else "float32"
    apart = ", each model in a process of its own" if where.apart else ""
    print(f"torch {torch.__version__}, {machine}, {precision}, median of {options.rounds}, interleaved{apart}")
    results = [result for model in options.model for result in compare(model, options.only, where, options.rounds)]
    if "assignment" in options.only:
        results += [row for queries in (100, 300) for row in assignment(where, options.rounds, queries)]
    if "criterion" in options.only:
        results += [row for queries in (100, 300) for row in criterion(where, options.rounds, queries)]
    if "laptop" in options.only:
        results += laptop(where, options.rounds)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
