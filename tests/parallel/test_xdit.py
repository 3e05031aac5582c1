"""What semvid does with xfuser: against a stand-in for it anywhere, against the real one on two GPUs."""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from semvid.kernels import reference
from semvid.kernels.dispatch import select
from semvid.parallel import xdit
from semvid.parallel.mesh import Mesh
from semvid.parallel.ranks import Ranks, connect
from semvid.parallel.shard import Shard
from semvid.runtime import load_pipeline, sparsify
from semvid.runtime.attention.call import dense_attention
from semvid.runtime.attention.processors import fold_turned, project
from semvid.runtime.attention.session import Session
from semvid.runtime.config import AttentionConfig, ModelConfig
from semvid.runtime.xdit import Registered, register

# 120 tokens; the odd size has 175.
EVEN = {"height": 64, "width": 96, "num_frames": 17}
ODD = {"height": 80, "width": 112, "num_frames": 17}
ALL_MASS = AttentionConfig(p=1.0, dense_steps=0.25, query_clusters=5, key_clusters=7, first_iterations=3)

needs_xfuser = pytest.mark.skipif(
    importlib.util.find_spec("xfuser") is None, reason=f"xfuser is not installed ({xdit.INSTALL})"
)


class FakeState(ModuleType):
    """Stands in for xfuser.core.distributed.parallel_state as one rank sees it; a group is the list of its ranks."""

    def __init__(self) -> None:
        super().__init__("xfuser.core.distributed.parallel_state")
        self.initialized = False
        self.lowered: dict[str, int] = {}

    def set_up(
        self, rank: int = 0, cfg: int = 1, ring: int = 1, ulysses: int = 1, data: int = 1, tensor: int = 1, pp: int = 1
    ) -> None:
        """xfuser's order, innermost first: ulysses, ring, cfg, data; tensor and pipeline are told, not shared out."""
        sequence = ring * ulysses
        first, row = rank - rank % sequence, rank - rank % ulysses
        self.rank, self.degrees = rank, {"data": data, "tensor": tensor, "pp": pp, "sequence": sequence}
        self.world = SimpleNamespace(world_size=data * cfg * sequence, rank_in_group=rank)
        cfg_first = rank - rank % (cfg * sequence) + rank % sequence
        self.cfg = SimpleNamespace(ranks=[cfg_first + i * sequence for i in range(cfg)], world_size=cfg)
        self.cfg.device_group = self.cfg.ranks
        self.sp = SimpleNamespace(
            ranks=[first + i for i in range(sequence)],
            world_size=sequence,
            ulysses_world_size=ulysses,
            ring_world_size=ring,
            ulysses_group=[row + i for i in range(ulysses)],
            ring_group=[first + rank % ulysses + i * ulysses for i in range(ring)],
        )
        self.sp.device_group = self.sp.ranks
        self.initialized = True

    def model_parallel_is_initialized(self) -> bool:
        return self.initialized

    def get_world_group(self) -> Any:
        return self.world

    def get_sp_group(self) -> Any:
        return self.sp

    def get_cfg_group(self) -> Any:
        return self.cfg

    def get_sequence_parallel_world_size(self) -> int:
        return self.sp.world_size

    def get_ulysses_parallel_world_size(self) -> int:
        return self.sp.ulysses_world_size

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.degrees["tensor"]

    def get_pipeline_parallel_world_size(self) -> int:
        return self.degrees["pp"]

    def get_data_parallel_world_size(self) -> int:
        return self.degrees["data"]

    def init_distributed_environment(self, world_size: int, rank: int, local_rank: int) -> None:
        self.world_size, self.given_rank = world_size, rank

    def initialize_model_parallel(
        self, classifier_free_guidance_degree: int, ulysses_degree: int, ring_degree: int
    ) -> None:
        degrees = {"cfg": classifier_free_guidance_degree, "ulysses": ulysses_degree, "ring": ring_degree}
        self.set_up(self.given_rank, **degrees)
        for name, degree in self.lowered.items():
            setattr(self.sp, name, degree)

    def destroy_model_parallel(self) -> None:
        self.initialized = False


