"""Kills a tiny training run at random moments, and compares its end with that of a run that nobody disturbed.

    python scripts/fault_test.py [--kills 20] [--steps 400] [--task detection] [--seed 0]

Each time a process is started it lives for a random while (SIGKILL, also while it imports, reads, evaluates or saves), then it
is resumed, by its flags and by its folder in turn; after so many kills it may run to its end. Weights, averaged weights,
optimiser and `metrics.csv` must be the same, bit for bit. Training has worker processes, accumulation and averaged weights.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from queryvision.data.scenes import make_scenes
from queryvision.engine.checkpoint import load_checkpoint
from queryvision.run_folder import SETTINGS


def command(task: str, steps: int, data: Path, output: Path) -> list[str]:
    """A run of tiny steps that saves every second one."""
    model = ["name=dfine_small", "backbone=resnet18", "width=32", "ffn_width=32", "encoder_layers=1", "decoder_layers=2",
             "num_queries=12", "denoising=4", "frozen_norm=false"]  # fmt: skip
    train = ["save_every=2", "log_every=3", "eval_every=10", "accumulate=2", "warmup=5"]
    settings = [*(f"model.{text}" for text in model), *(f"train.{text}" for text in train), "evaluation.pictures=0"]
    given = ["--task", task, "--data", data, "--image-size", "64", "--batch-size", "2", "--steps", steps, "--weights", "none",
             "--workers", "1", "--output", output, "--name", "run"]  # fmt: skip
    words = [str(word) for word in given] + [word for text in settings for word in ("--set", text)]
    return [sys.executable, "-m", "queryvision.cli", "train", *words]


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by their path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {key: tensor for part, inner in items for key, tensor in tensors(inner, f"{name}.{part}").items()}


def seconds(words: list[str]) -> float:
    """How long a command takes."""
    began = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> int:
    """Exit code 0 if both runs end the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400, help="of the optimiser")
    parser.add_argument("--task", default="detection")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as work:
        data = make_scenes(Path(work) / "scenes", train=12, val=4, size=64)
        start, length = (
            seconds(command(given.task, n, data, Path(work) / name)) for n, name in ((2, "short"), (given.steps, "whole"))
        )
        print(f"undisturbed: {given.steps} steps in {length:.0f} s, of which {start:.0f} s are its start", flush=True)
        longest = start + 1.5 * (length - start) / given.kills
        whole, folder = (Path(work) / name / given.task / "run" for name in ("whole", "cut"))
        kills = 0
        while True:
            words = command(given.task, given.steps, data, Path(work) / "cut")
            if (folder / SETTINGS).exists() and kills % 2:
                words = [*words[:4], "--resume", str(folder)]
            elif folder.exists():
                words += ["--resume"]
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            alive = draw.uniform(0, longest) if kills < given.kills else None
            try:
                said, _ = process.communicate(timeout=alive)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                step = load_checkpoint(folder / "last.pt")["step"] if (folder / "last.pt").exists() else 0
                print(f"kill {kills} after {alive:.1f} s; the checkpoint stands at step {step}", flush=True)
                continue
            if process.returncode:
                print(f"a resumed run failed:\n{said}")
                return 1
            break
        ends = [tensors({file: load_checkpoint(root / file) for file in ("last.pt", "best.pt")}) for root in (whole, folder)]
        wrong = [name for name, value in ends[0].items() if not torch.equal(value, ends[1][name])]
        same = (whole / "metrics.csv").read_bytes() == (folder / "metrics.csv").read_bytes()
        print(f"{kills} kills; {len(wrong)} of {len(ends[0])} tensors differ {wrong[:3]}")
        print(f"metrics.csv {'is the same' if same else 'differs'}")
        return int(bool(wrong) or not same or kills < given.kills)


if __name__ == "__main__":
    raise SystemExit(main())
