"""What convolutions and norms of the hybrid encoder do in one step is what their parts do one by one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from queryvision.layers.conv import RepVgg, pointwise
from queryvision.ops.norm_silu import norm_silu
from queryvision.ops.sampling import lay_out, sample_by_rows


def norms_of(branches: int, channels: int) -> nn.ModuleList:
    norms = nn.ModuleList(nn.BatchNorm2d(channels, momentum=0.3, eps=1e-4) for _ in range(branches)).double()
    for parameter in norms.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return norms


@pytest.mark.parametrize("branches", [1, 2])
def test_norm_and_silu_in_one_step_are_the_same_also_to_gradients_and_statistics(branches: int) -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 5, 4, dtype=torch.double, requires_grad=True) for _ in range(branches)]
    norms = norms_of(branches, 3)
    apart = copy.deepcopy(norms)
    found = norm_silu(maps, list(norms))
    wanted = F.silu(sum(norm(x) for x, norm in zip(maps, apart, strict=True)))
    torch.testing.assert_close(found, wanted)
    assert norms.state_dict().keys() == apart.state_dict().keys()
    for key, value in apart.state_dict().items():
        torch.testing.assert_close(norms.state_dict()[key], value, msg=key)
    weight = torch.randn_like(found)
    for mine, theirs in zip(
        torch.autograd.grad((found * weight).sum(), [*maps, *norms.parameters()]),
        torch.autograd.grad((wanted * weight).sum(), [*maps, *apart.parameters()]),
        strict=True,
    ):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(mine, theirs)


def test_norm_and_silu_keep_one_map_a_branch() -> None:
    block, x = RepVgg(4), torch.randn(2, 4, 8, 8, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(x)
    maps = [numel for numel in kept.values() if numel == x.numel()]
    assert len(maps) == 3, "what the block is given, and what its two norms are given"


@pytest.mark.parametrize("case", ["evaluation", "no gradient", "batch of one place", "bfloat16", "another norm"])
def test_norm_and_silu_where_less_is_to_be_kept_or_nothing(case: str) -> None:
    torch.manual_seed(0)
    (norm,) = norms_of(1, 3).float()
    x = torch.randn(2, 3, 1 if case == "batch of one place" else 4, 1)
    if case == "evaluation":
        norm.eval()
    if case == "another norm":
        norm = nn.GroupNorm(1, 3)
    if case == "bfloat16":
        x = x.bfloat16()
    with torch.set_grad_enabled(case != "no gradient"):
        torch.testing.assert_close(norm_silu([x], [norm]), F.silu(copy.deepcopy(norm)(x)))


@pytest.mark.parametrize("height", [6, 7])
def test_parts_are_convolved_as_if_they_lay_behind_each_other(height: int) -> None:
    torch.manual_seed(0)
    coarse = torch.randn(2, 3, (height + 1) // 2, 5, dtype=torch.double)
    fine = [torch.randn(2, channels, height, 9, dtype=torch.double) for channels in (2, 4)]
    weight, bias = torch.randn(5, 9, 1, 1, dtype=torch.double), torch.randn(5, dtype=torch.double)
    enlarged = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :height, :9]
    torch.testing.assert_close(
        pointwise([coarse, *fine], weight, bias), F.conv2d(torch.cat([enlarged, *fine], 1), weight, bias)
    )


def test_a_canvas_made_before_is_sampled_the_same() -> None:
    torch.manual_seed(0)
    shapes = ((3, 5), (2, 3))
    values, locations, weights = torch.randn(2, 21, 2, 4), torch.rand(2, 6, 2, 3, 2) * 1.4 - 0.2, torch.rand(2, 6, 2, 3)
    canvas = lay_out(values.flatten(2), shapes)
    found = sample_by_rows(torch.zeros_like(values), shapes, (2, 1), locations, weights, canvas)
    assert torch.equal(found, sample_by_rows(values, shapes, (2, 1), locations, weights))
