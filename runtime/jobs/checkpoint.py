"""What a checkpoint holds, and how a job goes on from it: on any number of ranks, because centroids are global.

Each rank's part has the labels of its shard, for the branches that it runs, and the centroids, sizes, densities and
maps of every P-th layer. Rank 0's has the latents and the tensors of the scheduler beside. The manifest has the rest of
the scheduler, the counts, and what the job is. There is no random state: after the first noise nothing is drawn, and
the first centroids follow from the seed, the layer, the branch and the step.

Permutations, plans and exchanges follow from labels and maps, so they are made again. How an exchange through windows
was cut hangs on the refresh before, so that is held too: as many ranks go on with the same bits.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from torch import Tensor

from semvid.kernels.layout import BlockMap, Clusters
from semvid.parallel.balance import Piece
from semvid.parallel.budget import columns
from semvid.parallel.direct import Cut, DirectExchange
from semvid.parallel.exchange import Counts
from semvid.parallel.shard import Shard
from semvid.runtime.attention.density import Density
from semvid.runtime.attention.schedule import Refreshed
from semvid.runtime.attention.session import Session
from semvid.runtime.attention.state import Memory, no_order
from semvid.runtime.config import Config
from semvid.runtime.device import resolve_device, resolve_dtype
from semvid.runtime.jobs import checkpoint_files
from semvid.runtime.jobs.denoise import Denoising
from semvid.runtime.models import folder

FORMAT = 1
SHORT = 1 << 16
"""Up to so many clusters a label takes 16 bits."""
# The configuration of a diffusers scheduler: the model's, which never changes.
NOT_STATE = ("_internal_dict",)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole one on the disk."""

    root: Path
    step: int
    """Steps done."""
    body: Json
    """Its manifest."""

    @property
    def name(self) -> str:
        """Its folder's name."""
        return checkpoint_files.name_of(self.step)

    @property
    def density(self) -> Density:
        """Of all steps before it."""
        return Density(**self.body["density"])

    @property
    def step_seconds(self) -> list[float]:
        """Of all steps before it, on rank 0."""
        return list(self.body["step_seconds"])


def newest(root: Path, damaged: Callable[[str, str], None]) -> Checkpoint | None:
    """Returns the newest whole checkpoint of a job, None if there is none.

    Args:
        root: the job's folder of checkpoints.
        damaged: told the name of each newer one that is not what was written, and how.
    """
    for step in checkpoint_files.steps(root):
        try:
            return Checkpoint(root, step, checkpoint_files.verified(root, step))
        except checkpoint_files.DamagedError as error:
            damaged(checkpoint_files.name_of(step), str(error))
    return None


def describe(config: Config) -> Json:
    """Returns what a checkpoint must share with the job that goes on from it: model, precision, options.

    Left out is what may change: [job], the device, and where the model's folder is.
    """
    where = folder.locate(config.model.path)
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("job", "model")}
    image = config.video.image
    if image is not None:
        # Another picture of the same name is another video.
        options["video"]["image"] = hashlib.sha256(Path(image).read_bytes()).hexdigest()
    kept = {
        "transformer": where / "transformer" / "config.json",
        "scheduler": where / "scheduler" / "scheduler_config.json",
    }
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in kept.items()}
    dtype = str(resolve_dtype(config.model.dtype, resolve_device(config.model.device))).removeprefix("torch.")
    flat = json.loads(json.dumps(dict(_flat(options, ""))))
    return {
        "model": {"folder": where.resolve().name, **hashes},
        "dtype": dtype,
        "options": flat,
        "options_sha256": hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest(),
    }


