"""The planner: who computes what, on recorded head densities, random ones and odd ones."""

import json
from typing import NamedTuple

import numpy as np
import pytest

from semvid.parallel import balance as balancing
from semvid.parallel.balance import (
    SNAP,
    TILE_OVERHEAD_KEYS,
    TILE_ROWS,
    WHOLE_HEADS_TOLERANCE,
    Ints,
    Piece,
    balance,
    contiguous,
    cost,
    longest_first,
    rows_in,
)
from semvid.runtime.settings import CONFIGS

PARTS = [2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 31, 48, 64]


class Layer(NamedTuple):
    """One layer's work, as `balance` takes it."""

    name: str
    rows: Ints
    keys: Ints


def sizes(heads: int, clusters: int, tokens: int, seed: int) -> Ints:
    """Query rows of clusters as uneven as real ones, int64 [heads, clusters]."""
    generator = np.random.default_rng(seed)
    weights = np.exp(0.8 * generator.standard_normal((heads, clusters)))
    return generator.multinomial(tokens, weights / weights.sum(1, keepdims=True)).astype(np.int64)


def recorded() -> list[Layer]:
    """The recorded traces, each head's clusters as dense as the head."""
    traces = json.loads((CONFIGS / "traces" / "head_densities.json").read_text())["traces"]
    layers = []
    for trace in traces:
        rows = sizes(trace["heads"], 300, trace["tokens"], seed=0)
        keys = np.rint(np.array(trace["density"]) * trace["tokens"]).astype(np.int64)
        name = f"{trace['model']}-{trace['layer']}"
        layers.append(Layer(name, rows, np.broadcast_to(keys[:, None], rows.shape)))
    return layers


def drawn() -> list[Layer]:
    """Random layers of any number of heads, whose clusters differ in keys and are empty here and there."""
    layers = []
    for seed, (heads, clusters, tokens) in enumerate(
        [(1, 5, 100), (3, 63, 5000), (7, 100, 257), (40, 30, 9000), (17, 1, 63)]
    ):
        generator = np.random.default_rng(seed)
        rows = sizes(heads, clusters, tokens, seed) * (generator.random((heads, clusters)) > 0.2)
        keys = generator.integers(0, tokens + 1, (heads, clusters))
        layers.append(Layer(f"drawn-{heads}x{clusters}", rows, keys))
    return layers


RECORDED, DRAWN = recorded(), drawn()


def name_of(value: object) -> str:
    return value.name if isinstance(value, Layer) else str(value)


def odd() -> list[Layer]:
    """Layers that no model has."""
    one = np.zeros((4, 6), np.int64)
    one[2, 3] = 10_000
    some = np.array([[0, 0, 0], [5, 700, 1], [0, 0, 0], [130, 0, 64], [0, 0, 0]])
    return [
        Layer("one head", sizes(1, 20, 50_000, 0), np.full((1, 20), 9000)),
        Layer("one row", np.ones((1, 1), np.int64), np.ones((1, 1), np.int64)),
        Layer("heads without rows", some, np.full((5, 3), 40)),
        Layer("clusters without rows", np.tile([0, 300, 0, 0, 17, 0], (6, 1)), np.full((6, 6), 100)),
        Layer("all in one cluster", one, np.full((4, 6), 500)),
        Layer("no keys", sizes(5, 10, 3000, 1), np.zeros((5, 10), np.int64)),
        Layer("no rows", np.zeros((3, 4), np.int64), np.full((3, 4), 7)),
        Layer("one heavy head", np.full((12, 4), 256), np.array([[100_000] * 4] + [[0] * 4] * 11)),
    ]


ODD = odd()


