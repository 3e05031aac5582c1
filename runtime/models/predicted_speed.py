"""How long a video takes, predicted from its arithmetic and from rates that were measured. Needs no torch."""

from dataclasses import dataclass

from semvid.parallel.mesh import Mesh
from semvid.runtime.config import AttentionConfig, VideoConfig, cluster_counts
from semvid.runtime.models.published import Published

# One H200, whole Wan 14B at 75,600 tokens (docs/performance.md), seconds of a pass: dense 12.56 with diffusers' blocks
# and 11.85 with ours, reuse at density 0.298 5.995, refresh 6.214, first 11.74; with linear layers in FP8 reuse 4.85.
DENSE_TFLOPS = 525.0
SPARSE_TFLOPS = 480.0
STOCK_LINEAR_TFLOPS = 496.0
LINEAR_TFLOPS = 615.0
FP8_TFLOPS = 1006.0
ITERATION_TFLOPS = 345.0
# Two GPUs are 1.92 times as fast as one, and so on: what is left of each doubling.
DOUBLING = 0.96
DENSITY = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Seconds:
    """Of one forward pass, by kind."""

    dense: float
    first: float
    refresh: float
    reuse: float

    def of_video(self, counts: dict[str, int], passes: int) -> float:
        """Returns the denoising seconds of so many steps of each kind, each of so many passes one after the other."""
        return float(passes * sum(getattr(self, kind) * count for kind, count in counts.items()))


def predict(
    model: Published,
    video: VideoConfig,
    attention: AttentionConfig,
    mesh: Mesh,
    *,
    density: float = DENSITY,
    fp8: bool = False,
) -> Seconds:
    """Returns the seconds of a forward pass of each kind on H200s that share one sequence.

    Args:
        model: in bf16.
        video: what is to be seen.
        attention: says clusters, iterations and dense layers.
        mesh: how the ranks share it.
        density: of the sparse layers.
        fp8: whether large linear layers are in FP8.
    """
    tokens, geometry = model.geometry.tokens(video), model.geometry
    share = mesh.sequence * DOUBLING ** (mesh.sequence.bit_length() - 1)
    pairs = 4 * tokens**2 * model.width / 1e12
    linear = geometry.layers * _linear_tflop(model, tokens) / _linear_rate(attention, fp8=fp8)
    dense = pairs / DENSE_TFLOPS
    sparse = pairs * density / SPARSE_TFLOPS
    query, key = cluster_counts(attention, tokens)
    iteration = 2 * tokens * (query + key) * model.width / 1e12 / ITERATION_TFLOPS
    few = min(attention.dense_layers, geometry.layers)

    def whole(call: float) -> float:
        return (linear + few * dense + (geometry.layers - few) * call) / share

    return Seconds(
        dense=whole(dense),
        first=whole(sparse + attention.first_iterations * iteration),
        refresh=whole(sparse + attention.iterations * iteration),
        reuse=whole(sparse),
    )


def _linear_tflop(model: Published, tokens: int) -> float:
    """Returns the arithmetic of a block's linear layers on video tokens, TFLOP; text is little."""
    width, inner = model.width, model.feed_forward
    projections = 4 if model.family.joint else 6
    return 2 * tokens * (projections * width**2 + 2 * width * inner) / 1e12


def _linear_rate(attention: AttentionConfig, *, fp8: bool) -> float:
    """Returns TFLOP/s of linear layers and all that stands between them; dense pipelines keep diffusers' blocks."""
    if fp8:
        return FP8_TFLOPS
    return STOCK_LINEAR_TFLOPS if attention.method == "dense" else LINEAR_TFLOPS
