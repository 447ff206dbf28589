"""The assignment, without a model: against SciPy for each stage and image, and by what must hold."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from toys import CostHead, Witness, make_round, make_targets

from queryvision.matching import assign, match, unite
from queryvision.structures import FREE, NONE, VOID

INF, NAN = float("inf"), float("nan")


def round_of(cost: torch.Tensor, **more):
    return make_round({"costs": {"cost": cost}}, **more)


def pairs_of(cost: torch.Tensor, counts, **more) -> np.ndarray:
    return assign([cost], [round_of(cost, **more)], counts)[0]


def given_to(pairs: np.ndarray, stage: int = 0, image: int = 0) -> dict[int, int]:
    """{query: target}; no query may occur twice."""
    mine = pairs[(pairs[:, 0] == stage) & (pairs[:, 1] == image)]
    found = {int(q): int(t) for q, t in mine[:, 2:]}
    assert len(found) == len(mine)
    return found


@st.composite
def problems(draw):
    """Costs (S,B,Q,T) with many ties, counts, pins and repeats."""
    num_stages, batch, queries = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(0, 8), min_size=batch, max_size=batch))
    room, repeats, levels = draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 5, 10**6]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    cost = rng.integers(0, levels, (num_stages, batch, queries, max(counts) + room)).astype(np.float32)
    pins = None
    if draw(st.booleans()):
        pins = torch.tensor([[int(rng.integers(VOID, count)) for _ in range(queries)] for count in counts])
    return torch.from_numpy(cost), counts, pins, repeats


@settings(max_examples=150, deadline=None)
@given(problems())
def test_assignment_equals_scipy_for_each_stage_and_image(problem) -> None:
    cost, counts, pins, repeats = problem
    pairs = pairs_of(cost, counts, pins=pins, repeats=repeats)
    assert (np.diff(pairs[:, 0] * len(counts) + pairs[:, 1]) >= 0).all(), "ordered by stage and image"
    for stage in range(cost.shape[0]):
        for image, count in enumerate(counts):
            found = given_to(pairs, stage, image)
            mine = [FREE] * cost.shape[2] if pins is None else pins[image].tolist()
            pinned = {q: t for q, t in enumerate(mine) if t >= 0}
            assert {q: t for q, t in found.items() if mine[q] != FREE} == pinned, "pinned ones get just their target"
            free = [q for q, pin in enumerate(mine) if pin == FREE]
            left = [t for t in range(count) if t not in pinned.values()] * repeats
            table = cost[stage, image].numpy().astype(float)[np.ix_(free, left)]
            rows, columns = linear_sum_assignment(table)
            chosen = [(q, t) for q, t in found.items() if mine[q] == FREE]
            assert len(chosen) == len(rows)
            assert sum(cost[stage, image, q, t].item() for q, t in chosen) == table[rows, columns].sum()
            assert all(t in left for _, t in chosen)
            assert all([t for _, t in chosen].count(t) <= repeats for t in left)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6), st.floats(0, 1))
def test_what_is_not_finite_is_chosen_only_where_nothing_else_is_left(queries, count, seed, share) -> None:
    rng = np.random.default_rng(seed)
    table = rng.normal(scale=10.0 ** rng.integers(-3, 6), size=(queries, count)).astype(np.float32)
    bad = rng.random(table.shape) < share
    table[bad] = rng.choice([NAN, INF, -INF], bad.sum())
    found = given_to(pairs_of(torch.from_numpy(table)[None, None], [count]))
    assert len(found) == min(queries, count)
    ways = (
        [list(zip(rows, range(count), strict=True)) for rows in permutations(range(queries), count)]
        if queries >= count
        else [list(zip(range(queries), columns, strict=True)) for columns in permutations(range(count), queries)]
    )
    fewest = min(sum(bool(bad[q, t]) for q, t in way) for way in ways)
    assert sum(bool(bad[q, t]) for q, t in found.items()) == fewest
    if fewest == 0:
        best = min(sum(float(table[q, t]) for q, t in way) for way in ways if not any(bad[q, t] for q, t in way))
        assert np.isclose(sum(float(table[q, t]) for q, t in found.items()), best, rtol=1e-6, atol=1e-6)


def test_a_broken_image_does_not_change_its_neighbours() -> None:
    cost = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    broken = cost.clone()
    broken[:, 1] = NAN
    before, after = pairs_of(cost, [4, 4, 3]), pairs_of(broken, [4, 4, 3])
    assert len(given_to(after, 0, 1)) == 4
    assert np.array_equal(before[before[:, 1] != 1], after[after[:, 1] != 1])


def test_padding_of_the_targets_changes_nothing() -> None:
    cost = torch.randint(0, 3, (2, 2, 6, 4), generator=torch.Generator().manual_seed(0)).float()
    for fill in (0.0, -1e6, NAN):
        wider = torch.cat((cost, torch.full((2, 2, 6, 3), fill)), -1)
        for more in ({}, {"repeats": 2}, {"pins": torch.tensor([[1, FREE, NONE, FREE, VOID, FREE]] * 2)}):
            assert np.array_equal(pairs_of(cost, [4, 2], **more), pairs_of(wider, [4, 2], **more))


def test_pins_in_the_main_group() -> None:
    cost = torch.ones(2, 1, 6, 3)
    cost[..., 0, 1] = -5.0  # query 0 would like target 1, which is pinned to query 3
    cost[..., 4, 0] = -1.0  # NONE and VOID look tempting and get nothing
    cost[..., 5, 0] = -1.0
    cost[..., 2, 2] = -2.0  # a free one that was carried competes, and wins
    pins = torch.tensor([[FREE, FREE, FREE, 1, NONE, VOID]])
    pairs = pairs_of(cost, [3], pins=pins)
    for stage in range(2):
        found = given_to(pairs, stage)
        assert found.pop(3) == 1 and found.pop(2) == 2
        assert list(found.values()) == [0] and set(found) <= {0, 1}


def test_a_pin_holds_in_its_own_image_only() -> None:
    cost = torch.eye(3)[None, None].repeat(1, 2, 1, 1).neg()
    pins = torch.tensor([[FREE, 0, FREE], [FREE, FREE, FREE]])
    pairs = pairs_of(cost, [3, 3], pins=pins)
    assert given_to(pairs, image=0)[1] == 0
    assert given_to(pairs, image=1) == {0: 0, 1: 1, 2: 2}


def test_costs_of_heads_add_up_and_all_rounds_are_matched_at_once() -> None:
    class Second(CostHead):
        name = "second"

    class Silent(CostHead):
        name = "silent"

        def cost(self, round, targets, generators):
            return None

    targets = make_targets([3, 1])
    first, second = torch.randn(2, 2, 4, 3), torch.randn(2, 2, 4, 3)
    answers = {"costs": {"cost": first}, "second": {"cost": second}, "silent": {"x": first}}
    pinned = make_round({"costs": {"cost": torch.randn(1, 2, 2, 3)}}, "denoising", pins=torch.tensor([[2, NONE], [VOID, 0]]))
    later = round_of(torch.randn(1, 2, 5, 3))
    heads = {"costs": CostHead(), "second": Second(), "silent": Silent()}
    rounds = [make_round(answers), pinned, later]
    by_stage, united = match(rounds, heads, targets)
    assert united == by_stage, "nobody asked for the union"
    alone = pairs_of(later.answers["costs"]["cost"], [3, 1])
    wanted = [pairs_of(first + second, [3, 1]), np.array([[0, 0, 0, 2], [0, 1, 1, 0]]), alone]
    for found, pairs in zip(by_stage, wanted, strict=True):
        rows = torch.stack((found.stage, found.image, found.query, found.target), 1)
        assert np.array_equal(rows.numpy(), pairs)
    assert [m.num_stages for m in by_stage] == [2, 1, 1]


def test_heads_without_a_say_still_get_pairs() -> None:
    round = make_round({"witness": {"state": torch.zeros(1, 1, 4, 2)}})
    (found,), _ = match([round], {"witness": Witness()}, make_targets([3]))
    assert sorted(found.target.tolist()) == [0, 1, 2]


def test_union_of_stages() -> None:
    def rows(*pairs):
        return np.array([[s, 0, q, t] for s, q, t in pairs])

    layers, last, other = (round_of(torch.zeros(s, 1, 4, 3), queries=n) for s, n in ((3, "main"), (1, "main"), (1, "other")))
    found = [
        rows((0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 2, 1), (2, 0, 2), (2, 1, 0)),
        rows((0, 1, 0), (0, 2, 2)),
        rows((0, 3, 2)),
    ]
    first, second, third = unite(found, [layers, last, other])
    # query 0: target 0 twice, 2 once; query 1: 0 twice, 1 once; query 2: a tie of 1 and 2, the lower wins
    wanted = {(0, 0), (1, 0), (2, 1)}
    assert {s: {(q, t) for a, _, q, t in first.tolist() if a == s} for s in range(3)} == {s: wanted for s in range(3)}
    assert {(q, t) for _, _, q, t in second.tolist()} == wanted
    assert third.tolist() == [[0, 0, 3, 2]], "other queries are apart"


def test_union_keeps_images_apart_and_stands_no_match_at_all() -> None:
    round = round_of(torch.zeros(2, 2, 3, 3))
    pairs = np.array([[0, 0, 1, 2], [0, 1, 1, 0], [1, 1, 1, 0], [1, 0, 1, 2]])
    (found,) = unite([pairs], [round])
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, pairs.tolist()))
    (nothing,) = unite([np.empty((0, 4), np.int64)], [round])
    assert nothing.shape == (0, 4)


def test_union_of_proposals_and_layers_with_carried_queries() -> None:
    # carried queries join after the proposals, so these have fewer rows
    selected = torch.tensor([[5, 2]])
    proposals = round_of(torch.zeros(1, 1, 2, 3), proposals=True, proposal_index=selected)
    layers = round_of(torch.zeros(1, 1, 4, 3), pins=torch.tensor([[FREE, FREE, 0, NONE]]))
    found = [np.array([[0, 0, 0, 1]]), np.array([[0, 0, 2, 0], [0, 0, 1, 2]])]
    first, second = unite(found, [proposals, layers])
    assert first.tolist() == [[0, 0, 0, 1], [0, 0, 1, 2]]
    assert second.tolist() == [[0, 0, 0, 1], [0, 0, 1, 2], [0, 0, 2, 0]]


def test_proposals_of_all_tokens_are_united_with_nobody() -> None:
    proposals, layers = round_of(torch.zeros(1, 1, 9, 2), proposals=True), round_of(torch.zeros(1, 1, 3, 2))
    found = [np.array([[0, 0, 1, 0]]), np.array([[0, 0, 2, 0]])]
    first, second = unite(found, [proposals, layers])
    assert (first.tolist(), second.tolist()) == ([[0, 0, 1, 0]], [[0, 0, 2, 0]])