class Fake:
    """Stands in for xfuser on one rank: groups, a registry of attention functions, USP without its all-to-all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = FakeState()
        self.functions: dict[Any, Any] = {"DENSE": self._dense}
        self.dense_calls: list[Any] = []
        self.runtime: Any = None
        distributed = {
            "get_runtime_state": lambda: self.runtime,
            "runtime_state_is_initialized": lambda: self.runtime is not None,
            "initialize_runtime_state": self._initialize_runtime,
        }
        backend = {"ATTENTION_FUNCTION_REGISTRY": self.functions, "register_attention_function": self._registering}
        modules = {
            "xfuser": {"xFuserArgs": lambda **given: SimpleNamespace(create_config=lambda: (given, None))},
            "xfuser.core": {},
            "xfuser.core.distributed": distributed,
            "xfuser.core.distributed.attention_backend": backend,
            "xfuser.model_executor": {},
            "xfuser.model_executor.layers": {},
            "xfuser.model_executor.layers.usp": {"USP": self.usp},
            "yunchang": {},
        }
        for name, content in modules.items():
            module = ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, self.state.__name__, self.state)
        vars(sys.modules["xfuser.core.distributed"])["parallel_state"] = self.state
        monkeypatch.setattr(xdit.dist, "get_process_group_ranks", lambda group: group)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def set_up(self, **degrees: int) -> None:
        self.state.set_up(**degrees)
        self._initialize_runtime(None, None)

    def usp(self, query: Tensor, key: Tensor, value: Tensor, backend: Any = None, attention_kwargs: Any = None) -> Any:
        function = self.functions[backend or self.runtime.attention_backend]
        return function(query, key, value, dropout_p=0.0, is_causal=False, attention_kwargs=attention_kwargs)[0]

    def _dense(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, attention_kwargs: Any
    ) -> tuple[Tensor, None]:
        self.dense_calls.append(attention_kwargs)
        return scaled_dot_product_attention(query, key, value), None

    def _registering(self, key: Any) -> Callable[[Any], Any]:
        return lambda function: self.functions.setdefault(key, function)

    def _initialize_runtime(self, pipeline: Any, engine_config: Any) -> None:
        config = SimpleNamespace(use_torch_compile=False)
        self.runtime = SimpleNamespace(
            attention_backend="DENSE", attention_schedule=None, runtime_config=config, engine_config=engine_config
        )


class FakeProcessor:
    """Stands in for xFuserWanAttnProcessor: self-attention by USP."""

    def __init__(self, fake: Fake) -> None:
        self.fake = fake
        self.attention_kwargs: dict[str, Any] | None = {"thw": None}

    def __call__(self, attn: Any, hidden: Tensor, _1: None, _2: None, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = project(attn, hidden)
        q, k = (
            fold_turned(norm, x, rotary, reference.norm_rotary).unflatten(0, (hidden.shape[0], -1))
            for norm, x in ((attn.norm_q, q), (attn.norm_k, k))
        )
        v = v.unflatten(2, (attn.heads, -1)).transpose(1, 2)
        out: Tensor = self.fake.usp(q, k, v, attention_kwargs=self.attention_kwargs).transpose(1, 2).flatten(2)
        for module in attn.to_out:
            out = module(out)
        return out


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


@pytest.fixture
def pipeline(tiny_model: Path) -> Any:
    return load_pipeline(tiny_model, ModelConfig(device="cpu", dtype="fp32"))


def as_xdit(pipeline: Any, fake: Fake) -> None:
    for block in pipeline.transformer.blocks:
        block.attn1.set_processor(FakeProcessor(fake))


def registered(pipeline: Any, **settings: Any) -> Registered:
    return register(pipeline.transformer, pipeline.scheduler, **settings)


def latents(pipeline: Any, size: dict[str, int] = EVEN) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    found: Tensor = pipeline(
        "a red ball", **size, num_inference_steps=4, guidance_scale=3.0, generator=generator, output_type="latent"
    ).frames
    return found


def test_what_is_missing_is_said_with_what_brings_it(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    assert xdit.missing() is None
    monkeypatch.setitem(sys.modules, "xfuser.model_executor.layers.usp", None)
    assert "its import fails: import of xfuser.model_executor.layers.usp halted" in str(xdit.missing())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "it needs a GPU, and PyTorch finds none" in str(xdit.missing())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built for the CPU alone" in str(xdit.missing())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert xdit.missing() == "xfuser is not installed (pip install 'semvid[xdit]')"
    for call in (xdit.ranks_of_xfuser, xdit.register_attention, lambda: xdit.initialize(Ranks())):
        with pytest.raises(ValueError, match="xfuser can't be used here: xfuser is not installed"):
            call()


def test_groups_are_taken_as_they_are(fake: Fake) -> None:
    fake.set_up(rank=5, cfg=2, ring=2, ulysses=2)
    assert xdit.ranks_of_xfuser() == Ranks(Mesh(cfg=2, ring=2, ulysses=2), 5, [4, 5, 6, 7], [1, 5])
    fake.set_up(rank=0)
    assert xdit.ranks_of_xfuser() == Ranks()


def test_every_rank_finds_its_place_also_in_a_replica(fake: Fake) -> None:
    mesh = Mesh(cfg=2, ring=3, ulysses=2)
    for rank in range(24):
        fake.set_up(rank=rank, cfg=2, ring=3, ulysses=2, data=2)
        ranks = xdit.ranks_of_xfuser()
        assert (ranks.mesh, ranks.rank) == (mesh, rank % 12)
        assert ranks.place == mesh.place(rank % 12)


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tensor": 2}, "xfuser's tensor parallel degree is 2; accepted: 1"),
        ({"pp": 4}, "xfuser's pipeline parallel degree is 4; accepted: 1"),
        ({"cfg": 3}, "xfuser's classifier-free-guidance parallel degree is 3; accepted: 2"),
    ],
)
def test_degrees_that_cant_be_honoured_are_refused(fake: Fake, degrees: dict[str, int], message: str) -> None:
    fake.set_up(**degrees)
    with pytest.raises(ValueError, match=message):
        xdit.ranks_of_xfuser()


def test_branches_on_different_ranks_share_no_clusters(fake: Fake, pipeline: Any) -> None:
    fake.set_up(cfg=2)
    as_xdit(pipeline, fake)
    with pytest.raises(ValueError, match="attention.share_branches is 'yes'; accepted: no where xfuser"):
        registered(pipeline, preset="balanced")


def test_groups_that_are_not_there_are_refused(fake: Fake) -> None:
    with pytest.raises(ValueError, match="not initialised; accepted: after its initialize_model_parallel"):
        xdit.ranks_of_xfuser()
    fake.set_up(ulysses=4)
    # What xfuser makes of it where yunchang's import fails.
    fake.state.sp.ulysses_world_size = 1
    with pytest.raises(ValueError, match="sequence group has 4 ranks, but ring x ulysses is 1 x 1"):
        xdit.ranks_of_xfuser()
    fake.set_up(ulysses=2)
    fake.state.world.world_size = 3
    with pytest.raises(ValueError, match="1 x 1 x 1 x 2, but there are 3 ranks"):
        xdit.ranks_of_xfuser()


@pytest.mark.parametrize("group", ["ulysses_group", "ring_group", "ranks"])
def test_ranks_in_another_order_are_refused(fake: Fake, group: str) -> None:
    fake.set_up(rank=1, ring=2, ulysses=2)
    other = {"ulysses_group": [1, 3], "ring_group": [0, 1], "ranks": [0, 2, 1, 3]}[group]
    setattr(fake.state.sp, group, other)
    with pytest.raises(ValueError, match="group of rank 1 is .*; accepted: .* ulysses innermost, then ring, then cfg"):
        xdit.ranks_of_xfuser()


def test_initialize_gives_the_degrees_that_were_asked_for(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(Mesh(ring=2, ulysses=3), rank=4)
    with pytest.raises(ValueError, match="no default process group; accepted: after semvid.parallel.ranks.join"):
        xdit.initialize(ranks)
    for name, value in (("is_initialized", True), ("get_world_size", 6), ("get_rank", 4)):
        monkeypatch.setattr(xdit.dist, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    xdit.initialize(ranks)
    degrees = {"ulysses_degree": 3, "ring_degree": 2, "use_cfg_parallel": False, "data_parallel_degree": 1}
    assert fake.runtime.engine_config == degrees
    before = fake.runtime
    xdit.initialize(ranks)
    assert fake.runtime is before
    with pytest.raises(ValueError, match="xfuser has cfg=1,ring=2,ulysses=3 and rank 4; accepted: cfg=1,ring=1"):
        xdit.initialize(Ranks(Mesh(ulysses=6), rank=4))
    xdit.release()
    xdit.initialize(Ranks(Mesh(ulysses=6), rank=4))
    assert fake.runtime.engine_config["ulysses_degree"] == 6


def test_initialize_refuses_a_degree_that_xfuser_lowered(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 0)):
        monkeypatch.setattr(xdit.dist, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    fake.state.lowered = {"ulysses_world_size": 1}
    with pytest.raises(ValueError, match="sequence group has 2 ranks, but ring x ulysses is 1 x 1"):
        xdit.initialize(Ranks(Mesh(ulysses=2)))


def test_usp_refuses_what_does_not_divide(fake: Fake) -> None:
    q, k, v = torch.randn(3, 4, 10, 16).unbind()
    fake.set_up()
    torch.testing.assert_close(xdit.usp_dense(q, k, v, 10), scaled_dot_product_attention(q, k, v))
    fake.set_up(ulysses=3)
    with pytest.raises(ValueError, match="4 heads don't divide among 3 ulysses ranks"):
        xdit.usp_dense(q, k, v, 30)
    fake.set_up(ring=2)
    with pytest.raises(ValueError, match="19 tokens, 10 of them here, on 2 ranks; accepted by USP: equal shards"):
        xdit.usp_dense(q, k, v, 19)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.set_up(ring=2), "ring degree is 2, .* accepted: 1"),
        (lambda f: setattr(f.runtime.runtime_config, "use_torch_compile", True), "use_torch_compile is True"),
        (lambda f: setattr(f.runtime, "attention_schedule", object()), "schedule of attention backends"),
        (lambda f: setattr(f, "runtime", None), "runtime is not initialised"),
        (lambda f: xdit.register_attention(), "registered with xfuser already"),
    ],
)
def test_registering_refuses_set_ups_that_would_not_be_ours(
    fake: Fake, change: Callable[[Fake], Any], message: str
) -> None:
    fake.set_up()
    change(fake)
    with pytest.raises(ValueError, match=message):
        xdit.register_attention()


def test_calls_that_name_no_layer_stay_with_the_backend_before(fake: Fake) -> None:
    fake.set_up()
    q, k = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 5, 16)
    undo = xdit.register_attention()
    torch.testing.assert_close(fake.usp(q, k, k, attention_kwargs={"thw": 1}), scaled_dot_product_attention(q, k, k))
    assert fake.dense_calls == [{"thw": 1}]
    own = {xdit.KEY: lambda q, k, v, dense: dense(q, k, v) + 1}
    torch.testing.assert_close(fake.usp(q, q, q, attention_kwargs=own), scaled_dot_product_attention(q, q, q) + 1)
    with pytest.raises(ValueError, match=r"shapes \[\(1, 2, 8, 16\), \(1, 2, 5, 16\), .*accepted: one shape"):
        fake.usp(q, k, k, attention_kwargs=own)
    with pytest.raises(ValueError, match="causal True"):
        fake.functions[xdit.KEY](q, q, q, is_causal=True, attention_kwargs=own)
    undo()
    assert fake.runtime.attention_backend == "DENSE"
    assert set(fake.functions) == {"DENSE"}


def test_registered_attention_with_all_mass_gives_the_stock_models_latents(fake: Fake, pipeline: Any) -> None:
    stock = latents(pipeline)
    fake.set_up()
    as_xdit(pipeline, fake)
    handle = registered(pipeline, attention=ALL_MASS)
    torch.testing.assert_close(latents(pipeline), stock, rtol=1e-4, atol=1e-4)
    # 4 steps, 2 branches, 3 layers; the first step and the first layer are dense, by the backend before.
    density = handle.density()
    assert (density.sparse_calls, density.dense_calls, density.sparse) == (3 * 2 * 2, 2 * 3 + 3 * 2, 1.0)
    assert len(fake.dense_calls) == density.dense_calls
    handle.remove()
    handle.remove()
    fake.dense_calls.clear()
    torch.testing.assert_close(latents(pipeline), stock, rtol=1e-4, atol=1e-4)
    assert fake.dense_calls == [{"thw": None}] * 24


def test_registered_attention_finds_what_sparsify_finds(fake: Fake, pipeline: Any) -> None:
    config = AttentionConfig(p=0.6, floor=0.1, dense_steps=0.25, query_clusters=5, key_clusters=9, first_iterations=5)
    own = sparsify(pipeline, attention=config, seed=3)
    expected, density = latents(pipeline), own.density()
    own.remove()
    fake.set_up()
    as_xdit(pipeline, fake)
    handle = registered(pipeline, attention=config, seed=3)
    torch.testing.assert_close(latents(pipeline), expected, rtol=1e-4, atol=1e-4)
    assert handle.density().sparse == pytest.approx(density.sparse)
    assert density.sparse < 0.9


def test_tokens_that_xdit_would_pad_are_refused(fake: Fake, pipeline: Any) -> None:
    fake.set_up(rank=1, ulysses=2)
    as_xdit(pipeline, fake)
    handle = registered(pipeline)
    assert handle.session.first_head == 1
    with pytest.raises(ValueError, match="175 tokens, which xDiT can't share equally among 2 ranks"):
        latents(pipeline, ODD)
    with pytest.raises(ValueError, match="this transformer has semvid's attention already"):
        registered(pipeline)


def test_other_transformers_and_heads_are_refused(fake: Fake, pipeline: Any) -> None:
    fake.set_up(ulysses=3)
    with pytest.raises(ValueError, match="is a WanTransformer3DModel; supported: xFuserWanTransformer3DWrapper"):
        registered(pipeline)
    as_xdit(pipeline, fake)
    with pytest.raises(ValueError, match="2 heads don't divide among xfuser's 3 ulysses ranks"):
        registered(pipeline)
    assert fake.runtime.attention_backend == "DENSE"


def _shards(ranks: Ranks, heads: int, tokens: int) -> tuple[list[Tensor], list[Tensor], Shard]:
    """Returns a whole q, k and v, the same on every rank, this rank's parts, and its shard."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(heads, tokens, 128, generator=generator).to("cuda", torch.bfloat16) for _ in range(3)]
    shard = Shard(ranks.shard, ranks.mesh.sequence, tokens)
    return whole, [shard.split(x, 1).contiguous() for x in whole], shard


