"""xfuser (the library of xDiT): its groups taken as they are, ours as one of its attentions, its USP as a yardstick.

The one file that knows xfuser. Nothing of it is imported until a function is called, so that everything else works
where xfuser can't. xfuser lowers a degree without a word where a part of it is missing; here every degree is read back
and one that is not what it should be is refused. Written against xfuser 0.7.0.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from semvid.parallel.mesh import AXES, Mesh
from semvid.parallel.ranks import Ranks

KEY = "semvid"
"""Our name among xfuser's attention backends, and that of a layer's attention among its attention_kwargs."""
INSTALL = "pip install 'semvid[xdit]'"

WholeAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
LayerAttention = Callable[[Tensor, Tensor, Tensor, WholeAttention], Tensor]
"""(q, k, v, dense) -> out, [B, heads, N, D] each: this rank's heads, all tokens; `dense` is the backend before ours."""


def missing() -> str | None:
    """Returns why xfuser can't be used here, and what would bring it; None if it can."""
    for package in ("xfuser", "yunchang"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed ({INSTALL})"
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"PyTorch {torch.__version__} is built for the CPU alone, and xfuser needs a GPU build (pip install torch)"
        )
    if not torch.cuda.is_available():
        return "it needs a GPU, and PyTorch finds none"
    try:
        # Its import prints, and its logger keeps the stream that it finds: results go to stdout.
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module("xfuser.model_executor.layers.usp")
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return f"its import fails: {' '.join(str(error).split())}"
    return None


def ranks_of_xfuser() -> Ranks:
    """Returns this process's place and groups as xfuser's user has initialised them; no collective.

    Data-parallel replicas are jobs of their own: `Ranks.rank` counts inside one.

    Raises:
        ValueError: xfuser can't be used here or is not initialised, a degree that semvid can't honour, groups of
            another size than the degrees asked for, or ranks in another order than Mesh's.
    """
    state = _state()
    if not state.model_parallel_is_initialized():
        raise ValueError("xfuser's groups are not initialised; accepted: after its initialize_model_parallel")
    world, sp, cfg = state.get_world_group(), state.get_sp_group(), state.get_cfg_group()
    mesh = Mesh(cfg=cfg.world_size, ring=sp.ring_world_size, ulysses=sp.ulysses_world_size)
    _check_degrees(state, mesh)
    place = world.rank_in_group % mesh.world_size
    groups = {"sequence": (sp.ranks, ("ring", "ulysses")), "cfg": (cfg.ranks, ("cfg",))}
    if mesh.sequence > 1:
        groups["ulysses"] = dist.get_process_group_ranks(sp.ulysses_group), ("ulysses",)
        groups["ring"] = dist.get_process_group_ranks(sp.ring_group), ("ring",)
    for name, (found, axes) in groups.items():
        expected = _peers(mesh, world.rank_in_group, axes)
        if list(found) != expected:
            raise ValueError(
                f"xfuser's {name} group of rank {world.rank_in_group} is {list(found)}; accepted: {expected}, "
                f"as in {mesh} with ulysses innermost, then ring, then cfg"
            )
    return Ranks(
        mesh,
        place,
        sp.device_group if mesh.sequence > 1 else None,
        cfg.device_group if mesh.cfg > 1 else None,
    )


