"""Devices, precision and the number of processes of a run; Accelerate carries them out."""

from __future__ import annotations

import os
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from queryvision.config import TrainSettings
from queryvision.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]

BF16 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
"""What `torch.cpu` knows about products in bf16."""


def make_accelerator(settings: TrainSettings) -> Accelerator:
    """Devices and precision of a run.

    Raises:
        ConfigError: another number of processes runs than was asked for, or the precision needs a GPU.
    """
    _check_processes(settings.devices)
    AcceleratorState._reset_state()  # else the precision of an earlier run in this process would stay
    precision = chosen_precision(settings.precision)
    # Without a GPU, Accelerate joins the processes that torchrun started only if it is told to stay on the CPU.
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision, cpu=several and not torch.cuda.is_available()
    )
    if settings.precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("train.precision = 'fp16': needs a GPU; on a CPU use fp32 or bf16")
    return accelerator


def chosen_precision(precision: Precision | Literal["auto"]) -> Precision:
    """`auto`: bf16 where the GPU, or without one the processor, computes in it and does not merely imitate it; else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if any(getattr(torch.cpu, name, bool)() for name in BF16) else "fp32"


def _check_processes(devices: int | None) -> None:
    running = int(os.environ.get("WORLD_SIZE", 1))
    if devices is None or devices == running:
        return
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(f"train.devices = {devices}: {running} processes were started (WORLD_SIZE); leave out --devices")
    raise ConfigError(f"train.devices = {devices}: queryvision.train and `qv train` start so many processes, or torchrun does")
