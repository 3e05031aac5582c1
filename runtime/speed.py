"""How long a video takes, predicted from its arithmetic and from rates that were measured. Needs no torch."""

from dataclasses import dataclass

from semvid.parallel.mesh import Mesh
from semvid.runtime.config import AttentionConfig, VideoConfig, cluster_counts
from semvid.runtime.published import Published

# One H200, bf16, 40 heads x 75,600 tokens x 128 (docs/performance.md): a block with dense cuDNN attention takes 298.4
# ms, its attention 207; an attention call of density 0.30 takes 89.9 ms with clusters reused and 94.6 with two
# iterations of k-means.
DENSE_TFLOPS = 566.0
SPARSE_TFLOPS = 390.0
LINEAR_TFLOPS = 497.0
ITERATION_TFLOPS = 430.0
# Two GPUs are 1.94 times as fast as one, and so on: what is left of each doubling.
DOUBLING = 0.97
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
    model: Published, video: VideoConfig, attention: AttentionConfig, mesh: Mesh, *, density: float = DENSITY
) -> Seconds:
    """Returns the seconds of a forward pass of each kind on H200s that share one sequence.

    Args:
        model: in bf16.
        video: what is to be seen.
        attention: says clusters, iterations and dense layers.
        mesh: how the ranks share it.
        density: of the sparse layers.
    """
    tokens, geometry = model.geometry.tokens(video), model.geometry
    share = mesh.sequence * DOUBLING ** (mesh.sequence.bit_length() - 1)
    pairs = 4 * tokens**2 * model.width / 1e12
    linear = geometry.layers * _linear_tflop(model, tokens) / LINEAR_TFLOPS
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