def initialize(ranks: Ranks) -> None:
    """Gives xfuser groups of the degrees of `ranks`, unless it has them, and its choice of the best dense backend.

    Every rank of the default process group must enter; the group must exist.

    Raises:
        ValueError: xfuser can't be used here, has other degrees already, or got others than it was asked for.
    """
    state, mesh = _state(), ranks.mesh
    if not dist.is_initialized():
        raise ValueError("there is no default process group; accepted: after semvid.parallel.ranks.join")
    fresh = not state.model_parallel_is_initialized()
    if fresh:
        state.init_distributed_environment(
            world_size=dist.get_world_size(), rank=dist.get_rank(), local_rank=torch.cuda.current_device()
        )
        state.initialize_model_parallel(
            classifier_free_guidance_degree=mesh.cfg, ulysses_degree=mesh.ulysses, ring_degree=mesh.ring
        )
    found = ranks_of_xfuser()
    if (found.mesh, found.rank) != (mesh, ranks.rank):
        raise ValueError(f"xfuser has {found.mesh} and rank {found.rank}; accepted: {mesh} and rank {ranks.rank}")
    from xfuser import xFuserArgs
    from xfuser.core.distributed import initialize_runtime_state, runtime_state_is_initialized

    if fresh or not runtime_state_is_initialized():
        arguments = xFuserArgs(
            ulysses_degree=mesh.ulysses,
            ring_degree=mesh.ring,
            use_cfg_parallel=mesh.cfg == 2,
            data_parallel_degree=state.get_data_parallel_world_size(),
        )
        # It asks a pipeline for nothing but its number of heads, which each call of `usp_dense` checks for itself.
        heads = SimpleNamespace(num_attention_heads=mesh.ulysses)
        pipeline = SimpleNamespace(transformer=SimpleNamespace(config=heads))
        initialize_runtime_state(pipeline=pipeline, engine_config=arguments.create_config()[0])


def usp_dense(q: Tensor, k: Tensor, v: Tensor, total: int) -> Tensor:
    """Returns softmax(q·kᵀ/√D)·v over the whole sequence by xfuser's USP and its best backend, [H, n, D].

    `initialize` comes first. Every rank that shares the sequence must call.

    Args:
        q: post-norm, post-rotary queries of this rank's tokens, [H, n, D]; k and v likewise.
        k: keys.
        v: values.
        total: tokens of the whole sequence.

    Raises:
        ValueError: the heads don't divide among the ulysses ranks, or the tokens among all.
    """
    from xfuser.core.distributed import parallel_state as state
    from xfuser.model_executor.layers.usp import USP

    (H, n, _), ulysses, ranks = (
        q.shape,
        state.get_ulysses_parallel_world_size(),
        state.get_sequence_parallel_world_size(),
    )
    if H % ulysses:
        raise ValueError(f"{H} heads don't divide among {ulysses} ulysses ranks; accepted by USP: a multiple")
    # The first of them is the same on every rank, so that all refuse alike.
    if total % ranks or n * ranks != total:
        raise ValueError(f"{total} tokens, {n} of them here, on {ranks} ranks; accepted by USP: equal shards")
    out: Tensor = USP(q[None], k[None], v[None])[0]
    return out


def dense_backend() -> str:
    """Returns the name of the backend that `usp_dense` takes."""
    from xfuser.core.distributed import get_runtime_state

    name: str = get_runtime_state().attention_backend.name
    return name


def release() -> None:
    """Takes xfuser's groups away, so that `initialize` can make others. Every rank must enter."""
    state = _state()
    if state.model_parallel_is_initialized():
        state.destroy_model_parallel()


