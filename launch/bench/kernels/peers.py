"""Other people's code beside ours: each peer yields cases, with the same inputs, checked like our own.

Whatever goes wrong in a peer (its import included) is the runner's to catch: one line, and not the end.
"""

import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from semvid.kernels import reference
from semvid.launch.bench.kernels import block_cases, checks
from semvid.launch.bench.kernels.case import Case
from semvid.launch.bench.kernels.cases import Cases, turned
from semvid.launch.bench.kernels.checks import Check
from semvid.launch.bench.options import PEERS
from semvid.launch.bench.workload import NORM_EPS, project

FLEX_BLOCK = 128


def cases(name: str, ours: Cases) -> Iterator[Case]:
    """Yields the cases of peer `name` of PEERS; raises whatever the peer raises."""
    yield from _MAKERS[name](ours)


def version(name: str) -> str:
    """Returns the package and the version that a peer's numbers belong to."""
    package = PEERS[name].packages[0]
    try:
        text = f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        text = f"{package} of unknown version"
    return f"{text}, cuDNN {torch.backends.cudnn.version()}" if name == "sdpa-cudnn" else text


def _sdpa(name: str, backend: SDPBackend) -> Callable[[Cases], Iterator[Case]]:
    def make(ours: Cases) -> Iterator[Case]:
        w = ours.work

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(w.q[None], w.k[None], w.v[None])[0]

        yield _dense(name, call, ours.check_dense, ours)

    return make


def _fa3(ours: Cases) -> Iterator[Case]:
    from fa3_fwd_interface import flash_attn_func

    # It reads [B, N, H, D]; a model has that already, so the transpose is not timed.
    q, k, v = (x.transpose(0, 1).contiguous()[None] for x in (ours.work.q, ours.work.k, ours.work.v))
    yield _dense("fa3", lambda: flash_attn_func(q, k, v), lambda out: ours.check_dense(out[0].transpose(0, 1)), ours)


def _dense(name: str, call: Callable[[], Any], check: Callable[[Any], Check], ours: Cases) -> Case:
    flops = ours.dense_flops
    return Case(
        name=name, call=call, check=check, useful_flops=flops, executed_flops=flops, beside="attention", dense=True
    )


def _flashinfer(backend: str) -> Callable[[Cases], Iterator[Case]]:
    """FlashInfer's variable-block attention, which SVG2 runs in production: rows sorted, a plan on the host."""

    def make(ours: Cases) -> Iterator[Case]:
        from flashinfer import VariableBlockSparseAttentionWrapper

        w = ours.work
        (H, _, D), q_order = w.q.shape, w.queries.permutation.order
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=w.q.device)
        wrapper = VariableBlockSparseAttentionWrapper(workspace, backend=backend)
        q, sizes = reference.gather_rows(w.q, q_order), (w.queries.sizes, w.keys.sizes)

        def plan() -> None:
            wrapper.plan(w.block_map.selected, *sizes, H, H, D, q_data_type=torch.bfloat16)

        def run() -> Tensor:
            out: Tensor = wrapper.run(q, ours.keys, ours.values)
            return out

        def check(out: Tensor) -> Check:
            return checks.check_rows(reference.scatter_rows(out, q_order), None, ours.truth)

        plan()
        yield Case(name=f"flashinfer-{backend} run", call=run, check=check, useful_flops=ours.flops, beside="attention")
        yield Case(name=f"flashinfer-{backend} plan", call=plan, check=lambda _: check(run()), beside="plan")

    return make


def _flash_kmeans(ours: Cases) -> Iterator[Case]:
    """flash-kmeans: its own iteration, without ‖x‖² (once a call) and without the host's look at the shift."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton
    from flash_kmeans.kmeans_triton_impl import _euclid_iter

    for side in ("k", "q"):
        x, starts, _ = ours.side(side)
        norms, centroids = x.square().sum(-1), starts.to(x.dtype)
        flops = 2 * x.numel() * starts.shape[1]

        def assign(x: Tensor = x, centroids: Tensor = centroids, norms: Tensor = norms) -> Tensor:
            labels: Tensor = euclid_assign_triton(x, centroids, norms)
            return labels

        def iterate(x: Tensor = x, centroids: Tensor = centroids, norms: Tensor = norms) -> Tensor:
            labels: Tensor = _euclid_iter(x, norms, centroids)[2]
            return labels

        def check(labels: Tensor, x: Tensor = x, starts: Tensor = starts) -> Check:
            return checks.check_labels(x, starts, labels)

        for what, call in (("assign", assign), ("iteration", iterate)):
            name = f"{what} {side}"
            yield Case(name=f"flash-kmeans {name}", call=call, check=check, useful_flops=flops, beside=name)


def _torch_permute(ours: Cases) -> Iterator[Case]:
    """PyTorch's sort of the labels and gather of rows, as SVG2's first code did."""
    w = ours.work
    true, labels = w.keys.permutation.order, w.keys.labels.long()
    index = true.long()[..., None].expand(w.k.shape)
    yield Case(
        name="torch.sort k",
        call=lambda: torch.sort(labels, dim=-1, stable=True).indices,
        check=lambda order: checks.check_equal(order, true.long()),
        beside="group k",
    )
    yield Case(
        name="torch.gather k",
        call=lambda: torch.gather(w.k, 1, index),
        check=lambda out: checks.check_moved(w.k, true, out),
        moved_bytes=2 * w.k.numel() * w.k.element_size(),
        beside="gather k",
    )


def _torch_rotary(ours: Cases) -> Iterator[Case]:
    """The lines of diffusers 0.42.1's WanAttnProcessor, then the heads moved to where our attention reads them."""
    given, heads = project(ours.work), ours.work.shape.heads
    # As a model keeps them: [1, N, 1, D].
    cosines, sines = given.cosines[None, :, None], given.sines[None, :, None]

    def turn(x: Tensor) -> Tensor:
        hidden = rms_norm(x, (x.shape[-1],), given.weight, NORM_EPS).unflatten(2, (heads, -1))
        x1, x2 = hidden.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cosines[..., 0::2], sines[..., 1::2]
        out = torch.empty_like(hidden)
        out[..., 0::2] = x1 * cos - x2 * sin
        out[..., 1::2] = x1 * sin + x2 * cos
        return out.type_as(hidden).transpose(1, 2).flatten(0, 1).contiguous()

    yield turned("eager norm_rotary", turn, given, beside="norm_rotary")


