"""What a job is told: frozen dataclasses, and errors that name the option. Needs no torch."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from semvid.kernels.limits import MAX_KEY_CLUSTERS, most_rows

Linear = Literal["same", "fp8"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which checkpoint, where and in what precision."""

    path: str = "demo"
    """A diffusers checkpoint folder, or "demo": the small model that semvid carries."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": the GPU if there is one."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of the transformer and the text encoder. "auto": bf16 where the device computes in it, else fp32."""
    linear: Linear = "same"
    """Of the transformer's large linear layers. "same": as `dtype`; "fp8": weights and inputs in e4m3, nearly bf16's
    results at half the memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoConfig:
    """What is to be seen."""

    prompt: str = ""
    negative_prompt: str = ""
    height: int = 480
    """Pixels."""
    width: int = 832
    """Pixels."""
    frames: int = 81
    """Number of frames, 4k + 1."""
    steps: int = 50
    """Denoising steps."""
    image: str | None = None
    """A picture that the video begins with, for the models that take one; scaled and cropped to the video's size."""
    guidance: float = 5.0
    """Scale of classifier-free guidance; 1 or less runs the conditional branch alone. HunyuanVideo has one branch and
    takes it as an input."""
    guidance_2: float | None = None
    """Likewise while the second of two transformers runs; absent: as `guidance`."""
    boundary: float | None = None
    """Share of the noise below which the second of two transformers runs, 0 .. 1; absent: the checkpoint's."""
    seed: int = 0
    """Of the first noise and of the first centroids."""
    fps: int = 16
    """Frames per second of the written video."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterCounts:
    """How many clusters for sequences of about so many tokens: one row of a preset's table."""

    tokens: int
    query: int
    key: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """How self-attention is computed."""

    method: Literal["dense", "clusters"] = "clusters"
    """"dense": the model's own attention everywhere."""
    backend: Literal["auto", "hopper", "triton", "reference"] = "auto"
    """Which kernels; "auto" takes the fastest that run on the device."""
    p: float = 0.9
    """Share of the estimated attention mass that a query cluster's selected key clusters reach, 0 < p <= 1. With a
    density it is found, or, with a tail, nothing is selected by it."""
    floor: float = 0.1
    """Least share of key clusters selected, 0 .. 1. With a density and a tail it is found."""
    density: float | None = None
    """The share of token pairs that each sparse call computes, stand-ins and anchors counted, 0 < density <= 1. With a
    tail a floor is found for it, layer by layer, and nothing is selected by p; without one p is. With 1 the result is
    dense exactly."""
    head_floor: float = 0.0
    """Least share of token pairs that each head computes, stand-ins counted, 0 .. 1: with a tail the floor of a head is
    raised to it, without one its p."""
    selection: Literal["mass", "error"] = "mass"
    """"mass": the clusters with the most attention mass first. "error": those first whose stand-in would err most for
    each key it saves; needs the tail."""
    tail: Literal["none", "first", "second"] = "none"
    """"first": key clusters that are not selected enter through their mean key and mean value. "second": weighed by the
    spread of the cluster's keys too."""
    anchors: Literal["no", "yes", "auto"] = "no"
    """"yes": the mean of each query cluster is computed over all keys too, and what its sparse result lacks is added to
    the cluster's queries. "auto": where the sequence holds video alone; "yes" is refused where it holds text too."""
    dense_steps: float = 0.2
    """Share of the steps, from the first, that stay dense; rounded down to whole steps."""
    least_dense_steps: int = 0
    """At least so many, but no more than half of the steps: a step of few goes far, and so do its errors."""
    dense_layers: int = 1
    """Layers, from the first, that stay dense."""
    seeding: Literal["random", "spread"] = "random"
    """Where k-means starts the first time: "random" tokens, or tokens of a sample that are "spread" far apart."""
    first_iterations: int = 50
    """k-means iterations the first time."""
    iterations: int = 2
    """k-means iterations of a refresh, from the centroids of the step before."""
    refresh: Literal["fixed", "growing", "drift"] = "fixed"
    """When clusters and map are refreshed: every `refresh_every` steps; at intervals that grow from it; or at intervals
    that start with it, are halved where labels drift and doubled where they stay."""
    refresh_every: int = 1
    """Clusters and map are refreshed every so many steps and reused in between."""
    refresh_growth: float = 2.0
    """"growing": each interval is so many times the one before."""
    refresh_most: int = 25
    """"growing" and "drift": the longest interval, in steps."""
    drift: float = 0.08
    """"drift": the share of labels that may change from one refresh to the next; below half of it intervals grow."""
    share_branches: Literal["no", "yes"] = "no"
    """"yes": both branches go by the conditional one's labels and map, so that their errors are alike and guidance
    does not magnify the difference."""
    clusters: tuple[ClusterCounts, ...] = (ClusterCounts(tokens=75_600, query=300, key=1000),)
    """The row nearest in tokens holds; below the smallest, its counts shrink with the square root of the tokens."""
    query_clusters: int | None = None
    """Overrides the table."""
    key_clusters: int | None = None
    """Overrides the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """How the job is run. None of it changes the video."""

    checkpoint_steps: int = 10
    """A checkpoint is written after every so many denoising steps; 0: there are no checkpoints at all."""
    checkpoint_seconds: float = 300.0
    """And after the first step that ends so many seconds after the last one; 0: never."""
    share_weights: bool = False
    """Each rank holds an equal part of the transformer's weights and gathers them block by block: for models that a GPU
    can't hold. It needs several."""
    hang_seconds: float = 300.0
    """Where no rank has begun another block of a model or another phase of a call for so long, the job hangs."""
    start_seconds: float = 1800.0
    """The same while the processes start, meet, and load the model."""
    failures: int = 3
    """After so many deaths at one step the job has failed; before, it goes on from its last checkpoint by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole job, resolved."""

    preset: str = "svg2"
    model: ModelConfig = field(default_factory=ModelConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    job: JobConfig = field(default_factory=JobConfig)


def check(config: Config) -> None:
    """Raises ValueError if a value is outside what is accepted, naming it; what depends on the model comes later."""
    video, attention = config.video, config.attention
    require(video.prompt.strip() != "", "prompt", video.prompt, "a text that says what is to be seen")
    for name in ("height", "width", "frames", "steps", "fps"):
        require(getattr(video, name) >= 1, name, getattr(video, name), "1 or more")
    require(math.isfinite(video.guidance) and video.guidance >= 0, "guidance", video.guidance, "0 or more")
    second = video.guidance_2
    require(second is None or (math.isfinite(second) and second >= 0), "guidance_2", second, "0 or more")
    require(video.boundary is None or 0 <= video.boundary <= 1, "boundary", video.boundary, "0 .. 1")
    require(0 <= video.seed < 2**63, "seed", video.seed, "0 .. 2^63 - 1")
    require(0 < attention.p <= 1, "attention.p", attention.p, "0 < p <= 1")
    require(0 <= attention.floor <= 1, "attention.floor", attention.floor, "0 .. 1")
    _check_reuse(attention)
    job = config.job
    require(job.checkpoint_steps >= 0, "job.checkpoint_steps", job.checkpoint_steps, "0 or more; 0 is never")
    seconds = job.checkpoint_seconds
    require(math.isfinite(seconds) and seconds >= 0, "job.checkpoint_seconds", seconds, "0 or more; 0 is never")
    for name in ("hang_seconds", "start_seconds"):
        limit = getattr(job, name)
        require(math.isfinite(limit) and limit > 0, f"job.{name}", limit, "more than 0")
    require(job.failures >= 1, "job.failures", job.failures, "1 or more")
    share = attention.dense_steps
    require(0 <= share <= 1, "attention.dense_steps", share, "0 .. 1, a share of the steps")
    least = attention.least_dense_steps
    require(least >= 0, "attention.least_dense_steps", least, "0 or more")
    require(attention.dense_layers >= 0, "attention.dense_layers", attention.dense_layers, "0 or more")
    for name in ("first_iterations", "iterations", "refresh_every"):
        require(getattr(attention, name) >= 1, f"attention.{name}", getattr(attention, name), "1 or more")
    for name, most in (("query_clusters", math.inf), ("key_clusters", MAX_KEY_CLUSTERS)):
        value = getattr(attention, name)
        accepted = "1 or more" if math.isinf(most) else f"1 .. {most}"
        require(value is None or 1 <= value <= most, f"attention.{name}", value, accepted)
    require(len(attention.clusters) > 0, "attention.clusters", [], "at least one row of tokens, query and key")
    for row in attention.clusters:
        for part in ("tokens", "query", "key"):
            require(getattr(row, part) >= 1, f"attention.clusters.{part}", getattr(row, part), "1 or more")
        require(row.key <= MAX_KEY_CLUSTERS, "attention.clusters.key", row.key, f"1 .. {MAX_KEY_CLUSTERS}")


def _check_reuse(attention: AttentionConfig) -> None:
    """Raises ValueError for options of the tail, the budget or the schedule that are not accepted."""
    budget, least = attention.density, attention.head_floor
    require(budget is None or 0 < budget <= 1, "attention.density", budget, "0 < density <= 1")
    most = 1.0 if budget is None else budget
    require(0 <= least <= most, "attention.head_floor", least, f"0 .. {most:g}, no more than attention.density")
    needs = "mass; error needs attention.tail centroids"
    require(attention.selection == "mass" or attention.tail != "none", "attention.selection", "error", needs)
    growth, drift = attention.refresh_growth, attention.drift
    require(math.isfinite(growth) and growth >= 1, "attention.refresh_growth", growth, "1 or more")
    most_steps = attention.refresh_most
    if attention.refresh != "fixed":
        every = f"{attention.refresh_every} (attention.refresh_every) or more"
        require(most_steps >= attention.refresh_every, "attention.refresh_most", most_steps, every)
    require(0 < drift <= 1, "attention.drift", drift, "0 < drift <= 1, a share of the labels")


def selects_all(attention: AttentionConfig) -> bool:
    """Returns whether every key cluster is selected, by p = 1 or a density of 1: the result is dense exactly."""
    return (attention.p if attention.density is None else attention.density) >= 1


def has_tail(attention: AttentionConfig) -> bool:
    """Returns whether stand-ins are computed: where every cluster is selected nothing is left for them."""
    return attention.tail != "none" and not selects_all(attention)


def has_anchors(attention: AttentionConfig, *, joint: bool) -> bool:
    """Returns whether anchors are computed, in a `joint` sequence (video and text) or in one of video alone.

    Where every cluster is selected they lack nothing.
    """
    asked = attention.anchors == "yes" or (attention.anchors == "auto" and not joint)
    return asked and not selects_all(attention)


def check_tokens(attention: AttentionConfig, tokens: int, *, joint: bool = False) -> None:
    """Raises ValueError if a sequence of `tokens` tokens can't have the clusters or the density asked for.

    Args:
        attention: the setting.
        tokens: of video.
        joint: whether text is in the sequence too.
    """
    queries, keys = cluster_counts(attention, tokens)
    # A prompt's cluster with them.
    most = most_rows(keys + 1)
    if tokens > most:
        raise ValueError(f"attention.key_clusters is {keys} for {tokens} tokens; accepted: fewer for more than {most}")
    parts = {f"the stand-ins of {keys} key clusters": keys} if has_tail(attention) else {}
    if has_anchors(attention, joint=joint):
        # Each is one row of all keys, and one of the least that a row can have.
        parts[f"the anchors of {queries} query clusters"] = round(queries * (1 + sum(parts.values()) / tokens))
    least = sum(parts.values()) / tokens
    require(
        attention.density is None or attention.density > least,
        "attention.density",
        attention.density,
        f"more than {least:.4f}: so much do {' and '.join(parts)} cost {tokens} tokens",
    )


def cluster_counts(attention: AttentionConfig, tokens: int) -> tuple[int, int]:
    """Returns (query clusters, key clusters) for a sequence of `tokens` tokens.

    The row of the table nearest in tokens (by ratio) holds; below the smallest row its counts shrink with
    √(tokens / row), so that clusters shrink in number and in size alike. Never more clusters than tokens.

    Raises:
        ValueError: `query_clusters` or `key_clusters` is set and exceeds the tokens.
    """
    row = min(attention.clusters, key=lambda r: abs(math.log(r.tokens / tokens)))
    shrink = min(1.0, math.sqrt(tokens / row.tokens)) if row == min(attention.clusters, key=lambda r: r.tokens) else 1.0
    counts = []
    for name, fixed, of_row in (
        ("query_clusters", attention.query_clusters, row.query),
        ("key_clusters", attention.key_clusters, row.key),
    ):
        if fixed is not None and fixed > tokens:
            raise ValueError(f"attention.{name} is {fixed}; accepted: 1 .. {tokens}, the tokens of this video")
        counts.append(fixed or min(tokens, max(1, round(of_row * shrink))))
    return counts[0], counts[1]


def require(condition: bool, name: str, value: Any, accepted: str, near: str = "") -> None:
    """Raises ValueError, naming the option, its value and what is accepted, unless a condition holds."""
    if not condition:
        raise ValueError(f"{name} is {value!r}; accepted: {accepted}{near}")
