"""Deformable attention against `transformers`, on all its ways to sample, and what no peer can tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import queryvision.layers.deformable as layer
import queryvision.ops.sampling as sampling
from queryvision.layers.deformable import DeformableAttention
from queryvision.ops.sampling import Shapes, sample_by_grid, sample_by_rows

SHAPES: Shapes = ((5, 9), (4, 3), (1, 6), (1, 1))
NUM_VALUES = sum(h * w for h, w in SHAPES)
WAYS = {"rows, few queries": 7, "rows, many queries": 40, "grid": 7}
"""How many queries each way gets: few queries are those whose heads are fewer than the values."""


class Inputs(NamedTuple):
    query: Tensor
    reference: Tensor
    values: Tensor


@pytest.fixture(params=WAYS)
def queries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The number of queries of a way to sample; in the test, the layer goes that way."""
    if request.param == "grid":
        for module in (layer, sampling):
            monkeypatch.setattr(module, "gathers_rows", lambda _values: False)
    yield WAYS[request.param]


def randomised(module: DeformableAttention, seed: int = 0) -> DeformableAttention:
    """Each parameter away from zero and with a gain of its own: the published zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.normal_(0, 0.15 + 0.05 * index, generator=generator)
    return module


def inputs(queries: int, coordinates: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Inputs:
    """References from -0.2 to 1.2, different on each level; all of it asks for a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    query, values = uniform(2, queries, 16) - 0.5, uniform(2, NUM_VALUES, 16) - 0.5
    reference = torch.cat((1.4 * uniform(2, queries, 4, 2) - 0.2, 0.1 + 0.9 * uniform(2, queries, 4, coordinates - 2)), -1)
    return Inputs(*(x.requires_grad_() for x in (query, reference, values)))


def some_padding() -> Tensor:
    padding = torch.zeros(2, NUM_VALUES, dtype=torch.bool)
    padding[0, 3::4] = True
    return padding


def peer_of(module: DeformableAttention) -> nn.Module:
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention

    config = SimpleNamespace(d_model=16, num_feature_levels=4, disable_custom_kernels=True)
    peer = DeformableDetrMultiscaleDeformableAttention(config, 4, 3).to(module.output_proj.weight.dtype)
    peer.load_state_dict(module.state_dict())
    return peer


