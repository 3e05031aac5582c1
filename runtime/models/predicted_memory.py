"""How much memory and time a video takes on each GPU, predicted from sizes alone. Needs no torch.

The formulas count the tensors that are alive at once in each phase; what a kernel or a convolution takes beside them is
a factor, named. Everything is bytes of one rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from semvid.parallel.mesh import Mesh
from semvid.runtime.config import AttentionConfig, VideoConfig, cluster_counts
from semvid.runtime.models.published import Published

HALF, SINGLE = 2, 4
# Of [n, width] in half precision, alive at once around a block's attention: hidden states, normed ones, q, k and v,
# turned q and k, rows in the order of clusters, result, and the result in the model's order.
ATTENTION_COPIES = 12
# In single precision while a block modulates its hidden states: them, their norm, two products.
MODULATION_COPIES = 4
# Feed-forward: before and after the activation.
FEED_FORWARD_COPIES = 2
# Of a row of a head that travels: the orders of queries and keys, two targets, their ranks in bytes (see
# semvid.parallel.direct); with a ring sources and targets of q and of the way home, and those of k and v at every hop.
WAYS, ROUTES, ROUTES_OF_HOP = 2 * 4 + 2 * 4 + 2, 3 * 4, 3 * 4
# What rows that GPUs share are allotted over what they need; see semvid.parallel.windows.
WINDOW_SPARE = 1.25
# The CUDA context, libraries' workspaces, the tokens of recorded iterations (semvid.parallel.lloyd), and what the
# allocator can't reuse.
OVERHEAD = 2 << 30
FRAGMENTS = 1.06
# Feature maps of the VAE's widest part that are alive at once, and their frames: Wan's decodes four at a time.
DECODE_COPIES, WAN_FRAMES = 8, 4
# A VAE that would take more is decoded in tiles. A rule of sizes alone: on another GPU the same video must come out.
DECODE_LIMIT = 24 << 30
# A tile of 256 × 256 pixels and 16 frames through HunyuanVideo's decoder, or one of all frames through Wan's.
TILE_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Bytes on the rank that needs most."""

    weights: int
    """Of all transformers and the VAE."""
    encoders: int
    """Of what encodes prompts and images, gone after that."""
    activations: int
    """Of one forward pass, rows in the order of clusters included."""
    windows: int
    """Rows that GPUs of one host share."""
    state: int
    """Kept between steps: clusters, maps, exchanges, of every sparse layer and branch."""
    decode: int
    """While the VAE decodes."""
    tiled: bool
    """Whether it decodes tile by tile."""

    @property
    def phases(self) -> dict[str, int]:
        """The peak of each phase, fragments and context included."""
        inside = {
            "encode": self.weights + self.encoders,
            "denoise": self.weights + self.activations + self.windows + self.state,
            "decode": self.weights + self.windows + self.decode,
        }
        return {name: round(size * FRAGMENTS) + OVERHEAD for name, size in inside.items()}

    @property
    def peak(self) -> int:
        """The largest of them."""
        return max(self.phases.values())


