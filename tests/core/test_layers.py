"""Layers and pure functions against independent implementations, on tiny random weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import nn
from toys import WIDTH, vary

from queryvision.layers.attention import Attention
from queryvision.layers.positions import SinePositions
from queryvision.model.cross_attention import DenseCrossAttention, Look
from queryvision.model.decoder import DecoderLayer
from queryvision.model.encoder import EncoderLayer
from queryvision.ops import boxes as box_ops
from queryvision.ops.losses import sigmoid_focal, sigmoid_focal_cost
from queryvision.ops.pixels import normalised
from queryvision.structures import Memory


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.fixture
def double() -> Iterator[None]:
    """Parity in float64, where rounding hides nothing."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def memory_of(tokens: torch.Tensor, padding: torch.Tensor | None = None) -> Memory:
    return Memory(tokens, torch.zeros_like(tokens), ((1, tokens.shape[1]),), padding, torch.ones(len(tokens), 1, 2))


# ---------------------------------------------------------------------------------------------------- pixels
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixels_are_normalised_channel_by_channel(layout: torch.memory_format) -> None:
    pixels = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8).contiguous(memory_format=layout)
    before, mean, std = pixels.clone(), torch.rand(3, 1, 1) * 255, torch.rand(3, 1, 1) * 255 + 1
    found = normalised(pixels, mean, std)
    assert torch.equal(found, (pixels - mean) / std) and torch.equal(pixels, before)
    assert found.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------- attention
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_attention_equals_torch(same: bool, masked: bool) -> None:
    torch.manual_seed(0)
    ours = vary(Attention(WIDTH, 4))
    theirs = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query = torch.randn(2, 5, WIDTH)
    key = query if same else torch.randn(2, 7, WIDTH)
    value = torch.randn(key.shape)
    hidden = torch.rand(2, 5, key.shape[1]) < 0.5 if masked else None
    if hidden is not None:
        hidden[..., 0] = False
    mask = None if hidden is None else hidden.repeat_interleave(4, 0)
    close(ours(query, key, value, hidden), theirs(query, key, value, attn_mask=mask, need_weights=False)[0])


def test_attention_starts_like_torch() -> None:
    torch.manual_seed(3)
    ours = Attention(WIDTH, 4).state_dict()
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(WIDTH, 4).state_dict()
    assert ours.keys() == theirs.keys()
    for name in ("in_proj_bias", "out_proj.bias"):
        assert torch.equal(ours[name], theirs[name])
    # fresh values are drawn alike, not equal: compare the range of xavier over the packed matrix
    bound = math.sqrt(6 / (4 * WIDTH))
    assert 0.95 * bound < ours["in_proj_weight"].abs().max() <= bound
    assert 0.95 * bound < theirs["in_proj_weight"].abs().max() <= bound


def test_attention_on_a_cpu_is_computed_in_float32_under_bfloat16() -> None:
    """Only what goes in and comes out is rounded, of values and of gradients."""
    torch.manual_seed(0)
    ours, x = Attention(WIDTH, 4), torch.randn(2, 5, WIDTH)
    q, k, v = (torch.randn(2, 4, 5, WIDTH // 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    look = torch.rand(2, 1, 5, 5) < 0.7
    look[..., 0] = True
    with torch.autocast("cpu", torch.bfloat16):
        found = ours._attend(q, k, v, look)
        out = ours(x, x, x, ~look[:, 0])
    wanted = nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), look)
    assert found.dtype == out.dtype == torch.bfloat16
    assert torch.equal(found, wanted.bfloat16())
    step = torch.randn(found.shape).bfloat16()
    for mine, theirs in zip(
        torch.autograd.grad(found, (q, k, v), step), torch.autograd.grad(wanted, (q, k, v), step.float()), strict=True
    ):
        assert torch.equal(mine, theirs)
    close(out.float(), ours(x, x, x, ~look[:, 0]), 0.03)


def test_attention_refuses_a_width_that_heads_do_not_divide() -> None:
    with pytest.raises(ValueError, match="30"):
        Attention(30, 4)


@pytest.mark.usefixtures("double")
def test_encoder_layer_equals_torch() -> None:
    torch.manual_seed(0)
    ours = vary(EncoderLayer(WIDTH, 4, 48, 0.0))
    theirs = nn.TransformerEncoderLayer(WIDTH, 4, 48, 0.0, batch_first=True)
    theirs.load_state_dict({name.replace("ffn.", ""): value for name, value in ours.state_dict().items()})
    tokens, padding = torch.randn(2, 6, WIDTH), torch.arange(6) >= torch.tensor([[6], [4]])
    close(ours(tokens, torch.zeros(1, 6, WIDTH), padding[:, None]), theirs(tokens, src_key_padding_mask=padding))