def with_gradients(module: nn.Module, x: Inputs, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    out = run()
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    wanted = {**x._asdict(), **dict(module.named_parameters())}
    found = torch.autograd.grad(out, list(wanted.values()), direction)
    return {"output": out.detach(), **dict(zip(wanted, found, strict=True))}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_output_and_gradients_are_those_of_transformers(
    queries: int, coordinates: int, padded: bool, dtype: torch.dtype, tolerance: float
) -> None:
    ours = randomised(DeformableAttention(16, 4, 4, 3)).to(dtype)
    peer = peer_of(ours)
    x, padding = inputs(queries, coordinates, dtype), some_padding() if padded else None
    found = with_gradients(ours, x, lambda: ours(*x, SHAPES, padding))
    wanted = with_gradients(
        peer,
        x,
        lambda: peer(
            x.query,
            attention_mask=None if padding is None else ~padding,
            encoder_hidden_states=x.values,
            reference_points=x.reference,
            spatial_shapes=torch.tensor(SHAPES),
            spatial_shapes_list=list(SHAPES),
        )[0],
    )
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.abs().max() > 0.01, f"{name} would hide a mistake"
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_initialisation_looks_along_a_ring() -> None:
    """As published: eight directions, to the edge of a square; point k at k+1; nothing depends on the query yet."""
    module = DeformableAttention(16, 8, 3, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    wanted = torch.tensor([[[(x, y), (2 * x, 2 * y)]] * 3 for x, y in directions], dtype=torch.float32)
    torch.testing.assert_close(module.sampling_offsets.bias.view(8, 3, 2, 2), wanted)
    zero = (
        module.sampling_offsets.weight,
        *module.attention_weights.parameters(),
        module.value_proj.bias,
        module.output_proj.bias,
    )
    assert all((parameter == 0).all() for parameter in zero)
    assert all(weight.abs().max() <= (6 / 32) ** 0.5 for weight in (module.value_proj.weight, module.output_proj.weight))


@pytest.mark.parametrize("place", [-3.0, 3.0])
def test_a_location_outside_of_the_map_gives_zero(queries: int, place: float) -> None:
    module = randomised(DeformableAttention(16, 4, 4, 3))
    x = inputs(queries, 4)
    reference = torch.cat((torch.full_like(x.reference[..., :2], place), x.reference[..., 2:]), -1).detach().requires_grad_()
    out = module(x.query, reference, x.values, SHAPES)
    torch.testing.assert_close(out, module.output_proj.bias.expand_as(out))
    assert (torch.autograd.grad(out.sum(), reference)[0] == 0).all()


@pytest.mark.parametrize("sample", [sample_by_rows, sample_by_grid])
@pytest.mark.parametrize("beyond", [0.5, 0.6, 1.0, 7.0])
def test_half_a_pixel_beyond_the_edge_there_is_nothing(sample: Callable[..., Tensor], beyond: float) -> None:
    """On every side and in the corners; on the last map, too, behind which no other lies."""
    width, height = 4, 3
    x, y = (torch.tensor([-beyond, size / 2, size + beyond]) / size for size in (width, height))
    around = torch.cartesian_prod(x, y)[[0, 1, 2, 3, 5, 6, 7, 8]].view(1, 8, 1, 1, 2)
    for shapes in (((height, width),), ((height, width), (height, width))):
        levels = len(shapes)
        values, weights = torch.ones(1, 12 * levels, 1, 2), torch.ones(1, 8, 1, levels)
        found = sample(values, shapes, (1,) * levels, around.expand(1, 8, 1, levels, 2), weights)
        torch.testing.assert_close(found, torch.zeros(1, 8, 1, 2), atol=1e-6, rtol=0)


def test_a_location_that_is_no_number_spoils_its_own_query_only(queries: int) -> None:
    module = randomised(DeformableAttention(16, 4, 4, 3))
    x = inputs(queries, 2)
    spoiled = x.reference.detach().clone()
    spoiled[0, 1] = float("nan")
    with torch.no_grad():
        wanted, found = module(*x, SHAPES), module(x.query, spoiled, x.values, SHAPES)
    others = torch.ones(2, queries, dtype=torch.bool)
    others[0, 1] = False
    torch.testing.assert_close(found[others], wanted[others])


def test_autocast_keeps_locations_exact(queries: int) -> None:
    """Columns of +1 and -1, looked at in their centres: half a pixel off is wrong, and bfloat16 is two pixels off."""
    width, count = 1200, queries * 4
    module = DeformableAttention(8, 1, 1, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.value_proj.weight.copy_(torch.eye(8))
        module.output_proj.weight.copy_(torch.eye(8))
    stripes = 1.0 - 2.0 * (torch.arange(width) % 2)
    columns = torch.randint(0, width, (count,), generator=torch.Generator().manual_seed(3))
    reference = torch.stack(((columns + 0.5) / width, torch.full((count,), 0.5)), -1).view(1, count, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(torch.randn(1, count, 8), reference, stripes.view(1, width, 1).repeat(1, 1, 8), ((1, width),))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out[0].float(), stripes[columns, None].expand(-1, 8), atol=0.02, rtol=0)


def test_a_model_in_bfloat16_trains(queries: int) -> None:
    module = randomised(DeformableAttention(16, 4, 4, 3)).bfloat16()
    x = inputs(queries, 4, torch.bfloat16)
    out = module(*x, SHAPES, some_padding())
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (*module.parameters(), *x))


@pytest.mark.parametrize("coordinates", [2, 4])
def test_export_gives_the_same(coordinates: int) -> None:
    module = randomised(DeformableAttention(16, 4, 4, 3)).eval()
    arguments = (*(x.detach() for x in inputs(7, coordinates)), SHAPES, some_padding())
    program = torch.export.export(module, arguments)
    assert any("grid_sampler" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*arguments), module(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_gives_the_same() -> None:
    module = randomised(DeformableAttention(16, 4, 4, 3)).eval().requires_grad_(False)
    first, second = (tuple(x.detach() for x in inputs(7, 4, seed=seed)) for seed in (1, 5))
    traced = torch.jit.trace(lambda *x: module(*x, SHAPES), first, check_trace=False)
    assert "grid_sampler" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(*second), module(*second, SHAPES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sample", [sample_by_rows, sample_by_grid])
@pytest.mark.parametrize("table_heads", [1, 2])
def test_gradients_are_those_of_finite_differences(sample: Callable[..., Tensor], table_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes: Shapes = ((3, 2), (1, 2))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    values, locations, weights = uniform(2, 8, table_heads, 3), 1.6 * uniform(2, 3, 2, 3, 2) - 0.3, uniform(2, 3, 2, 3)
    arguments = tuple(x.requires_grad_() for x in (values, locations, weights))
    assert torch.autograd.gradcheck(lambda v, at, w: sample(v, shapes, (2, 1), at, w), arguments)


def test_what_does_not_fit_is_an_error() -> None:
    module, x = DeformableAttention(16, 4, 4, 3), inputs(7, 4)
    with pytest.raises(ValueError, match="64 values do not fit 4 levels"):
        module(*x, SHAPES[:3])
    with pytest.raises(ValueError, match="2 or 4 numbers, not 3"):
        module(x.query, x.reference[..., :3], x.values, SHAPES)
    with pytest.raises(ValueError, match="width 10 is not divisible by 4"):
        DeformableAttention(10, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("coordinates", [2, 4])
def test_the_host_does_not_wait_for_a_gpu(coordinates: int) -> None:
    module = randomised(DeformableAttention(16, 4, 4, 3)).cuda()
    x = Inputs(*(t.detach().cuda().requires_grad_() for t in inputs(7, coordinates)))
    padding = some_padding().cuda()
    module(*x, SHAPES, padding).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(*x, SHAPES, padding).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
