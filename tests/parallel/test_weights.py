"""Weights shared by ranks: the same bits come out, and each rank holds its part."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from semvid.parallel.weights import share_weights


class Block(nn.Module):
    """Weights in two precisions, as Wan's blocks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9, dtype=torch.bfloat16), nn.Linear(9, 6, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.down(self.up(x)).float()).bfloat16()


class Model(nn.Module):
    """Something, and then two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 6, dtype=torch.bfloat16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def _same_bits(rank: int, world: int) -> None:
    torch.manual_seed(0)
    model = Model().requires_grad_(False)
    x = torch.randn(3, 7).bfloat16()
    with torch.no_grad():
        expected = model(x)
        share_weights(model, list(model.blocks))
        for _ in range(2):
            assert torch.equal(model(x), expected)
    for block in model.blocks:
        held = sum(part.to_local().numel() for part in block.parameters())
        assert held < sum(part.numel() for part in block.parameters())


@pytest.mark.parametrize("world", [2, 3])
def test_shared_weights_compute_the_same_bits(world: int, spawn: Callable[..., None]) -> None:
    spawn(world, _same_bits)