@pytest.mark.usefixtures("double")
def test_decoder_layer_equals_torch() -> None:
    torch.manual_seed(0)
    ours = vary(DecoderLayer(WIDTH, 4, DenseCrossAttention(WIDTH, 4, 0.0), 48, 0.0))
    theirs = nn.TransformerDecoderLayer(WIDTH, 4, 48, 0.0, batch_first=True)
    renamed = {n.replace("ffn.", "").replace("cross_attn.attention", "multihead_attn"): v for n, v in ours.state_dict().items()}
    theirs.load_state_dict(renamed)
    states, tokens = torch.randn(2, 5, WIDTH), torch.randn(2, 6, WIDTH)
    padding = torch.arange(6) >= torch.tensor([[6], [4]])
    unseen = torch.rand(5, 5) < 0.4
    unseen.fill_diagonal_(False)
    look = Look(memory_of(tokens, padding), tokens, unseen=unseen[None])
    found = ours(states[:, :, None], torch.zeros(1, 5, 1, WIDTH), look)[:, :, 0]
    close(found, theirs(states, tokens, tgt_mask=unseen, memory_key_padding_mask=padding))


@pytest.mark.usefixtures("double")
def test_positions_go_to_queries_and_keys_but_not_to_values() -> None:
    torch.manual_seed(0)
    layer = vary(EncoderLayer(WIDTH, 4, 48, 0.0))
    tokens, positions = torch.randn(1, 6, WIDTH), torch.randn(1, 6, WIDTH)
    placed = tokens + positions
    attended = layer.norm1(tokens + layer.self_attn(placed, placed.clone(), tokens))
    close(layer(tokens, positions, None), layer.norm2(attended + layer.ffn(attended)))


def test_slots_talk_within_the_query() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(1, 6, WIDTH)
    states, positions = torch.randn(1, 3, 4, WIDTH), torch.zeros(1, 3, 4, WIDTH)
    changed = states.clone()
    changed[0, 1, 2] += torch.randn(WIDTH)
    for slots, others in ((True, True), (False, False)):
        layer = vary(DecoderLayer(WIDTH, 4, DenseCrossAttention(WIDTH, 4, 0.0), 48, 0.0, slots=slots))
        look = Look(memory_of(tokens), tokens)
        with torch.no_grad():
            moved = (layer(changed, positions, look) - layer(states, positions, look)).abs().amax(-1)[0] > 1e-5
        assert moved[:, 2].all(), "the same slot of every query"
        assert bool(moved[1, [0, 1, 3]].all()) is others, "the other slots of the same query, only by attention within"


@pytest.mark.usefixtures("double")
def test_every_slot_is_hidden_what_its_query_is_hidden() -> None:
    torch.manual_seed(0)
    cross = vary(DenseCrossAttention(WIDTH, 4, 0.0))
    tokens, states = torch.randn(2, 6, WIDTH), torch.randn(2, 3, 2, WIDTH)
    padding = torch.arange(6) >= torch.tensor([[6], [4]])
    hidden = torch.rand(2, 3, 6) < 0.5
    hidden[:, :2, 0] = False
    hidden[:, 2] = True  # may look at all that is no padding
    look = Look(memory_of(tokens, padding), tokens, hidden=hidden)
    found = cross(states, torch.zeros(1), look)
    theirs = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    theirs.load_state_dict(cross.attention.state_dict())
    for image in range(2):
        for query in range(3):
            mask = padding[image] if query == 2 else hidden[image, query] | padding[image]
            wanted = theirs(states[image, query], tokens[image], tokens[image], key_padding_mask=mask)[0]
            close(found[image, query], wanted)


