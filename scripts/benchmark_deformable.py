"""Deformable attention against a named peer: time side by side in one run, interleaved; memory of a process of its own.

    python scripts/benchmark_deformable.py --peer transformers [--rounds 7] [--batch 2 1] [--json FILE]

Four levels of a 480x640 image (strides 8, 16, 32, 64: 6380 values), width 256, 8 heads, 4 points, float32. Encoder: each value
is a query, references are the centres of the cells. Decoder: 300 queries, references are boxes. Needs the test extra.
Where another program takes a core, run it with OMP_NUM_THREADS=1: two threads on one core wait for each other.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from queryvision.allocation import tune_allocation
from queryvision.layers.deformable import DeformableAttention

SHAPES = ((60, 80), (30, 40), (15, 20), (8, 10))
NUM_VALUES = sum(h * w for h, w in SHAPES)
WIDTH = 256
QUERIES = {"encoder": NUM_VALUES, "300 queries": 300}

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours() -> DeformableAttention:
    """Offsets and weights that depend on the query, as after some training."""
    torch.manual_seed(0)
    module = DeformableAttention(WIDTH)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.05)
    torch.nn.init.normal_(module.attention_weights.weight, std=0.05)
    return module


def runner(side: str) -> Run:
    """(query, reference, values) -> output."""
    module = ours()
    if side == "ours":
        return lambda query, reference, values: module(query, reference, values, SHAPES)  # type: ignore[no-any-return]
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention

    config = SimpleNamespace(d_model=WIDTH, num_feature_levels=len(SHAPES), disable_custom_kernels=True)
    peer = DeformableDetrMultiscaleDeformableAttention(config, 8, 4)
    peer.load_state_dict(module.state_dict())
    shapes: dict[str, Any] = {"spatial_shapes": torch.tensor(SHAPES), "spatial_shapes_list": list(SHAPES)}
    return lambda query, reference, values: peer(  # type: ignore[no-any-return]
        query, encoder_hidden_states=values, reference_points=reference, **shapes
    )[0]


def inputs(queries: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    if queries == NUM_VALUES:
        grids = [torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij") for h, w in SHAPES]
        centres = torch.cat([torch.stack((x, y), -1).view(-1, 2) for y, x in grids])
        reference = centres[None, :, None].repeat(batch, 1, len(SHAPES), 1)
    else:
        boxes = torch.cat((torch.rand(batch, queries, 1, 2), 0.05 + 0.4 * torch.rand(batch, queries, 1, 2)), -1)
        reference = boxes.repeat(1, 1, len(SHAPES), 1)
    query, values = torch.randn(batch, queries, WIDTH), torch.randn(batch, NUM_VALUES, WIDTH)
    return query.requires_grad_(), reference.requires_grad_(queries != NUM_VALUES), values.requires_grad_()


def train(run: Run, x: tuple[Tensor, Tensor, Tensor]) -> None:
    out = run(*x)
    out.backward(torch.ones_like(out))


def infer(run: Run, x: tuple[Tensor, Tensor, Tensor]) -> None:
    with torch.no_grad():
        run(*x)


MODES = {"forward+backward": train, "inference": infer}


def interleaved(runs: dict[str, Run], mode: str, x: tuple[Tensor, Tensor, Tensor], rounds: int) -> dict[str, float]:
    """Median milliseconds of each side, in turns after one unmeasured turn."""
    times: dict[str, list[float]] = {side: [] for side in runs}
    for turn in range(rounds + 1):
        for side, run in runs.items():
            began = time.perf_counter()
            MODES[mode](run, x)
            if turn:
                times[side].append(1000 * (time.perf_counter() - began))
    return {side: statistics.median(values) for side, values in times.items()}


def peak_memory(side: str, mode: str, queries: int, batch: int) -> float:
    """MB that three runs add to a fresh process which has its inputs and has done a tiny run."""
    code = [sys.executable, __file__, "--child", side, mode, str(queries), str(batch)]
    return float(subprocess.run(code, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(side: str, mode: str, queries: int, batch: int) -> None:
    run, x = runner(side), inputs(queries, batch)
    MODES[mode](run, inputs(2, 1))
    gc.collect()
    before = peak_resident()
    for _ in range(3):
        MODES[mode](run, x)
    print(peak_resident() - before)


def peak_resident() -> float:
    """MB. Where the kernel tells it, of this process alone: getrusage would count what the parent held when it forked."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    tune_allocation()  # both sides, as `qv` does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["transformers"], default="transformers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, nargs="+", default=[2])
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, mode, queries, batch = options.child
        child(side, mode, int(queries), int(batch))
        return
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, {options.rounds} rounds"
    )
    print(f"{'':42s} {'ours ms':>9s} {'peer ms':>9s} {'ratio':>6s}   {'ours MB':>8s} {'peer MB':>8s} {'ratio':>6s}")
    runs, results = {side: runner(side) for side in ("ours", options.peer)}, []
    for batch in options.batch:
        for name, queries in QUERIES.items():
            for mode in MODES:
                ms = interleaved(runs, mode, inputs(queries, batch), options.rounds)
                mb = {side: peak_memory(side, mode, queries, batch) for side in runs}
                (a, b), (c, d) = ms.values(), mb.values()
                label = f"{name}, batch {batch}, {mode}"
                memory = f"{c:8.0f} {d:8.0f} {c / max(d, 1):6.2f}"
                print(f"{label:42s} {a:9.1f} {b:9.1f} {a / b:6.2f}   {memory}", flush=True)
                results.append({"name": name, "batch": batch, "mode": mode, "ms": ms, "mb": mb})
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