def predict(
    model: Published,
    video: VideoConfig,
    attention: AttentionConfig,
    mesh: Mesh,
    *,
    guided: bool,
    share_weights: bool = False,
    fp8: bool = False,
) -> Need:
    """Returns what a video needs on each rank of a mesh.

    Args:
        model: in half precision; its VAE in single precision.
        video: what is to be seen.
        attention: says the clusters and the dense layers.
        mesh: how the ranks share it.
        guided: whether there are two branches.
        share_weights: whether each rank holds a part of the transformers' weights.
        fp8: whether large linear layers are in FP8, a byte a weight.
    """
    tokens = model.geometry.tokens(video)
    rows = -(-tokens // mesh.sequence)
    transformers = parameters(model) * len(model.family.transformers)
    saved = heavy_parameters(model) * len(model.family.transformers) if fp8 else 0
    if share_weights:
        # A rank's part, and two blocks gathered: the one that runs and the next.
        transformers = transformers // mesh.world_size + 2 * parameters(model) // model.geometry.layers
    apart = guided and mesh.cfg == 1 and attention.share_branches == "no"
    tiled = is_tiled(model.vae, video.frames, video.height, video.width)
    return Need(
        weights=HALF * transformers - saved + SINGLE * model.vae_parameters,
        encoders=HALF * sum(encoder.parameters for encoder in model.encoders),
        activations=_activations(model, rows, per_token=model.family.name == "wan2.2-ti2v"),
        windows=_windows(model, rows) if mesh.sequence > 1 and mesh.ring == 1 else 0,
        state=_state(model, attention, tokens, rows, mesh) * (2 if apart else 1),
        decode=decode_bytes(model.vae, video.frames, video.height * video.width, tiled=tiled),
        tiled=tiled,
    )


def parameters(model: Published) -> int:
    """Returns the parameters of one transformer, without its smallest parts (biases, norms, modulation tables)."""
    table, width, inner = model.transformer, model.width, model.feed_forward
    if "num_single_layers" in table:
        # Double blocks: 8 projections, two feed-forward layers, two modulations. Single ones: three projections, an
        # inner layer and one out of both, one modulation.
        double = 8 * width**2 + 2 * 2 * width * inner + 2 * 6 * width**2
        single = 3 * width**2 + width * inner + (width + inner) * width + 3 * width**2
        refiner = int(table["num_refiner_layers"]) * (4 + 8 + 2) * width**2
        ends = 6 * width**2 + width * (table["text_embed_dim"] + table["pooled_projection_dim"])
        return int(table["num_layers"] * double + table["num_single_layers"] * single + refiner + ends)
    # Self- and cross-attention with four projections each, and of an image's tokens two more.
    image = 2 * width**2 if table.get("added_kv_proj_dim") else 0
    block = 8 * width**2 + 2 * width * inner + image
    ends = 7 * width**2 + width**2 + width * (table["text_dim"] + table["freq_dim"])
    return int(table["num_layers"] * block + ends)


def heavy_parameters(model: Published) -> int:
    """Returns those of one transformer's large linear layers, which can be kept in a byte each (`fp8_linears`)."""
    table, width, inner = model.transformer, model.width, model.feed_forward
    if "num_single_layers" in table:
        double = 4 * width**2 + 2 * width * inner
        single = 3 * width**2 + width * inner + (width + inner) * width
        return int(table["num_layers"] * double + table["num_single_layers"] * single)
    return int(table["num_layers"] * (6 * width**2 + 2 * width * inner))


def is_tiled(vae: Mapping[str, Any], frames: int, height: int, width: int) -> bool:
    """Returns whether a VAE of this configuration decodes such a video tile by tile: it is then so on every device."""
    return decode_bytes(vae, frames, height * width, tiled=False) > DECODE_LIMIT


def decode_bytes(vae: Mapping[str, Any], frames: int, pixels: int, *, tiled: bool) -> int:
    """Returns what decoding takes beside the weights; `pixels` of a frame."""
    out = SINGLE * 3 * pixels * frames
    return out + (TILE_BYTES if tiled else _decoder_bytes(vae, pixels, frames))


def _decoder_bytes(vae: Mapping[str, Any], pixels: int, frames: int) -> int:
    """Returns what a VAE's widest part at full resolution takes."""
    if "block_out_channels" in vae:
        # All frames at once.
        return DECODE_COPIES * SINGLE * int(vae["block_out_channels"][0]) * pixels * frames
    scale = int(vae.get("patch_size") or 1)
    base = int(vae.get("decoder_base_dim") or vae["base_dim"])
    return DECODE_COPIES * SINGLE * base * (pixels // scale**2) * WAN_FRAMES


def _activations(model: Published, rows: int, *, per_token: bool) -> int:
    """Returns the largest sum of what is alive at once in a block; `per_token`: with a modulation of every token."""
    hidden = HALF * rows * model.width
    attention = ATTENTION_COPIES * hidden
    modulation = hidden + MODULATION_COPIES * 2 * hidden
    forward = 2 * hidden + FEED_FORWARD_COPIES * HALF * rows * model.feed_forward + 2 * 2 * hidden
    # Six values a channel in single precision, of the model and with a block's own added.
    table = 2 * 6 * SINGLE * rows * model.width if per_token else 0
    return max(attention, modulation, forward) + table


def _windows(model: Published, rows: int) -> int:
    """Returns the queries, keys, values and results of a rank's share of the work."""
    return round(4 * HALF * rows * model.width * WINDOW_SPARE)


def _state(model: Published, attention: AttentionConfig, tokens: int, rows: int, mesh: Mesh) -> int:
    """Returns what one branch keeps of all sparse layers of the transformer that runs."""
    if attention.method == "dense":
        return 0
    heads, width = model.geometry.heads, model.width
    query, key = cluster_counts(attention, tokens)
    # Centroids and the map.
    layer = HALF * (query + key) * width + heads * query * key // 8
    if mesh.sequence > 1:
        ways = WAYS if mesh.ring == 1 else ROUTES + ROUTES_OF_HOP * mesh.ring
        layer += ways * heads * rows
    # Labels of queries and keys.
    layer += 2 * HALF * heads * rows
    return layer * max(0, model.geometry.layers - attention.dense_layers)