def check_fits(found: Checkpoint, mine: Json) -> None:
    """Raises ValueError unless a checkpoint is of this job; the message names what differs.

    Args:
        found: the checkpoint.
        mine: the job, by `describe`.
    """
    where, accepted = str(found.root / found.name), "accepted: the job.toml and the model that it was made with"
    if found.body["format"] != FORMAT:
        raise ValueError(f"{where} has format {found.body['format']}; accepted: {FORMAT}")
    theirs = found.body["job"]
    for key, what in (("folder", "the model"), ("transformer", "a transformer"), ("scheduler", "a scheduler")):
        if theirs["model"][key] != mine["model"][key]:
            raise ValueError(f"{where} is of {what} {theirs['model'][key]!r}, not {mine['model'][key]!r}; {accepted}")
    if theirs["dtype"] != mine["dtype"]:
        raise ValueError(f"{where} was computed in {theirs['dtype']}, here it would be {mine['dtype']}; {accepted}")
    names = dict.fromkeys([*mine["options"], *theirs["options"]])
    for name in names:
        there, here = (side["options"].get(name) for side in (theirs, mine))
        if there != here:
            raise ValueError(f"{where} was made with {name} {there!r}, not {here!r}; {accepted}")


def capture(session: Session, scheduler: Any, state: Denoising) -> tuple[dict[str, Tensor], Json]:
    """Returns this rank's part of a checkpoint, where it is, and the plain values of the scheduler.

    Raises:
        ValueError: the scheduler holds something other than tensors and plain values.
    """
    ranks, taken = session.ranks, {}
    # Of memories that branches share the conditional one's ranks write.
    memories = {} if session.shared and ranks.place.cfg > 0 else session.cache.memories
    for (layer, branch), memory in memories.items():
        place = f"{branch}/{layer}"
        for side, clusters in (("queries", memory.queries), ("keys", memory.keys)):
            taken[f"{place}/{side}/labels"] = _narrowed(clusters.labels, clusters.centroids.shape[1])
            if layer % ranks.mesh.sequence == ranks.shard:
                taken[f"{place}/{side}/centroids"] = clusters.centroids
                taken[f"{place}/{side}/sizes"] = clusters.sizes
        if layer % ranks.mesh.sequence == ranks.shard:
            taken[f"{place}/map"] = memory.bits
            taken[f"{place}/density"] = memory.density
            taken[f"{place}/refreshed"] = _as_tensor(memory.refreshed())
            if memory.log_n is not None:
                taken[f"{place}/log_n"] = memory.log_n
            if isinstance(memory.exchange, DirectExchange):
                taken[f"{place}/cut"] = _cut_as_tensor(Cut(memory.exchange.parts, memory.counts is not None))
    plain, tensors = scheduler_state(scheduler)
    if ranks.rank == 0:
        taken |= {"latents": state.latents, **{f"scheduler/{name}": x for name, x in tensors.items()}}
    return taken, plain