def _usp_equals_ours(rank: int, world: int) -> None:
    for mesh in (Mesh(ulysses=world), Mesh(ring=world)):
        ranks = connect(mesh)
        xdit.initialize(ranks)
        taken = xdit.ranks_of_xfuser()
        assert (taken.mesh, taken.rank) == (mesh, rank)
        _, mine, shard = _shards(taken, 2 * world, 256 * world)
        # Over the groups that xfuser made, not over ours.
        session = Session(AttentionConfig(), select("auto", mine[0].device), 0, taken, shard=shard)
        expected = dense_attention(*mine, session)
        found = xdit.usp_dense(*mine, shard.total)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        xdit.release()


@needs_xfuser
@pytest.mark.multigpu
def test_usp_over_xfusers_groups_equals_our_dense_attention(spawn: Callable[..., None]) -> None:
    spawn(2, _usp_equals_ours, nccl=True)


@torch.no_grad()
def _registered_equals_xdit(rank: int, world: int) -> None:
    xdit.initialize(connect(Mesh(ulysses=world)))
    from diffusers import UniPCMultistepScheduler
    from xfuser.model_executor.models.transformers.transformer_wan import xFuserWanTransformer3DWrapper

    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 64, "text_dim": 32}
    model = xFuserWanTransformer3DWrapper(**sizes).eval().to("cuda", torch.bfloat16)
    scheduler = UniPCMultistepScheduler()
    scheduler.set_timesteps(4)
    latent = torch.randn(1, 16, 4, 16, 32).to("cuda", torch.bfloat16)
    text = torch.randn(1, 16, 32).to("cuda", torch.bfloat16)

    def run(x: Tensor = latent) -> Tensor:
        with model.cache_context("cond"):
            out: Tensor = model(x, torch.tensor([500], device="cuda"), text, return_dict=False)[0]
        return out

    dense = run()
    config = AttentionConfig(p=1.0, dense_steps=0.0, dense_layers=1, query_clusters=7, key_clusters=11)
    handle = register(model, scheduler, attention=config)
    torch.testing.assert_close(run(), dense, rtol=3e-2, atol=3e-2)
    density = handle.density()
    assert (density.sparse_calls, density.dense_calls, density.sparse) == (1, 1, 1.0)
    with pytest.raises(ValueError, match="195 tokens, which xDiT can't share equally"):
        run(latent.new_zeros(1, 16, 3, 10, 26))
    handle.remove()
    assert torch.equal(run(), dense)


@needs_xfuser
@pytest.mark.multigpu
def test_registered_attention_under_ulysses_equals_xdits_dense(spawn: Callable[..., None]) -> None:
    spawn(2, _registered_equals_xdit, nccl=True)
