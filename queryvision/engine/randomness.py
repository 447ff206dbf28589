"""Random numbers of a run: what a checkpoint remembers, and a generator for each image."""

from __future__ import annotations

from typing import Any

import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """The global generators of this process: of the host, and of its GPU if it has one."""
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_random_state(states: list[dict[str, Any]], device: torch.device, seed: int, rank: int, step: int) -> None:
    """Goes on from a checkpoint's generators, or starts fresh ones that differ from rank to rank.

    Args:
        states: of `random_state` in every rank of the run so far; none: a new run.
        device: of this process.
        seed: of the run.
        rank: of this process.
        step: where the run stands.
    """
    torch.manual_seed(seed + rank + 1_000_003 * step)
    if rank < len(states):
        state = states[rank]
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], device)


def image_generators(seed: int, step: int, image_ids: tuple[int, ...], device: torch.device) -> list[torch.Generator]:
    """A generator for each image of a step, whatever rank or place in the batch it has."""
    base = (seed * 1_000_003 + step) * 1_000_003
    return [torch.Generator(device).manual_seed((base + image_id) % 2**63) for image_id in image_ids]