def check_plan(layer: Layer, parts: int) -> list[list[Piece]]:
    """Returns the plan, which has every row in one piece, few partial pieces a part, and nearly equal costs."""
    plan = balance(layer.rows, layer.keys, parts)
    assert len(plan) == parts
    length = layer.rows.sum(1).tolist()
    reached = [0] * len(length)
    for head, first, last in sorted(piece for part in plan for piece in part):
        assert first == reached[head] < last
        reached[head] = last
    assert reached == length
    for part in plan:
        assert sum(last - first < length[head] for head, first, last in part) <= 2
        assert len({piece.head for piece in part}) == len(part)
    costs = [cost(layer.rows, layer.keys, part) for part in plan]
    # Cuts inside a cluster fall between its tiles, so that no tile is counted twice.
    tiles = -(-layer.rows // TILE_ROWS)
    tile_cost = TILE_ROWS * (layer.keys + TILE_OVERHEAD_KEYS)
    assert sum(costs) == (tiles * tile_cost).sum()
    mean, tile = sum(costs) / parts, tile_cost[tiles > 0].max(initial=0)
    assert max(costs) <= mean + max(WHOLE_HEADS_TOLERANCE * mean, tile, 2 * SNAP * mean) + 1e-6 * mean
    return plan


@pytest.mark.parametrize("layer", RECORDED + DRAWN + ODD, ids=name_of)
def test_every_row_is_in_one_piece_and_parts_cost_the_same(layer: Layer) -> None:
    for parts in (1, *PARTS):
        check_plan(layer, parts)


@pytest.mark.parametrize("layer", RECORDED, ids=name_of)
def test_recorded_layers_balance_within_three_percent(layer: Layer) -> None:
    for parts in PARTS:
        plan = balance(layer.rows, layer.keys, parts)
        costs = [cost(layer.rows, layer.keys, part) for part in plan]
        assert max(costs) * parts <= 1.03 * sum(costs)
        if parts <= 8:
            pairs = [sum(int(layer.keys[head, 0]) * (last - first) for head, first, last in part) for part in plan]
            assert max(pairs) * parts <= 1.03 * sum(pairs)


@pytest.mark.parametrize("layer", [layer for layer in RECORDED if len(layer.rows) == 40], ids=name_of)
def test_forty_heads_on_four_parts_move_hardly_more_than_ulysses(layer: Layer) -> None:
    tokens, ulysses = int(layer.rows[0].sum()), 4 * layer.rows.sum() / 4
    plan = balance(layer.rows, layer.keys, 4)
    assert max(sum(2 * tokens + 2 * (last - first) for _, first, last in part) for part in plan) <= 1.15 * ulysses
    # They balance whole.
    assert all((first, last) == (0, tokens) for part in plan for _, first, last in part)
    assert [len(part) for part in plan] == [10, 10, 10, 10]


def test_equal_heads_stay_whole_where_they_can() -> None:
    rows, keys = np.full((24, 10), 128), np.full((24, 10), 1000)
    for parts in (1, 2, 3, 4, 6, 8, 12, 24):
        plan = balance(rows, keys, parts)
        assert [len(part) for part in plan] == [24 // parts] * parts
        assert all((first, last) == (0, 1280) for part in plan for _, first, last in part)
    split = [piece for part in balance(rows, keys, 5) for piece in part]
    assert len(split) == 24 + 4


def test_one_head_is_cut_into_as_many_pieces_as_parts() -> None:
    plan = balance(np.full((1, 8), 1280), np.full((1, 8), 500), 64)
    # 80 tiles on 64 parts: one or two each.
    assert [len(part) for part in plan] == [1] * 64
    assert {part[0].last - part[0].first for part in plan} == {128, 256}


def test_more_parts_than_tiles_leave_some_empty() -> None:
    plan = check_plan(Layer("", np.array([[100, 30]]), np.array([[7, 7]])), 5)
    assert sum(bool(part) for part in plan) == 2


def test_without_rows_there_are_no_pieces() -> None:
    assert balance(np.zeros((3, 4), np.int64), np.ones((3, 4), np.int64), 4) == [[], [], [], []]


@pytest.mark.parametrize("layer", [RECORDED[0], RECORDED[4], *DRAWN], ids=name_of)
def test_equal_counts_give_equal_plans(layer: Layer) -> None:
    for parts in (3, 8):
        again = balance(layer.rows.copy(order="F"), np.array(layer.keys), parts)
        assert balance(layer.rows, layer.keys, parts) == again
        assert all(type(number) is int for part in again for piece in part for number in piece)


def test_small_tiles_cut_toy_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancing, "TILE_ROWS", 4)
    monkeypatch.setattr(balancing, "TILE_OVERHEAD_KEYS", 0)
    plan = balance(np.array([[8, 8]]), np.array([[10, 10]]), 2)
    assert plan == [[Piece(0, 0, 8)], [Piece(0, 8, 16)]]
    plan = balance(np.array([[5, 11]]), np.array([[10, 20]]), 2)
    # Tiles of 4, 1 | 4, 4, 3 rows cost 40, 40, 80, 80, 80.
    assert plan == [[Piece(0, 0, 9)], [Piece(0, 9, 16)]]


def test_costs_are_counted_as_tile_by_tile() -> None:
    rows, keys = np.array([[300, 0, 5], [128, 129, 1]]), np.array([[10, 20, 30], [40, 50, 60]])
    for head, first, last in [(0, 0, 305), (0, 128, 302), (1, 5, 6), (1, 0, 258), (1, 128, 257), (0, 7, 7)]:
        inside = [set(range(first, last)) & set(range(end - n, end))
                  for n, end in zip(rows[head], np.cumsum(rows[head]), strict=True)]  # fmt: skip
        assert rows_in(rows[head], first, last).tolist() == [len(rows_of) for rows_of in inside]
        tiles = [-(-len(rows_of) // TILE_ROWS) for rows_of in inside]
        expected = sum(t * TILE_ROWS * (k + TILE_OVERHEAD_KEYS) for t, k in zip(tiles, keys[head], strict=True))
        assert cost(rows, keys, [Piece(head, first, last)]) == expected
    assert cost(rows, keys, []) == 0


def test_contiguous_places_heads_in_order() -> None:
    work = np.arange(5)
    assert contiguous(work, 2) == [[0, 1, 2], [3, 4]]
    assert contiguous(work, 7) == [[0], [1], [2], [3], [4], [], []]


def test_longest_first_gives_the_next_head_to_the_least() -> None:
    assert longest_first(np.array([3, 9, 4, 8, 1]), 2) == [[1, 0, 4], [3, 2]]
    assert longest_first(np.array([5, 5, 5]), 4) == [[0], [1], [2], []]
