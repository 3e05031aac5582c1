"""One rank of `semvid bench layer`: the cases of one shape, each checked against fp32 and then timed by all ranks."""

import gc
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semvid.kernels.dense import dense
from semvid.kernels.dispatch import Ops, select
from semvid.kernels.layout import BlockMap
from semvid.launch import machine
from semvid.launch.bench import options as settings
from semvid.launch.bench import timing, workload
from semvid.launch.bench.options import SHAPES, LayerOptions, Options, Shape
from semvid.parallel import balance, xdit
from semvid.parallel.balance import Ints, Piece
from semvid.parallel.itinerary import Placement
from semvid.parallel.maps import own_heads, pack_bits
from semvid.parallel.mesh import Mesh
from semvid.parallel.phases import recording
from semvid.parallel.ranks import Ranks, connect, join, leave, slowest
from semvid.parallel.shard import Shard, pad
from semvid.parallel.windows import Windows, open_windows
from semvid.runtime.attention.call import dense_attention, sparse_attention
from semvid.runtime.attention.schedule import Decision, Refresh, Reuse
from semvid.runtime.attention.session import Position, Session
from semvid.runtime.attention.state import Memory
from semvid.runtime.models.random_block import wan_block

RESULT = "{place}-{rank}.json"
REFRESH, REUSE = Refresh(2, seeded=False), Reuse()
LAYER, BRANCH = 1, "cond"
SAMPLED_HEADS, SAMPLED_ROWS = 8, 24
# Relative, of rows computed in bf16 against fp32 ones: rounding of the weights and of the result.
ERROR_BOUND = 1e-2
PHASE_CALLS = 3
# Some 20 ms: in a model the host is a block or more ahead of the device.
PAUSE_CYCLES = 40_000_000


def run(rank: int, world: int, folder: str, options: LayerOptions) -> None:
    """Measures all shapes as rank `rank` of `world`, and writes each one's result to `folder` when it has it."""
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, machine.usable_cores() // world))
    if world > 1:
        join(device, (rank, world, f"{folder}/store"))
    ulysses = Ranks() if world == 1 else connect(Mesh(ulysses=world))
    ring = connect(Mesh(ring=world)) if world > 1 else ulysses
    densities = options.densities * (len(options.shapes) if len(options.densities) == 1 else 1)
    with torch.no_grad():
        windows = open_windows(ulysses, device) if options.windows else None
        for place, (name, density) in enumerate(zip(options.shapes, densities, strict=True)):
            found = _Layer(SHAPES[name], density, options, (ulysses, ring), windows, device).measure()
            _write(Path(folder) / RESULT.format(place=place, rank=rank), found)
            # The next one's inputs must not stand beside these.
            gc.collect()
    leave()


