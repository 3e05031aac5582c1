"""Linear layers in FP8: weights scaled by output channel, inputs by token, products of the tensor cores' own.

Off unless asked for: results are close to bf16's, not equal.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from semvid.kernels import fp8
from semvid.kernels.dispatch import Ops
from semvid.kernels.layout import Rows8


class Linear8(nn.Module):
    """A linear layer that keeps its weights in FP8 and quantises what comes in, with GELU before it if it is told."""

    values: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, ops: Ops, *, gelu: bool = False) -> None:
        super().__init__()
        weight = ops.quantize_rows(linear.weight.detach())
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)
        self.bias = linear.bias
        self.ops, self.gelu, self.dtype = ops, gelu, linear.weight.dtype

    def forward(self, x: Tensor | Rows8) -> Tensor:
        """Returns [..., M] in the dtype of the layer that was, of x [..., K]."""
        return self.multiply(self.quantize(x))

    def quantize(self, x: Tensor | Rows8) -> Rows8:
        """Returns the layer's input as `multiply` takes it; what is so already stays as it is."""
        if isinstance(x, Rows8):
            return x
        return self.ops.quantize_rows(x, gelu=self.gelu)

    def multiply(self, rows: Rows8) -> Tensor:
        """Returns the layer's output of a quantised input."""
        return self.ops.linear8(rows, Rows8(self.values, self.scales), self.bias, self.dtype)


def takes_rows8(layer: object) -> bool:
    """Returns whether a layer takes rows in FP8 in the place of a tensor."""
    return isinstance(layer, Linear8) and not layer.gelu


def apply_all(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> list[Tensor]:
    """Returns what each layer makes of x; layers in FP8 quantise it once for all of them, if it is not so already."""
    first = layers[0]
    if not isinstance(first, Linear8):
        return [layer(x) for layer in layers]
    rows = first.quantize(x)
    return [cast(Linear8, layer).multiply(rows) for layer in layers]


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError if products in FP8 can't run on a device, or not with layers of another dtype than bf16."""
    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < fp8.OLDEST_GPU:
        raise ValueError(
            f"model.linear is 'fp8', which needs compute capability 8.9 or newer; this GPU has {found[0]}.{found[1]}"
        )
    if dtype != torch.bfloat16:
        raise ValueError(f"model.linear is 'fp8' with {str(dtype).removeprefix('torch.')}; accepted: model.dtype bf16")


def quantize_linears(blocks: Iterable[nn.Module], heavy: Sequence[str], ops: Ops) -> int:
    """Puts FP8 layers in the place of large ones and returns how many.

    Args:
        blocks: of a transformer, on their device.
        heavy: where in a block the layers are (`Facts.heavy`).
        ops: of the backend.

    Raises:
        ValueError: a layer's size is no multiple of 16.
    """
    count = 0
    for block in blocks:
        for path in heavy:
            if not _has(block, path):
                # Of another kind of block.
                continue
            linear = cast(nn.Linear, block.get_submodule(path))
            if any(size % fp8.MULTIPLE for size in linear.weight.shape):
                sizes = " x ".join(map(str, linear.weight.shape))
                raise ValueError(f"model.linear is 'fp8', but {path} is {sizes}; accepted: multiples of {fp8.MULTIPLE}")
            block.set_submodule(path, Linear8(linear, ops, gelu=_take_gelu(block, path)))
            count += 1
    return count


def _take_gelu(block: nn.Module, path: str) -> bool:
    """Returns whether a GELU stands right before a layer, and takes it out: the layer will do it."""
    # diffusers' FeedForward: net.0 is a layer with its GELU, net.1 dropout, net.2 the second layer.
    feed_forward, _, place = path.rpartition(".net.")
    if place != "2":
        return False
    first: Any = block.get_submodule(f"{feed_forward}.net.0")
    block.set_submodule(f"{feed_forward}.net.0", first.proj)
    return True


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True
