from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from semvid.kernels.dispatch import select
from semvid.kernels.layout import Tail
from semvid.parallel.kmeans import means_of, refine_with
from semvid.runtime.attention.call import decision, sparse_attention
from semvid.runtime.attention.refresh import made_ready, plans_of
from semvid.runtime.attention.schedule import Dense, Refresh, Refreshed, Reuse
from semvid.runtime.attention.session import Position, Session
from semvid.runtime.attention.state import Memory
from semvid.runtime.config import AttentionConfig
from tests.no_sync import no_sync


def make(seed: int = 0, **attention: Any) -> Session:
    settings = {"dense_steps": 0.0, "dense_layers": 0, "query_clusters": 5, "key_clusters": 9, "floor": 0.0} | attention
    session = Session(AttentionConfig(**settings), select("reference", torch.device("cpu")), seed)
    session.enter(Position(0, 10, "cond"))
    return session


def qkv(N: int = 100, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    centers = 3 * torch.randn(3, 6, 16)
    q, k, v = (centers[:, torch.randint(6, (N,))] + torch.randn(3, N, 16) for _ in range(3))
    return q, k, v


def call(session: Session, x: tuple[Tensor, Tensor, Tensor], layer: int = 1) -> Tensor:
    return sparse_attention(*x, session, layer, decision(session, layer))


def used(session: Session, x: tuple[Tensor, Tensor, Tensor]) -> Memory:
    """What the last call went by, with all that is not kept."""
    memory = session.cache.get(1, "cond")
    assert memory is not None
    return made_ready(*x, session, memory)


@pytest.mark.parametrize("N", [9, 63, 100, 257])
def test_all_clusters_selected_equals_dense_attention(N: int) -> None:
    x = qkv(N)
    session = make(p=1.0)
    torch.testing.assert_close(call(session, x), scaled_dot_product_attention(*x), rtol=1e-5, atol=1e-5)
    assert session.meter.read().sparse == 1.0


def test_less_mass_is_less_density_and_more_error() -> None:
    x = qkv(257)
    exact = scaled_dot_product_attention(*x)
    found = []
    for p in (0.3, 0.7, 0.95):
        session = make(p=p)
        error = (call(session, x) - exact).norm() / exact.norm()
        found.append((session.meter.read().sparse, -error.item()))
    assert found == sorted(found)
    assert 0 < found[0][0] < found[-1][0] < 1


def test_a_refresh_starts_warm_and_keeps_state_per_layer_and_branch() -> None:
    x = qkv()
    session = make()
    assert decision(session, 1) == Refresh(50, seeded=True)
    call(session, x)
    session.enter(Position(0, 10, "uncond"))
    assert decision(session, 1) == Refresh(50, seeded=True)
    session.enter(Position(1, 10, "cond"))
    assert decision(session, 1) == Refresh(2, seeded=False)
    assert decision(session, 2) == Refresh(50, seeded=True)


def test_reuse_takes_labels_and_map_as_they_are() -> None:
    session = make(refresh_every=2, p=0.5)
    call(session, qkv(seed=1))
    before = session.cache.get(1, "cond")
    session.enter(Position(1, 10, "cond"))
    assert decision(session, 1) == Reuse()
    call(session, qkv(seed=2))
    assert session.cache.get(1, "cond") is before
    session.enter(Position(2, 10, "cond"))
    assert decision(session, 1) == Refresh(2, seeded=False)


def test_reuse_computes_the_new_queries_keys_and_values() -> None:
    session = make(refresh_every=2, p=1.0)
    call(session, qkv(seed=1))
    session.enter(Position(1, 10, "cond"))
    x = qkv(seed=2)
    torch.testing.assert_close(call(session, x), scaled_dot_product_attention(*x), rtol=1e-5, atol=1e-5)


def exact(x: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return scaled_dot_product_attention(*x)


def error(session: Session, x: tuple[Tensor, Tensor, Tensor]) -> float:
    return float((call(session, x) - exact(x)).norm() / exact(x).norm())


def test_stand_ins_bring_the_result_closer_at_the_same_map() -> None:
    x = tuple(part / 2 for part in qkv(257))
    none, first, second = (error(make(p=0.3, tail=tail), x) for tail in ("none", "first", "second"))
    assert first < 0.5 * none
    assert second < 0.5 * none


def test_stand_ins_of_single_keys_are_exact_and_cost_one_column_each() -> None:
    x = qkv(40)
    for tail in ("first", "second"):
        session = make(p=0.1, tail=tail, key_clusters=40, first_iterations=1)
        torch.testing.assert_close(call(session, x), exact(x), rtol=1e-3, atol=1e-3)
        assert session.meter.read().sparse == pytest.approx(1.0)


@pytest.mark.parametrize("tail", ["first", "second"])
@pytest.mark.parametrize("seeding", ["random", "spread"])
def test_with_p_one_nothing_is_left_for_stand_ins(tail: str, seeding: str) -> None:
    x = qkv(100)
    session = make(p=1.0, tail=tail, selection="error", seeding=seeding)
    plain = make(p=1.0, seeding=seeding)
    assert torch.equal(call(session, x), call(plain, x))
    torch.testing.assert_close(call(session, x), exact(x), rtol=1e-5, atol=1e-5)


def test_under_kept_labels_means_are_those_of_the_step() -> None:
    x, moved = qkv(257), tuple(2 * part + 1 for part in qkv(257))
    session = make(refresh_every=5, p=0.3, tail="first")
    call(session, x)
    session.enter(Position(1, 10, "cond"))
    assert decision(session, 1) == Reuse()
    found = call(session, moved)
    memory = used(session, moved)
    keys, values = means_of(moved[1:], memory.keys, session.ops)
    tail = Tail(keys, values, memory.keys.sizes.float().log())
    order = [side.permutation.order for side in (memory.queries, memory.keys, memory.keys)]
    grouped = [session.ops.gather_rows(part, by) for part, by in zip(moved, order, strict=True)]
    out, _ = session.ops.attention(*grouped, plans_of(memory, session)[0], tail=tail)
    assert torch.equal(found, session.ops.scatter_rows(out, order[0]))


@pytest.mark.parametrize("tail", ["none", "second"])
def test_rows_get_what_the_anchor_of_their_cluster_lacks(tail: str) -> None:
    x = q, k, v = qkv(257)
    session, plain = (make(p=0.3, tail=tail, refresh_every=5, anchors=anchors) for anchors in ("yes", "no"))
    for step in range(2):
        for one in (session, plain):
            one.enter(Position(step, 10, "cond"))
        found, sparse = call(session, x), call(plain, x)
        clusters = used(session, x).queries
        (means,) = means_of([q], clusters, session.ops)
        # The means in the place of the queries, each in its cluster: what the sparse call makes of them.
        of_means = make(p=0.3, tail=tail, refresh_every=5)
        first = used(plain, x)
        order = of_means.ops.group(torch.arange(5, dtype=torch.int32).expand(3, 5).contiguous(), 5)
        runs = of_means.ops.plan(order.offsets, first.keys.permutation.offsets, plans_of(first, of_means)[0].block_map)
        grouped = [of_means.ops.gather_rows(y, first.keys.permutation.order) for y in (k, v)]
        stand_ins = None if tail == "none" else Tail(*means_of([k, v], first.keys, of_means.ops), first.log_n)
        made, _ = of_means.ops.attention(means, *grouped, runs, tail=stand_ins)
        lacking = scaled_dot_product_attention(means, k, v) - made
        expected = sparse + torch.gather(lacking, 1, clusters.labels.long()[..., None].expand(-1, -1, 16))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        q, k, v = x = tuple(y + 0.1 * torch.randn(y.shape) for y in x)


def test_anchors_bring_the_result_closer_at_the_same_map() -> None:
    x = tuple(part / 3 for part in qkv(600))
    for tail, share in (("none", 0.5), ("second", 0.9)):
        without, found = (error(make(p=0.3, tail=tail, query_clusters=20, anchors=a), x) for a in ("no", "yes"))
        assert found < share * without


def test_with_a_cluster_a_query_anchors_bring_all_and_cost_as_much() -> None:
    x = qkv(40)
    session = make(p=0.3, anchors="yes", query_clusters=40, first_iterations=1)
    torch.testing.assert_close(call(session, x), exact(x), rtol=1e-4, atol=1e-5)
    plain = make(p=0.3, query_clusters=40, first_iterations=1)
    call(plain, x)
    assert session.meter.read().sparse == pytest.approx(2 * plain.meter.read().sparse + 1)


@pytest.mark.parametrize("everything", [{"p": 1.0}, {"density": 1.0}])
@pytest.mark.parametrize("tail", ["none", "second"])
def test_where_everything_is_selected_anchors_and_tail_are_left_out(everything: dict[str, float], tail: str) -> None:
    x = qkv()
    session = make(**everything, anchors="yes", tail=tail)
    torch.testing.assert_close(call(session, x), exact(x), rtol=1e-5, atol=1e-5)
    assert session.meter.read().sparse == 1.0


@pytest.mark.parametrize("anchors", ["no", "yes"])
def test_the_density_of_the_job_is_met_layer_by_layer(anchors: str) -> None:
    for tail in ("none", "second"):
        session = make(density=0.4, tail=tail, query_clusters=20, key_clusters=40, anchors=anchors)
        call(session, tuple(part / 3 for part in qkv(600)))
        assert session.meter.read().sparse == pytest.approx(0.4, rel=0.1)


def test_a_density_below_what_stand_ins_cost_is_refused_at_the_first_call() -> None:
    with pytest.raises(ValueError, match=r"attention.density is 0.06; accepted: more than 0.0667: so much do"):
        call(make(density=0.06, tail="second", query_clusters=20, key_clusters=40), qkv(600))


def test_a_density_that_no_weight_is_left_for_is_not_spent() -> None:
    # All but 6 · 10⁻⁶ of it is estimated to lie in a fifth of the keys.
    asked, most = (make(query_clusters=20, key_clusters=40, **budget) for budget in ({"density": 0.4}, {"p": 0.999994}))
    for session in (asked, most):
        call(session, qkv(600))
    assert asked.meter.read().sparse < 0.3
    assert asked.meter.read().sparse == pytest.approx(most.meter.read().sparse, rel=0.02)


def test_orders_of_a_whole_sequence_are_not_kept_and_labels_are_short() -> None:
    session, x = make(tail="first", anchors="yes", p=0.3), qkv(257)
    call(session, x)
    kept = session.cache.get(1, "cond")
    assert kept is not None
    assert not kept.ready
    assert kept.anchored is None
    assert [side.labels.dtype for side in (kept.queries, kept.keys)] == [torch.int16] * 2
    assert [side.permutation.order.numel() for side in (kept.queries, kept.keys)] == [0, 0]
    again = used(session, x)
    for side, C in ((again.queries, 5), (again.keys, 9)):
        expected = session.ops.group(side.labels, C)
        assert torch.equal(side.permutation.order, expected.order)
        assert torch.equal(side.permutation.offsets, expected.offsets)
    # What lay beyond the 16 bits of a label would come back as another one.
    wide = kept.queries._replace(labels=torch.tensor([[40_000]]).int(), centroids=torch.zeros(1, 40_001, 1))
    assert kept._replace(queries=wide).short().queries.labels.tolist() == [[40_000]]


def test_centroids_are_kept_in_the_dtype_of_the_tokens_and_started_from(monkeypatch: pytest.MonkeyPatch) -> None:
    session, started = make(tail="first", p=0.3), []

    def watched(xs: Any, starts: list[Tensor], *rest: Any, **more: Any) -> Any:
        started.append(starts)
        return refine_with(xs, starts, *rest, **more)

    monkeypatch.setattr("semvid.runtime.attention.refresh.refine_with", watched)
    for step in range(2):
        session.enter(Position(step, 10, "cond"))
        sparse_attention(*(x.bfloat16() for x in qkv(257)), session, 1, Refresh(2, seeded=step == 0))
        kept = session.cache.get(1, "cond")
        assert kept is not None
        centroids = [side.centroids for side in kept[:2]]
        assert [x.dtype for x in centroids] == [torch.bfloat16] * 2
        if step == 0:
            first = centroids
    assert all(torch.equal(a, b.float()) for a, b in zip(started[1], first, strict=True))


def test_branches_that_share_go_by_the_same_map_and_their_own_means() -> None:
    session = make(p=0.5, tail="first", share_branches="yes")
    call(session, qkv(257))
    first = session.cache.get(1, "cond")
    session.enter(Position(0, 10, "uncond"))
    assert decision(session, 1) == Reuse()
    x = qkv(257, seed=1)
    assert not torch.equal(call(session, x), exact(x))
    assert session.cache.memories.keys() == {(1, "cond")}
    assert session.cache.get(1, "cond") is first
    session.enter(Position(1, 10, "cond"))
    assert decision(session, 1) == Refresh(2, seeded=False)


def test_drift_is_the_share_of_labels_that_changed() -> None:
    session = make(refresh="drift", refresh_every=1, drift=0.5)
    call(session, qkv(seed=1))
    before = session.cache.get(1, "cond")
    session.enter(Position(1, 10, "cond"))
    call(session, qkv(seed=2))
    after = session.cache.get(1, "cond")
    assert before is not None
    assert after is not None
    pairs = ((before.queries, after.queries), (before.keys, after.keys))
    changed = sum(int((old.labels != new.labels).sum()) for old, new in pairs)
    assert after.refreshed() == Refreshed(1, 1, changed / (2 * 3 * 100))
    assert before.refreshed() == Refreshed(0, 0, None)


def test_centroids_are_the_means_of_their_labels() -> None:
    x = qkv()
    session = make()
    call(session, x)
    memory = session.cache.get(1, "cond")
    assert memory is not None
    keys = memory.keys
    for h in range(3):
        for c in range(9):
            rows = x[1][h][keys.labels[h] == c]
            assert keys.sizes[h, c] == len(rows)
            if len(rows):
                torch.testing.assert_close(keys.centroids[h, c], rows.mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", [{"seed": 1}, {"layer": 2}, {"branch": "uncond"}, {"step": 1}])
def test_the_first_centroids_depend_on_seed_layer_branch_and_step(other: dict[str, Any]) -> None:
    x = qkv()

    def labels(seed: int = 0, layer: int = 1, branch: str = "cond", step: int = 0) -> Tensor:
        session = make(seed=seed, first_iterations=1)
        session.enter(Position(step, 10, branch))
        call(session, x, layer)
        memory = session.cache.get(layer, branch)
        assert memory is not None
        return memory.keys.labels

    assert torch.equal(labels(), labels())
    assert not torch.equal(labels(), labels(**other))


def test_dense_layers_and_steps_are_left_to_the_model() -> None:
    session = make(dense_layers=2, dense_steps=0.1)
    assert decision(session, 5) == Dense()
    session.enter(Position(1, 10, "cond"))
    assert decision(session, 1) == Dense()
    assert isinstance(decision(session, 2), Refresh)


@pytest.mark.parametrize("parts", [{}, {"tail": "second", "anchors": "yes"}])
def test_every_backend_tells_the_same_story(
    parts: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":
        # The interpreter walks a block element by element.
        monkeypatch.setattr("semvid.kernels.permute.SORT_BLOCK", 64)
    x = tuple(part.to(device) for part in qkv(63))
    found = []
    for backend in ("reference", "triton"):
        config = AttentionConfig(dense_steps=0.0, p=0.6, refresh_every=2, first_iterations=1, **parts)
        session = Session(config, select(backend, device), 0)
        for step in range(2):
            session.enter(Position(step, 2, "cond"))
            out = sparse_attention(*x, session, 1, decision(session, 1))
        found.append((out, session.meter.read().sparse))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    assert found[0][1] == pytest.approx(found[1][1])
    assert 0 < found[0][1] < 1


def on_gpu(**parts: Any) -> tuple[Session, tuple[Tensor, Tensor, Tensor]]:
    """A session of the GPU's kernels after one seeded call, and its bf16 input of 12 heads."""
    settings = AttentionConfig(dense_steps=0.0, refresh_every=2, query_clusters=40, key_clusters=120, **parts)
    session = Session(settings, select("auto", torch.device("cuda")), 0)
    session.enter(Position(0, 10, "cond"))
    torch.manual_seed(0)
    centers = torch.randn(12, 50, 64, device="cuda")
    parts = (centers[:, torch.randint(50, (5000,))] + 0.5 * torch.randn(12, 5000, 64, device="cuda") for _ in range(3))
    q, k, v = (part.bfloat16() for part in parts)
    call(session, (q, k, v))
    return session, (q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [{}, {"tail": "second", "anchors": "yes"}])
@pytest.mark.parametrize(("step", "todo"), [(1, Reuse()), (2, Refresh(2, seeded=False))])
def test_a_call_never_waits_for_the_host(step: int, todo: object, parts: dict[str, Any]) -> None:
    session, x = on_gpu(**parts)
    for other in (1, 2):
        # Compiles what either decision needs.
        session.enter(Position(other, 10, "cond"))
        call(session, x)
    session.enter(Position(step + 2, 10, "cond"))
    assert decision(session, 1) == todo
    with no_sync():
        out = call(session, x)
    torch.testing.assert_close(out, call(session, x), rtol=2e-2, atol=2e-3)


@pytest.mark.gpu
def test_a_first_call_never_waits_for_the_host() -> None:
    session, x = on_gpu()
    with no_sync():
        out = call(session, x, layer=2)
    torch.testing.assert_close(out, call(session, x, layer=2), rtol=2e-2, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("todo", [Reuse(), Refresh(2, seeded=False)])
def test_a_call_is_captured_in_a_graph_and_replays_the_same(todo: Reuse | Refresh) -> None:
    session, x = on_gpu()
    before = session.cache.get(1, "cond")
    assert before is not None
    expected = sparse_attention(*x, session, 1, todo)
    session.cache.put(1, "cond", before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse_attention(*x, session, 1, todo)
    for _ in range(2):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)