def _write(path: Path, found: dict[str, Any]) -> None:
    """Writes a result whole or not at all: it is read as soon as it is there."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
    part.rename(path)


class _Call:
    """This rank's part of one attention call: a session, and its rows of q, k and v as a model lays them."""

    def __init__(
        self,
        layer: "_Layer",
        ranks: Ranks,
        windows: Windows | None = None,
        placement: Placement = balance.balance,
    ) -> None:
        work = layer.work
        self.work, self.ranks = work, ranks
        self.afresh = False
        """Whether each refresh is the first, whose cuts wait for its own loads."""
        self.shard = Shard(ranks.shard, ranks.mesh.sequence, work.q.shape[1])
        self.session = Session(work.config, layer.with_drawn_map(ranks), 0, ranks, place_work=placement)
        if ranks.mesh.sequence > 1:
            self.session.shard = self.shard
        self.session.windows = windows
        self.session.enter(Position(20, 50, BRANCH))
        mine = [x[:, self.shard.first : self.shard.first + self.shard.tokens] for x in (work.q, work.k, work.v)]
        self.q, self.k = (x.contiguous() for x in mine[:2])
        # A projection's output: tokens first.
        self.v = mine[2].transpose(0, 1).contiguous().transpose(0, 1)
        # Where every refresh starts: the centroids of the step before.
        self.before = Memory(
            queries=work.queries._replace(centroids=work.q_starts),
            keys=work.keys._replace(centroids=work.k_starts),
            density=torch.ones(work.q.shape[0], device=work.q.device),
            bits=pack_bits(work.block_map.selected),
        )

    def sparse(self, todo: Decision) -> Tensor:
        """Refreshes from the same centroids as every other call, or reuses what the last one found."""
        if isinstance(todo, Refresh):
            last = self.session.cache.get(LAYER, BRANCH)
            # As from step to step, the cuts come from the refresh before.
            exchange = None if last is None or self.afresh else last.exchange
            self.session.cache.put(LAYER, BRANCH, self.before._replace(exchange=exchange))
        return sparse_attention(self.q, self.k, self.v, self.session, LAYER, todo)

    def dense(self) -> Tensor:
        """Computes all pairs."""
        if self.session.shard is None:
            return dense(self.q, self.k, self.v)
        return dense_attention(self.q, self.k, self.v, self.session)

    def error(self, out: Tensor) -> float:
        """Returns how far sampled rows of `sparse` are from fp32 attention over the same clusters and map, relative."""
        work, memory = self.work, self.session.cache.get(LAYER, BRANCH)
        assert memory is not None
        labels = pad(memory.keys.labels.int(), 1, self.shard.rows)
        whole = self.shard.gather(labels, 1, self.ranks.sequence).long()
        wrong = right = 1e-30
        if self.shard.tokens == 0:
            return 0.0
        for head in range(0, out.shape[0], -(-out.shape[0] // SAMPLED_HEADS)):
            places = torch.randint(self.shard.tokens, (SAMPLED_ROWS,), device=out.device)
            clusters = memory.queries.labels[head, places].long()
            scores = self.q[head, places].float() @ work.k[head].float().T / work.q.shape[2] ** 0.5
            skipped = ~work.block_map.selected[head, clusters][:, whole[head]]
            exact = torch.softmax(scores.masked_fill_(skipped, -torch.inf), -1) @ work.v[head].float()
            wrong += float((out[head, places].float() - exact).square().sum())
            right += float(exact.square().sum())
        return math.sqrt(wrong / right)


class _Layer:
    """One rank's inputs and cases of one shape."""

    def __init__(
        self,
        shape: Shape,
        density: float,
        options: LayerOptions,
        ranks: tuple[Ranks, Ranks],
        windows: Windows | None,
        device: torch.device,
    ) -> None:
        self.shape, self.options, self.windows, self.device = shape, options, windows, device
        self.ulysses, self.ring = ranks
        self.world = self.ulysses.mesh.world_size
        self.ops = select(options.backend, device)
        # Every rank draws the same whole.
        config = settings.attention_config(Options(), shape)
        self.work = workload.make(shape, config, density, options.seed, device)

    def measure(self) -> dict[str, Any]:
        """Returns all cases' rows. Every rank measures the same cases in the same order."""
        ulysses = self.ulysses
        rows = [self._sparse("refresh", REFRESH, ulysses), self._sparse("reuse", REUSE, ulysses), self._dense(ulysses)]
        if self.options.block:
            rows += [self._block("block, refresh", REFRESH, ulysses), self._block("block, reuse", REUSE, ulysses)]
            rows.append(self._block("block, dense", None, ulysses))
        if self.windows is not None:
            rows.append(self._sparse("refresh, planned afresh", REFRESH, ulysses, afresh=True))
            for name, todo in (("refresh", REFRESH), ("reuse", REUSE)):
                rows.append(self._sparse(f"{name}, by collectives", todo, ulysses, collective=True))
        if self.world > 1:
            for name, heads in (("contiguous", balance.contiguous), ("longest first", balance.longest_first)):
                rows.append(self._sparse(f"refresh, {name}", REFRESH, ulysses, placement=_whole_heads(heads)))
            rows.append(self._sparse("refresh, ring", REFRESH, self.ring))
        if self.options.usp and self.world > 1:
            rows += self._usp(ulysses)
        config, pairs = self.work.config, workload.computed_pairs(
            self.work.block_map, self.work.queries.sizes, self.work.keys.sizes
        )  # fmt: skip
        return {
            "backend": self.ops.name,
            "windows": self.windows is not None,
            "density": pairs / (self.shape.heads * self.shape.tokens**2),
            "query_clusters": config.query_clusters,
            "key_clusters": config.key_clusters,
            "rows": rows,
        }

    def with_drawn_map(self, ranks: Ranks) -> Ops:
        """Returns the backend with a map that is made, and then replaced by the one of the recorded densities."""
        drawn = self.work.block_map.selected
        if ranks.mesh.sequence > 1:
            drawn = drawn[own_heads(drawn.shape[0], ranks, self.device)]

        def top_p_map(*given: Any) -> BlockMap:
            self.ops.top_p_map(*given)
            return BlockMap(drawn)

        return self.ops._replace(top_p_map=top_p_map)

    def _sparse(
        self,
        name: str,
        todo: Decision,
        ranks: Ranks,
        *,
        placement: Placement = balance.balance,
        collective: bool = False,
        afresh: bool = False,
    ) -> dict[str, Any]:
        windows = None if collective or ranks.mesh.ring > 1 else self.windows
        call = _Call(self, ranks, windows, placement)
        call.afresh = afresh
        call.sparse(REFRESH)
        row = self._time(name, lambda: call.sparse(todo), call.error)
        memory = call.session.cache.get(LAYER, BRANCH)
        exchange = None if memory is None else memory.exchange
        if exchange is not None:
            row["sent_bytes"] = exchange.rows_sent(ranks.shard) * call.q.shape[2] * call.q.element_size()
            row["planned_imbalance"] = self._planned(call, placement)
            first = ranks.place.ring * ranks.mesh.ulysses
            of_row = sum(call.shard.all_tokens()[first : first + ranks.mesh.ulysses])
            row["parts_of_heads"] = sum(piece.last - piece.first < of_row for piece in exchange.pieces)
        return row

    def _dense(self, ranks: Ranks) -> dict[str, Any]:
        return self._time("dense", _Call(self, ranks, self.windows).dense)

    def _usp(self, ranks: Ranks) -> list[dict[str, Any]]:
        """Returns the row of xfuser's dense USP; none where heads or tokens don't divide among the ranks."""
        if self.shape.heads % self.world or self.shape.tokens % self.world:
            self._say(f"no USP: {self.shape.heads} heads and {self.shape.tokens} tokens must divide among the ranks")
            return []
        call = _Call(self, ranks)
        xdit.initialize(ranks)
        tokens = self.shape.tokens
        row = self._time(
            f"dense, xfuser USP {xdit.dense_backend()}", lambda: xdit.usp_dense(call.q, call.k, call.v, tokens)
        )
        xdit.release()
        return [row]

    def _block(self, name: str, todo: Decision | None, ranks: Ranks) -> dict[str, Any]:
        """Times a whole transformer block; its attention computes this workload's rows, not the random model's."""
        call = _Call(self, ranks, self.windows)
        if todo is not None:
            call.sparse(REFRESH)
        attention = call.dense if todo is None else lambda: call.sparse(todo)
        heads, head_dim = self.shape.heads, self.shape.head_dim
        block = wan_block(heads, head_dim, call.shard.tokens, call.q, attention, self.ops, fused=todo is not None)
        row = self._time(name, block)
        # Its weights must not stand beside the next case's.
        del block, attention
        gc.collect()
        return row

    def _planned(self, call: _Call, placement: Placement) -> float:
        """Returns the largest part's cost over the mean of this rank's ring row, as planned for the drawn clusters."""
        work, mesh = self.work, call.ranks.mesh
        first = call.ranks.place.ring * mesh.ulysses * call.shard.rows
        labels = work.queries.labels[:, first : first + mesh.ulysses * call.shard.rows].long()
        rows = torch.zeros_like(work.queries.sizes, dtype=torch.int64).scatter_add_(1, labels, torch.ones_like(labels))
        computed = torch.einsum("hqk,hk->hq", work.block_map.selected.double(), work.keys.sizes.double()).long()
        parts = placement(rows.cpu().numpy(), computed.cpu().numpy(), mesh.ulysses)
        costs = [balance.cost(rows.cpu().numpy(), computed.cpu().numpy(), part) for part in parts]
        return max(costs) * len(costs) / max(1, sum(costs))

    def _time(
        self, name: str, call: Callable[[], Tensor], error: Callable[[Tensor], float] | None = None
    ) -> dict[str, Any]:
        """Checks, then times one case; every rank takes part.

        Raises:
            RuntimeError: the check fails; nothing is timed then.
        """
        out = call()
        found = None if error is None else error(out)
        if not torch.isfinite(out).all() or (found is not None and not found <= ERROR_BOUND):
            error_text = "not finite" if found is None else f"relative error {found}, accepted: up to {ERROR_BOUND}"
            raise RuntimeError(f"{name} of {self.shape.name}: {error_text}")
        del out
        for _ in range(self.options.warmup):
            call()
        ms = [self._once(call) for _ in range(self.options.repeats)]
        self._ready()
        with recording(self.device) as recorder:
            for _ in range(PHASE_CALLS):
                self._ready()
                self._pause()
                call()
        phases = {phase: round(took / PHASE_CALLS, 4) for phase, took in recorder.milliseconds().items()}
        median, low, high = (timing.percentile(ms, share) for share in (0.5, 0.2, 0.8))
        self._say(f"{name} {median:.2f} ms")
        return {
            "name": name,
            "median_ms": median,
            "ms_20": low,
            "ms_80": high,
            "repeats": len(ms),
            "error": found,
            "phases_ms": phases,
            "sent_bytes": None,
            "planned_imbalance": None,
        }

    def _say(self, what: str) -> None:
        if self.ulysses.rank == 0:
            print(f"semvid: {self.shape.name}: {self.world} ranks: {what}", file=sys.stderr, flush=True)

    def _once(self, call: Callable[[], Tensor]) -> float:
        """Returns the ms of one call on the rank where it takes longest; all begin together."""
        self._ready()
        with recording(self.device) as recorder:
            self._pause()
            begin = recorder.mark(on_host=False)
            call()
            recorder.add("call", begin, recorder.mark(on_host=False))
        return slowest(recorder.milliseconds()["call"], self.device)

    def _pause(self) -> None:
        """Keeps the device busy while the host queues, as the layers before do in a model."""
        if self.device.type == "cuda":
            torch.cuda._sleep(PAUSE_CYCLES)

    def _ready(self) -> None:
        """Waits until every rank's device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        slowest(0.0, self.device)


def _whole_heads(place_heads: Callable[[Ints, int], list[list[int]]]) -> Placement:
    """Returns a rule that places whole heads by their work, as a placement."""

    def place(rows: Ints, keys: Ints, parts: int) -> list[list[Piece]]:
        groups = place_heads(balance.head_work(rows, keys), parts)
        return [[Piece(head, 0, int(rows[head].sum())) for head in group] for group in groups]

    return place
