"""Padding that depends on the size of the map, as TensorFlow's "SAME" does."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import pad


class SamePad(nn.Module):
    """Zeros around a map, so that a convolution behind it makes one pixel of every `stride` pixels, rounded up.

    In each spatial dimension of size n, max((ceil(n / stride) - 1) * stride + dilation * (kernel_size - 1) + 1 - n, 0) zeros
    are put half in front and half behind, the odd one behind.

    Args:
        kernel_size: of the convolution, one int per spatial dimension.
        stride: likewise.
        dilation: likewise.

    Shapes: (*, C, *n) to (*, C, *padded), any dtype.

    Source: TensorFlow, `tf.nn.convolution` with padding="SAME".
    """

    def __init__(self, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = tuple(kernel_size), tuple(stride), tuple(dilation)

    def forward(self, input: Tensor) -> Tensor:
        """Pad the last dimensions, as many as there are kernel sizes."""
        widths: list[int] = []
        sizes = input.shape[-len(self.kernel_size) :]
        for n, k, s, d in reversed(list(zip(sizes, self.kernel_size, self.stride, self.dilation, strict=True))):
            total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            widths += [total // 2, total - total // 2]
        return pad(input, widths)

    def extra_repr(self) -> str:
        """Say for what convolution it pads."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"
