"""Weights, gradients and moments shared out among processes (FSDP2), for backbones that do not fit a device otherwise.

Checkpoints hold whole tensors, so that a run may go on with any number of devices, sharded or not. The averaged weights are
whole in every process.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.modules.batchnorm import _NormBase

from queryvision.errors import ConfigError


def shard(model: nn.Module, blocks: Iterable[nn.Module], averaged: bool) -> None:
    """Shares out a model, in place: its `blocks` are whole only while they work, everything else during the step.

    All processes must hold the same weights. Names of parameters stay.

    Args:
        model: on this process's device; frozen parts must be frozen already.
        blocks: of it; single layers among them stay with the rest, as a folded convolution and its norm need each other.
        averaged: whether averaged weights are evaluated.

    Raises:
        ConfigError: there is one process only, or nothing that could be evaluated.
    """
    if not dist.is_initialized():
        raise ConfigError("train.shard: there is one process only; set --devices, or start several with torchrun")
    if not averaged:
        raise ConfigError("train.shard: what is shared out cannot be evaluated, set train.ema above 0")
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # nothing else can be shared out
    for block in blocks:
        parts, weights = list(block.children()), list(block.parameters())
        if parts and weights:
            fully_shard(block)
    fully_shard(model)
    # It cannot know that nobody changes a model's answers in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was here."""
    return isinstance(model, FSDPModule)


def meet_after_backward(model: nn.Module, meet: bool) -> None:
    """Whether gradients of all processes are summed up after the next backward pass."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(meet)


def share_statistics(model: nn.Module) -> None:
    """Statistics of norms that count become those of the first process; how often they counted is the same everywhere."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.training]
    moving = [buffer for norm in norms for buffer in norm.buffers(recurse=False) if buffer.is_floating_point()]
    if moving:
        together = torch.cat([buffer.flatten() for buffer in moving])
        dist.broadcast(together, 0)
        parts = torch.split(together, [buffer.numel() for buffer in moving])
        for buffer, values in zip(moving, parts, strict=True):
            buffer.copy_(values.view_as(buffer))


def whole(value: Any) -> Any:
    """A shared-out tensor put together; every process must ask for the same ones."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(value: Any) -> Any:
    """Shared-out tensors put together on the host, one after the other, anywhere in dicts and lists."""
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, list):
        return [gathered(item) for item in value]
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def like(value: Tensor, own: Tensor) -> Tensor:
    """A whole tensor, shared out or laid out in memory as `own` is; one of another shape stays as it is."""
    if value.shape != own.shape:
        return value
    if isinstance(own, DTensor):
        return distribute_tensor(value.to(own.device).contiguous(), own.device_mesh, own.placements)
    # A fused optimiser walks through a weight and its moments side by side, wherever their elements lie.
    return torch.empty_like(own, dtype=value.dtype, device=value.device).copy_(value)


def everywhere(value: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that all processes hold alike, in the form that an optimiser of `parameter` wants beside it."""
    if not isinstance(parameter, DTensor):
        return value
    mesh = parameter.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def optimizer_state_like(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """An optimiser's state with whole moments -> shared out and laid out as the parameters are."""
    moments = {
        index: {
            key: like(value, parameters[index]) if isinstance(value, Tensor) and value.ndim else value
            for key, value in own.items()
        }
        for index, own in state["state"].items()
    }
    return {**state, "state": moments}