def register_attention() -> Callable[[], None]:
    """Makes ours xfuser's attention backend and returns what puts the one before back.

    A call whose attention_kwargs have a LayerAttention under KEY is computed by that; every other call (of cross
    attention, say) by the backend before. Only ulysses reaches it: under ring a backend never sees all keys.

    Raises:
        ValueError: xfuser can't be used here or is not initialised, as `ranks_of_xfuser`; ours is registered already;
            ring parallelism, compilation or a schedule of backends is on.
    """
    ranks = ranks_of_xfuser()
    from xfuser.core.distributed import attention_backend, get_runtime_state, runtime_state_is_initialized

    if not runtime_state_is_initialized():
        raise ValueError("xfuser's runtime is not initialised; accepted: after its initialize_runtime_state")
    if ranks.mesh.ring > 1:
        raise ValueError(
            f"xfuser's ring degree is {ranks.mesh.ring}, where no attention sees all keys; accepted: 1, with ulysses; "
            "or semvid's own ring, by sparsify(pipeline, ranks=ranks_of_xfuser())"
        )
    runtime = get_runtime_state()
    if runtime.runtime_config.use_torch_compile:
        raise ValueError("xfuser's use_torch_compile is True; accepted: False, as clusters are kept between calls")
    if getattr(runtime, "attention_schedule", None) is not None:
        raise ValueError("xfuser has a schedule of attention backends; accepted: one backend for every step")
    before = runtime.attention_backend
    if before == KEY:
        raise ValueError("semvid's attention is registered with xfuser already; remove() that handle first")
    functions = attention_backend.ATTENTION_FUNCTION_REGISTRY
    attention_backend.register_attention_function(KEY)(_by_layer(functions[before]))
    # Its set_attention_backend takes names of its own alone.
    runtime.attention_backend = KEY

    def undo() -> None:
        if runtime.attention_backend == KEY:
            runtime.attention_backend = before
            del functions[KEY]

    return undo


def _state() -> Any:
    """Returns xfuser's module of groups.

    Raises:
        ValueError: xfuser can't be used here.
    """
    reason = missing()
    if reason is not None:
        raise ValueError(f"xfuser can't be used here: {reason}")
    return importlib.import_module("xfuser.core.distributed.parallel_state")


def _check_degrees(state: Any, mesh: Mesh) -> None:
    """Raises ValueError where xfuser's degrees are not those of a mesh, or not what was asked for."""
    for name, degree, accepted in (
        ("tensor", state.get_tensor_model_parallel_world_size(), 1),
        ("pipeline", state.get_pipeline_parallel_world_size(), 1),
        ("classifier-free-guidance", mesh.cfg, 2),
    ):
        if degree > accepted:
            raise ValueError(f"xfuser's {name} parallel degree is {degree}; accepted: {accepted}")
    sequence, replicas = state.get_sequence_parallel_world_size(), state.get_data_parallel_world_size()
    if mesh.sequence != sequence:
        raise ValueError(
            f"xfuser's sequence group has {sequence} ranks, but ring x ulysses is {mesh.ring} x {mesh.ulysses}; "
            "accepted: a product of as many, which it has where yunchang's import works"
        )
    world = state.get_world_group().world_size
    if mesh.world_size * replicas != world:
        raise ValueError(
            f"xfuser's data x cfg x ring x ulysses is {replicas} x {mesh.cfg} x {mesh.ring} x {mesh.ulysses}, "
            f"but there are {world} ranks; accepted: a product of as many"
        )


def _peers(mesh: Mesh, rank: int, axes: tuple[str, ...]) -> list[int]:
    """Returns the ranks of the world that differ from `rank` along `axes` alone, in one replica of the mesh."""
    first = rank - rank % mesh.world_size
    mine, fixed = mesh.place(rank - first), [axis for axis in AXES if axis not in axes]
    places = enumerate(mesh.place(other) for other in range(mesh.world_size))
    return [first + other for other, place in places if all(getattr(place, a) == getattr(mine, a) for a in fixed)]


def _by_layer(before: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Returns an attention function of xfuser's: a layer's own where the call names one, else the one `before`."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return before(q, k, v, dropout_p=0.0, is_causal=False, attention_kwargs=None)[0]

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        layer: LayerAttention | None = (attention_kwargs or {}).get(KEY)
        if layer is None:
            return before(
                query, key, value, dropout_p=dropout_p, is_causal=is_causal, attention_kwargs=attention_kwargs
            )
        shapes = [tuple(x.shape) for x in (query, key, value)]
        if dropout_p or is_causal or len(set(shapes)) > 1:
            raise ValueError(
                f"semvid's attention was called with shapes {shapes}, dropout {dropout_p}, causal {is_causal}; "
                "accepted: one shape [B, heads, N, D], no dropout, not causal"
            )
        return layer(query, key, value, dense), None

    return attend
