"""How many images a device can train on at once, from what two small steps keep for their backward passes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from queryvision.criterion import Criterion
from queryvision.model.query_model import QueryModel
from queryvision.structures import Batch

SHARE = 0.8  # of the free memory that may be used
BESIDE = 1.5  # what a step takes at its worst moment, in what it keeps
PARAMETER = 20  # bytes: a weight, its gradient, two moments and its average
MOST = 64  # images; more than that seldom learn better, only fewer times


def images_that_fit(
    model: QueryModel, criterion: Criterion, batch: Callable[[int], Batch], device: torch.device, scale: float = 1.0
) -> int:
    """The largest power of two, at most 64, whose training step should fit; at least 1.

    Args:
        model: in training mode, on the device.
        criterion: of its heads.
        batch: number of images -> a batch, each with as many objects as there may be.
        device: whose free memory counts.
        scale: pixels of the largest images, in those of the batch.
    """
    small, large = (kept(model, criterion, batch(count).to(device)) for count in (1, 2))
    fixed = PARAMETER * sum(parameter.numel() for parameter in model.parameters())
    room = SHARE * free_memory(device) - fixed
    count = 1
    while count < MOST and BESIDE * scale * (small + (2 * count - 1) * (large - small)) <= room:
        count *= 2
    return count


def kept(model: QueryModel, criterion: Criterion, batch: Batch) -> int:
    """Bytes that a training step keeps for its backward pass, weights apart."""
    found: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return value

    running = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        losses = criterion(model(batch.images, batch.targets), batch.targets)
    del losses
    with torch.no_grad():
        for buffer, old in running:
            buffer.copy_(old)
    return sum(found.values())


def free_memory(device: torch.device) -> int:
    """Bytes; of a host this process's share of what its container or job may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = min(psutil.virtual_memory().available, *_allowed())
    return int(free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _allowed(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[float]:
    """Bytes that the control groups of this process leave, the innermost first (Linux, version 2)."""
    found = re.search(r"^0::(/.*)$", own.read_text(), re.MULTILINE) if own.is_file() else None
    inner = root / found[1].strip("/") if found else root
    left = [math.inf]
    for folder in (inner, *inner.parents):
        limit, used = folder / "memory.max", folder / "memory.current"
        if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
            files = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)  # can be dropped
            left.append(max(0, int(most) - int(used.read_text()) + (int(files[1]) if files else 0)))
    return left
