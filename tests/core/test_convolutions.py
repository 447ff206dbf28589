"""What convolutions and norms of the hybrid encoder do in one step is what their parts do one by one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from queryvision.layers.conv import RepVgg, pointwise
from queryvision.layers.deformable import DeformableAttention
from queryvision.ops.norm_silu import norm_silu
from queryvision.ops.sampling import lay_out, sample_by_rows
from queryvision.structures import Memory


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


def test_half_precision_maps_give_the_same_gradients() -> None:
    torch.manual_seed(0)
    (norm,) = norms_of(1, 3).float()
    x, weight = torch.randn(2, 3, 4, 4).bfloat16().requires_grad_(), torch.randn(2, 3, 4, 4)
    outputs = norm_silu([x], [norm]), F.silu(copy.deepcopy(norm)(x))
    assert outputs[0].dtype == torch.bfloat16
    mine, theirs = (torch.autograd.grad((out * weight).sum(), x)[0] for out in outputs)
    torch.testing.assert_close(mine, theirs, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("case", ["another norm", "evaluation", "no statistics"])
def test_norms_of_other_kinds_do_what_they_do(case: str) -> None:
    norm = nn.GroupNorm(1, 3) if case == "another norm" else nn.BatchNorm2d(3, track_running_stats=case == "evaluation")
    norm.train(case != "evaluation")
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(norm_silu([x], [norm]), F.silu(norm(x)))


def test_one_value_a_channel_is_refused_as_by_torch() -> None:
    norm = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_silu([torch.randn(1, 3, 1, 1)], [norm])
    assert norm.running_var.isfinite().all()


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


def test_a_shared_canvas_is_without_padding_and_its_gradients_add_up() -> None:
    torch.manual_seed(0)
    padding = torch.zeros(2, 21, dtype=torch.bool)
    padding[1, [4, 9, 14, 17, 20]] = True
    look = [torch.randn(2, 6, 8), torch.rand(2, 6, 2, 4)]
    layers = [DeformableAttention(8, 2, 2, 3, project=False) for _ in range(2)]
    tokens = torch.randn(2, 21, 8)
    gradients = []
    for shared in (True, False):
        given = tokens.clone().requires_grad_()
        memory = Memory(given, torch.zeros(1), ((3, 5), (2, 3)), padding, torch.ones(2, 2, 2))
        out = sum(
            layer(*look, memory.tokens, memory.shapes, padding, memory.canvas if shared else None).square().sum()
            for layer in layers
        )
        gradients.append(torch.autograd.grad(out, given)[0])
    assert not gradients[0][padding].any() and gradients[0].abs().max() > 0.1
    torch.testing.assert_close(*gradients)