def _flex(ours: Cases) -> Iterator[Case]:
    """FlexAttention over sorted rows: tiles of 128 × 128 that the map touches, those that it fills without a mask."""
    from torch.nn.attention.flex_attention import flex_attention

    w = ours.work
    mask = flex_mask(ours)
    q = reference.gather_rows(w.q, w.queries.permutation.order)
    # In eager mode it makes the whole matrix of scores: on a GPU it is compiled; for each shape of a run alone, or the
    # second would be compiled for any size, which is slower.
    attend = torch.compile(flex_attention, dynamic=False) if w.q.is_cuda else flex_attention

    def call() -> Tensor:
        out: Tensor = attend(q[None], ours.keys[None], ours.values[None], block_mask=mask)[0]
        return out

    def check(out: Tensor) -> Check:
        return checks.check_rows(reference.scatter_rows(out, w.queries.permutation.order), None, ours.truth)

    yield Case(name="flex", call=call, check=check, useful_flops=ours.flops, beside="attention")


def flex_mask(ours: Cases) -> Any:
    """Returns FlexAttention's BlockMask of the workload's map, over sorted rows."""
    from torch.nn.attention.flex_attention import BlockMask

    w = ours.work
    N, selected = w.shape.tokens, w.block_map.selected
    q_cluster = w.queries.labels.gather(1, w.queries.permutation.order.long())
    k_cluster = w.keys.labels.gather(1, w.keys.permutation.order.long())
    # A tile is touched if it meets a selected pair of clusters, and full if it meets no other.
    q_in_tile, k_in_tile = (
        _clusters_of_tiles(q_cluster, selected.shape[1]),
        _clusters_of_tiles(k_cluster, selected.shape[2]),
    )
    touched = q_in_tile @ selected.float() @ k_in_tile.mT > 0
    full = touched & ~(q_in_tile @ (~selected).float() @ k_in_tile.mT > 0)
    (counts, tiles), (full_counts, full_tiles) = _listed(touched & ~full), _listed(full)

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return selected[h, q_cluster[h, i], k_cluster[h, j]]

    return BlockMask.from_kv_blocks(
        counts, tiles, full_counts, full_tiles, BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask, seq_lengths=(N, N)
    )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how many key tiles each query tile has, int32 [1, H, n], and their numbers first, int32 [1, H, n, m]."""
    numbers = tiles.int().argsort(stable=True, dim=-1, descending=True)
    return tiles.sum(-1, dtype=torch.int32)[None], numbers.int()[None]


def _clusters_of_tiles(cluster: Tensor, C: int) -> Tensor:
    """Returns 1.0 where a tile of FLEX_BLOCK sorted rows has a row of a cluster, fp32 [H, tiles, C]."""
    H, N = cluster.shape
    tile = (torch.arange(N, device=cluster.device) // FLEX_BLOCK).expand(H, N)
    tiles = -(-N // FLEX_BLOCK)
    found = torch.zeros(H, tiles * C, device=cluster.device)
    return found.scatter_(1, tile * C + cluster.long(), 1.0).view(H, tiles, C)


_MAKERS: dict[str, Callable[[Cases], Iterator[Case]]] = {
    "sdpa-cudnn": _sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
    "sdpa-flash": _sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION),
    "fa3": _fa3,
    "flashinfer-fa2": _flashinfer("fa2"),
    "flashinfer-fa3": _flashinfer("fa3"),
    "flash-kmeans": _flash_kmeans,
    "torch-permute": _torch_permute,
    "torch-rotary": _torch_rotary,
    "torch-block": lambda ours: block_cases.eager(ours.work),
    "flex": _flex,
}
