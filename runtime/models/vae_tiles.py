"""The tiles of a VAE decoded by all ranks of a job, each its own, and joined on the first rank.

diffusers cuts latents into tiles, decodes one after the other and blends what they overlap. Its code runs here twice,
with another decoder in it: on every rank one that decodes this rank's tiles and passes over the rest; then on the first
rank one that gives what all have decoded. Tiles, blending and bits are thus diffusers' own, on any number of ranks.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from semvid.parallel.collectives import to_first
from semvid.parallel.ranks import Ranks

Decoder = Callable[..., Tensor]


def decode_shared(vae: Any, latents: Tensor, ranks: Ranks, beat: Callable[[], None]) -> Tensor | None:
    """Returns what `vae.decode` does, on the first rank; None on the others. Every rank of the job must enter.

    Args:
        vae: AutoencoderKLWan or AutoencoderKLHunyuanVideo with tiling enabled, the same on every rank.
        latents: [1, channels, frames, height, width], the same bits on every rank.
        ranks: this process among those of the job.
        beat: called once a round, in which each rank decodes one tile: as often on every rank.
    """
    mine = _Share(vae.decoder.forward, ranks, beat)
    with _decoder(vae, mine.decode):
        vae.decode(latents)
    parts = to_first(mine.decoded, mine.calls, latents, ranks.world)
    if ranks.rank > 0:
        return None
    with _decoder(vae, _Whole(parts).decode):
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
    return pixels


class _Tiles:
    """Knows which tile a call of the decoder is for."""

    def __init__(self) -> None:
        self.tile = -1

    def count(self, told: dict[str, Any]) -> None:
        # HunyuanVideo's decoder takes a tile in one call. Wan's takes its frames one by one, with a cache between them,
        # and is told which is the first.
        self.tile += told.get("first_chunk", "feat_cache" not in told)


class _Share(_Tiles):
    """Decodes this rank's tiles: in each round every rank has one."""

    def __init__(self, decoder: Decoder, ranks: Ranks, beat: Callable[[], None]) -> None:
        super().__init__()
        self.decoder = decoder
        self.rank = ranks.rank
        self.beat = beat
        self.calls = [0] * ranks.mesh.world_size
        """Of every rank."""
        self.decoded: list[Tensor] = []

    def decode(self, x: Tensor, **told: Any) -> Tensor:
        before = self.tile
        self.count(told)
        owner = self.tile % len(self.calls)
        if owner == 0 and self.tile != before:
            self.beat()
        self.calls[owner] += 1
        if owner == self.rank:
            self.decoded.append(self.decoder(x, **told))
        # Nobody reads what is blended of this, in place; it must have as many dimensions as a tile.
        return x[:, :, :1, :1, :1].clone()


class _Whole(_Tiles):
    """Gives what was decoded of every tile, where it is asked for as it was decoded."""

    def __init__(self, parts: list[list[Tensor]]) -> None:
        super().__init__()
        self.parts = [iter(part) for part in parts]

    def decode(self, x: Tensor, **told: Any) -> Tensor:
        self.count(told)
        return next(self.parts[self.tile % len(self.parts)])


@contextlib.contextmanager
def _decoder(vae: Any, decode: Decoder) -> Iterator[None]:
    """Has the VAE decode by `decode` inside."""
    before = vars(vae.decoder).get("forward")
    vae.decoder.forward = decode
    try:
        yield
    finally:
        if before is None:
            del vae.decoder.forward
        else:
            vae.decoder.forward = before