def manifest(step: int, job: Json, scheduler: Json, density: Density, step_seconds: list[float], mesh: str) -> Json:
    """Returns the manifest of a checkpoint but for its parts.

    Args:
        step: steps done.
        job: by `describe`.
        scheduler: its plain values, by `capture`.
        density: of all steps so far.
        step_seconds: of each.
        mesh: how many ranks wrote it.
    """
    return {
        "format": FORMAT,
        "step": step,
        "job": job,
        "scheduler": scheduler,
        "density": dataclasses.asdict(density),
        "step_seconds": step_seconds,
        "mesh": mesh,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def restore(found: Checkpoint, session: Session, scheduler: Any, state: Denoising) -> None:
    """Puts the state of a checkpoint into a job that `denoise.start` has begun. No collective."""
    device = state.latents.device
    with ExitStack() as stack:
        stored = _Stored(found, stack)
        state.latents, state.step = stored.only("latents").to(device), found.step
        tensors = {name: stored.only(name) for name in stored.names("scheduler/")}
        plain = found.body["scheduler"]
        put_scheduler_state(scheduler, plain, {n.removeprefix("scheduler/"): x for n, x in tensors.items()}, device)
        memories = {}
        for branch in dict.fromkeys(session.owner_of(branch) for branch in state.contexts):
            for name in stored.names(f"{branch}/"):
                if name.endswith("/density"):
                    layer = int(name.split("/")[1])
                    memories[layer, branch] = _memory(stored, f"{branch}/{layer}", session, device)
    session.resume(found.step, len(state.timesteps), memories, found.density)


def scheduler_state(scheduler: Any) -> tuple[Json, dict[str, Tensor]]:
    """Returns the whole state of a diffusers scheduler: JSON values, and the tensors that they name.

    Raises:
        ValueError: it holds something other than tensors, numbers, texts, lists, tuples and dicts; the message says
            where.
    """
    tensors: dict[str, Tensor] = {}
    plain = {
        name: _packed(value, name, tensors, type(scheduler).__name__)
        for name, value in vars(scheduler).items()
        if name not in NOT_STATE
    }
    return plain, tensors


def put_scheduler_state(scheduler: Any, plain: Json, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Gives a scheduler of the same class and configuration the state that `scheduler_state` returned.

    A tensor goes where the scheduler has its own of that name, the others to `device`.

    Raises:
        ValueError: the scheduler has attributes that the state lacks: another release of diffusers made it.
    """
    lacking = set(vars(scheduler)) - set(NOT_STATE) - set(plain)
    if lacking:
        names = ", ".join(sorted(lacking))
        raise ValueError(f"the checkpoint's {type(scheduler).__name__} is of another diffusers: it lacks {names}")
    for name, value in plain.items():
        # Some are first set by a step.
        own = getattr(scheduler, name, None)
        setattr(scheduler, name, _unpacked(value, tensors, own.device if isinstance(own, Tensor) else device))


class _Stored:
    """The tensors of a checkpoint's parts, in the order of ranks, each read when it is asked for."""

    def __init__(self, found: Checkpoint, stack: ExitStack) -> None:
        self.holders: dict[str, list[Any]] = {}
        for part in found.body["parts"]:
            file = stack.enter_context(safe_open(found.root / found.name / part["file"], framework="pt"))
            for name in file.keys():  # noqa: SIM118 - a file of safetensors is no dict
                self.holders.setdefault(name, []).append(file)

    def names(self, prefix: str) -> Iterator[str]:
        return (name for name in self.holders if name.startswith(prefix))

    def only(self, name: str) -> Tensor:
        """Returns the tensor that one rank has written for all."""
        (holder,) = self.holders[name]
        tensor: Tensor = holder.get_tensor(name)
        return tensor

    def joined(self, name: str) -> Tensor:
        """Returns a tensor of the whole sequence from those of its shards."""
        return torch.cat([holder.get_tensor(name) for holder in self.holders[name]], dim=1)


def _memory(stored: _Stored, place: str, session: Session, device: torch.device) -> Memory:
    """Returns what a layer and branch remembered, cut for this rank's shard; the rest is made at its first reuse."""
    mesh, sides, counts = session.ranks.mesh, [], []
    for side in ("queries", "keys"):
        whole = _widened(stored.joined(f"{place}/{side}/labels").to(device))
        centroids, sizes = (stored.only(f"{place}/{side}/{name}").to(device) for name in ("centroids", "sizes"))
        C = centroids.shape[1]
        shards = [Shard(rank, mesh.sequence, whole.shape[1]) for rank in range(mesh.sequence)]
        own = [whole[:, shard.first : shard.first + shard.tokens] for shard in shards]
        labels = own[session.ranks.shard].contiguous()
        sides.append(Clusters(labels, centroids, sizes, no_order(labels)))
        counts.append(torch.stack([_counted(x, C) for x in own]))
    bits, density = (stored.only(f"{place}/{name}").to(device) for name in ("map", "density"))
    queries, keys = sides
    log_n = stored.only(f"{place}/log_n").to(device) if f"{place}/log_n" in stored.holders else None
    last = _as_refreshed(stored.only(f"{place}/refreshed"))
    memory = Memory(queries, keys, density, bits, None, None, log_n, last.step, last.interval, last.drift, ready=False)
    if mesh.sequence == 1:
        return memory
    heads = torch.arange(bits.shape[0], device=device)
    block_map = BlockMap(session.ops.unpack_map(bits, heads, keys.centroids.shape[1]))
    computed = columns(block_map, keys.sizes, tail=log_n is not None)
    cut = None
    if f"{place}/cut" in stored.holders and mesh.ring == 1:
        cut = _as_cut(stored.only(f"{place}/cut"), mesh.sequence)
    return memory._replace(counts=Counts(counts[0], counts[1], computed), cut=cut)


def _cut_as_tensor(cut: Cut) -> Tensor:
    """Returns a cut as int64 [1 + pieces, 4]: how many ranks, and whether it is early; then rank, head and rows."""
    pieces = [(rank, *piece) for rank, part in enumerate(cut.parts) for piece in part]
    return torch.tensor([(len(cut.parts), int(cut.early), 0, 0), *pieces], dtype=torch.int64)


def _as_cut(stored: Tensor, ranks: int) -> Cut | None:
    """Returns the cut, None where it is for another number of ranks."""
    (parts_there, early, _, _), *pieces = stored.tolist()
    if parts_there != ranks:
        return None
    parts: list[list[Piece]] = [[] for _ in range(ranks)]
    for rank, head, first, last in pieces:
        parts[rank].append(Piece(head, first, last))
    return Cut(parts, bool(early))


def _as_tensor(last: Refreshed) -> Tensor:
    """Returns a refresh as fp64 [3]: step, interval, drift or NaN."""
    drift = math.nan if last.drift is None else last.drift
    return torch.tensor([last.step, last.interval, drift], dtype=torch.float64)


def _as_refreshed(stored: Tensor) -> Refreshed:
    step, interval, drift = stored.tolist()
    return Refreshed(int(step), int(interval), None if math.isnan(drift) else drift)


def _counted(labels: Tensor, C: int) -> Tensor:
    """Returns how many of labels [H, n] each of C clusters has, int32 [H, C]."""
    counts = torch.zeros(labels.shape[0], C, dtype=torch.int32, device=labels.device)
    return counts.scatter_add_(1, labels.long(), torch.ones_like(labels))


def _narrowed(labels: Tensor, C: int) -> Tensor:
    """Returns labels 0 .. C - 1, int32 or int16, in 16 bits where they fit."""
    return labels.to(torch.int16).view(torch.uint16) if C <= SHORT else labels


def _widened(labels: Tensor) -> Tensor:
    """Returns int32 labels of what `_narrowed` returned."""
    return labels.view(torch.int16).int() & (SHORT - 1) if labels.dtype == torch.uint16 else labels


def _packed(value: Any, name: str, tensors: dict[str, Tensor], owner: str) -> Any:
    """Returns `value` as JSON; its tensors go into `tensors` by the names that stand in their place."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if type(value) in (list, tuple):
        items = [_packed(item, f"{name}.{place}", tensors, owner) for place, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _packed(item, f"{name}.{key}", tensors, owner) for key, item in value.items()}}
    raise ValueError(
        f"{owner}.{name} is a {type(value).__name__}, which a checkpoint can't hold; accepted: tensors and plain "
        "values, or job.checkpoint_steps 0"
    )


def _unpacked(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """Returns what `_packed` made JSON of."""
    if isinstance(value, list):
        return [_unpacked(item, tensors, device) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inside),) = value.items()
    if kind == "tensor":
        return tensors[inside].to(device)
    if kind == "tuple":
        return tuple(_unpacked(item, tensors, device) for item in inside)
    return {key: _unpacked(item, tensors, device) for key, item in inside.items()}


def _flat(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yields the options of nested tables by their dotted names."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
