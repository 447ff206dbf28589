"""Devices, precision and the number of processes of a run; Accelerate carries them out."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from queryvision.config import TrainSettings
from queryvision.errors import ConfigError


def make_accelerator(settings: TrainSettings) -> Accelerator:
    """Devices and precision of a run.

    Raises:
        ConfigError: another number of processes runs than was asked for, or the precision needs a GPU.
    """
    _check_processes(settings.devices)
    AcceleratorState._reset_state()  # else the precision of an earlier run in this process would stay
    precision = {"fp32": "no"}.get(settings.precision, settings.precision)
    # Without a GPU, Accelerate joins the processes that torchrun started only if it is told to stay on the CPU.
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    accelerator = Accelerator(mixed_precision=precision, cpu=several and not torch.cuda.is_available())
    if settings.precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("train.precision = 'fp16': needs a GPU; on a CPU use fp32 or bf16")
    return accelerator


def _check_processes(devices: int | None) -> None:
    running = int(os.environ.get("WORLD_SIZE", 1))
    if devices is None or devices == running:
        return
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(f"train.devices = {devices}: {running} processes were started (WORLD_SIZE); leave out --devices")
    raise ConfigError(f"train.devices = {devices}: queryvision.train and `qv train` start so many processes, or torchrun does")
