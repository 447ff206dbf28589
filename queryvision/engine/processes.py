"""Devices, precision and the number of processes of a run; Accelerate carries them out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import gather_object

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
    # Without a GPU, Accelerate joins the processes that torchrun started only if it is told to stay on the CPU.
    several_on_cpu = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.cuda.is_available()
    device = PartialState(cpu=several_on_cpu).device
    precision = _agreed(native_precision(device)) if settings.precision == "auto" else settings.precision
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision = 'fp16': needs a GPU; on a CPU use fp32 or bf16")
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=several_on_cpu)


def precision_of(accelerator: Accelerator) -> Precision:
    """What the forward pass runs in."""
    return "fp32" if accelerator.mixed_precision == "no" else cast(Precision, accelerator.mixed_precision)


def native_precision(device: torch.device) -> Precision:
    """bf16 where a device computes in it and does not merely imitate it, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    able = device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in BF16)
    return "bf16" if able else "fp32"


def host_group(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """Where processes meet without their devices, for whose work they would wait otherwise; all of them call it together."""
    if accelerator.num_processes == 1:
        return None
    own = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    return cast(dist.ProcessGroup, own)


def summed_on_host(values: Sequence[float], group: dist.ProcessGroup | None) -> list[float]:
    """Sums over all processes of a group of `host_group`; the values themselves where there is none."""
    if group is None:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return total.tolist()


def _agreed(precision: Precision) -> Precision:
    """fp32 if it is any process's; all of them meet here."""
    return "fp32" if "fp32" in gather_object([precision]) else precision


def _check_processes(devices: int | None) -> None:
    running = int(os.environ.get("WORLD_SIZE", 1))
    if devices is None or devices == running:
        return
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(f"train.devices = {devices}: {running} processes were started (WORLD_SIZE); leave train.devices out")
    raise ConfigError(f"train.devices = {devices}: queryvision.train and `qv train` start so many processes, or torchrun does")