# ---------------------------------------------------------------------------------------------------- positions
def sine_by_hand(real: list[list[bool]], width: int) -> torch.Tensor:
    """detr:models/position_encoding.py as plain loops, for one image."""
    height, breadth, half = len(real), len(real[0]), width // 2
    rows = []
    for i in range(height):
        for j in range(breadth):
            y = sum(real[k][j] for k in range(i + 1)) / (sum(real[k][j] for k in range(height)) + 1e-6) * 2 * math.pi
            x = sum(real[i][k] for k in range(j + 1)) / (sum(real[i][k] for k in range(breadth)) + 1e-6) * 2 * math.pi
            row = []
            for value in (y, x):
                for c in range(half):
                    angle = value / 10000 ** (2 * (c // 2) / half)
                    row.append(math.sin(angle) if c % 2 == 0 else math.cos(angle))
            rows.append(row)
    return torch.tensor(rows)


def test_sine_positions_equal_a_plain_loop() -> None:
    real = [[i < 3 and j < 4 for j in range(6)] for i in range(5)]
    positions, like = SinePositions(16), torch.zeros(1)
    close(positions(~torch.tensor(real)[None], (1, 5, 6), like)[0], sine_by_hand(real, 16), 2e-6)
    full = [[True] * 6] * 5
    close(positions(None, (1, 5, 6), like)[0], sine_by_hand(full, 16), 2e-6)
    close(positions(torch.zeros(1, 5, 6, dtype=torch.bool), (1, 5, 6), like), positions(None, (1, 5, 6), like), 0.0)


# ---------------------------------------------------------------------------------------------------- functions
def some_boxes(count: int, seed: int) -> torch.Tensor:
    drawn = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))
    return torch.cat((drawn[:, :2], drawn[:, :2] + 0.05 + drawn[:, 2:]), -1)


def test_iou_and_generalised_iou_equal_torchvision() -> None:
    a, b = some_boxes(9, 0), some_boxes(7, 1)
    close(box_ops.box_iou(a[:, None], b[None]), torchvision.ops.box_iou(a, b))
    close(box_ops.generalized_box_iou(a[:, None], b[None]), torchvision.ops.generalized_box_iou(a, b))
    assert (box_ops.generalized_box_iou(a[:, None], b[None]) < 0).any(), "some pairs lie apart"


def test_box_functions_keep_their_word_on_empty_and_broken_boxes() -> None:
    empty = torch.zeros(1, 4)
    assert box_ops.box_iou(empty, empty).item() == 0
    assert torch.isfinite(box_ops.generalized_box_iou(empty, empty)).all()
    broken = torch.full((1, 4), torch.nan)
    assert box_ops.generalized_box_iou(broken, some_boxes(1, 0)).isnan().all()
    wild = torch.rand(5, 4)
    close(box_ops.xyxy_to_cxcywh(box_ops.cxcywh_to_xyxy(wild)), wild)


def test_covered_share_is_intersection_over_the_own_area() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.6, 0.6], [0.2, 0.0, 0.3, 0.1]]])
    regions = torch.tensor([[[0.2, 0.0, 1.0, 1.0], [0.0, 0.0, 0.1, 0.4], [0.0, 0.0, 0.0, 0.0]]])
    close(box_ops.covered_share(boxes, regions), torch.tensor([[0.5, 1.0, 1.0]]))
    assert not box_ops.covered_share(boxes, regions[:, :0]).any()


def test_pairwise_l1_equals_the_broadcast() -> None:
    a, b = torch.rand(2, 9, 4), torch.rand(2, 5, 4)
    close(box_ops.pairwise_l1(a, b), (a[:, :, None] - b[:, None]).abs().sum(-1))
    assert box_ops.pairwise_l1(a, b[:, :0]).shape == (2, 9, 0)


def test_focal_equals_torchvision() -> None:
    torch.manual_seed(0)
    logits, wanted = torch.randn(4, 6) * 4, (torch.rand(4, 6) < 0.3).float()
    for alpha, gamma in ((0.25, 2.0), (-1.0, 1.5)):
        theirs = torchvision.ops.sigmoid_focal_loss(logits, wanted, alpha, gamma)
        close(sigmoid_focal(logits, wanted, alpha, gamma), theirs)
    yes, no = torch.ones_like(logits), torch.zeros_like(logits)
    theirs = torchvision.ops.sigmoid_focal_loss(logits, yes) - torchvision.ops.sigmoid_focal_loss(logits, no)
    close(sigmoid_focal_cost(logits), theirs)
    assert sigmoid_focal_cost(torch.tensor([-200.0, 200.0])).isfinite().all()


def test_inverse_sigmoid_is_the_logit_and_finite_at_the_ends() -> None:
    x = torch.linspace(0.01, 0.99, 20)
    close(box_ops.inverse_sigmoid(x), torch.logit(x), 1e-5)
    assert box_ops.inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0])).isfinite().all()
