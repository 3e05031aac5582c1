"""The state of one job on one pipeline: where the denoising loop is, what it remembers, what it has counted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from semvid.kernels.dispatch import Ops
from semvid.parallel.balance import balance
from semvid.parallel.itinerary import Placement
from semvid.parallel.lloyd import Recordings
from semvid.parallel.ranks import Ranks
from semvid.parallel.shard import Shard
from semvid.parallel.windows import Windows
from semvid.runtime.attention.density import Density, DensityMeter
from semvid.runtime.attention.prompt import Prompt
from semvid.runtime.attention.state import Cache, Memory
from semvid.runtime.config import AttentionConfig


@dataclass(frozen=True, slots=True)
class Position:
    """One forward pass of the transformer: which step of how many, and which branch."""

    step: int
    steps: int
    branch: str


@dataclass(slots=True)
class Session:
    """Shared by the processors of one pipeline; belongs to a job and is reset between jobs."""

    config: AttentionConfig
    ops: Ops
    seed: int
    ranks: Ranks = field(default_factory=Ranks)
    """This process among those of the job."""
    cache: Cache = field(default_factory=Cache)
    recordings: Recordings = field(default_factory=Recordings)
    """Of k-means iterations, replayed."""
    meter: DensityMeter = field(default_factory=DensityMeter)
    position: Position | None = None
    seen: set[str] = field(default_factory=set)
    """Branches that ran at the current step."""
    place_work: Placement = balance
    """How the work of a layer is cut among ranks."""
    windows: Windows | None = None
    """Memory that the ranks of the sequence share, where they can; rows travel by collectives otherwise."""
    shard: Shard | None = None
    """This rank's tokens in the current forward pass; None where the transformer is not sharded."""
    prompt: Prompt | None = None
    """The text tokens of the joint sequence in the current forward pass; None where it is video alone."""
    renew: Callable[..., Any] | None = None
    """Stands in for `semvid.runtime.attention.refresh.refresh`, for other ways to divide the tokens beside ours."""
    probe: Callable[..., None] | None = None
    """Called after each sparse call with layer, q, k, v, out and the memory that it went by."""
    first_head: int = 0
    """The model's number of this rank's first head, where heads are shared from outside: random starts hang on it."""

    @property
    def prompt_rows(self) -> int:
        """How many of this rank's last rows are prompt tokens."""
        return 0 if self.prompt is None else self.prompt.own

    def enter(self, position: Position) -> None:
        """Begins a forward pass. One that does not follow the pass before begins a new job, and resets.

        Within a job a step never comes back and each branch runs at most once a step: a rank of one branch sees that
        one alone.
        """
        last = self.position
        repeated = last is not None and position.step == last.step and position.branch in self.seen
        if last is None or position.step < last.step or repeated:
            self.reset()
        elif position.step > last.step:
            self.seen.clear()
        self.position = position
        self.seen.add(position.branch)

    def finish(self) -> None:
        """Ends the job: its clusters and recordings are freed, its counts stay until the next one begins."""
        self.cache.reset()
        self.recordings.clear()
        self.position = None
        self.seen.clear()

    def reset(self) -> None:
        """Forgets clusters, position and counts."""
        self.finish()
        self.meter.reset()

    def resume(self, step: int, steps: int, memories: Mapping[tuple[int, str], Memory], density: Density) -> None:
        """Takes the state of a job after `step` of `steps` steps; the next forward pass goes on from it.

        Args:
            step: steps done, 1 or more.
            steps: of the job.
            memories: of every layer and branch that this rank runs.
            density: of the job so far, over all branches.
        """
        self.reset()
        self.position = Position(step - 1, steps, "")
        for (layer, branch), memory in memories.items():
            self.cache.put(layer, branch, memory)
        # What the job has counted is counted once, whoever runs which branch from here on.
        if self.ranks.place.cfg == 0:
            self.meter.resume(density)

    @property
    def shared(self) -> bool:
        """Whether both branches go by the labels and maps of the conditional one."""
        return self.config.share_branches == "yes"

    def owner(self) -> str:
        """Returns the branch whose memories the current forward pass goes by.

        Raises:
            ValueError: branches share them, but each has a prompt in the sequence, and the plans have the other's.
        """
        branch = self.here().branch
        owner = self.owner_of(branch)
        if owner != branch and self.prompt is not None:
            text = "attention.share_branches is 'yes', but each branch has its prompt in the attended sequence"
            raise ValueError(f"{text}; accepted: no")
        return owner

    def owner_of(self, branch: str) -> str:
        """Returns the branch whose memories `branch` goes by: of each transformer the conditional one, if shared."""
        return branch.replace("uncond", "cond") if self.shared else branch

    def here(self) -> Position:
        """Returns the current position.

        Raises:
            RuntimeError: no forward pass has been entered: the transformer was called outside a pipeline's loop.
        """
        if self.position is None:
            raise RuntimeError("self-attention was called outside the transformer's forward pass")
        return self.position
