"""What a backend offers of matrix products: their signatures, in one named tuple."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Dropout(NamedTuple):
    """A dropout that is shared over time, by the numbers drawn for it.

    Attributes:
        draws: uniform in [0, 1), (batch, channels) or (1, batch, channels), in `low` or float32.
        rate: what is not above it is dropped.
    """

    draws: Tensor
    rate: float

    def mask(self) -> Tensor:
        """0 or 1 / (1 - rate), in float32 or better."""
        return (self.draws > self.rate) * self.factor

    @property
    def factor(self) -> float:
        """What is not dropped is multiplied by it."""
        return 1.0 / (1.0 - self.rate)


class Products(NamedTuple):
    """Matrix products of rows, and what is done to their results, as one backend offers them.

    `low` is the dtype that products take: half precision under autocast, else the dtype of src. Rows are (T, B), their
    tensors (T, B, channels), contiguous; all but src, its gradient and y are in `low`. Weights may have any strides,
    biases are (out,), in `low` or float32. Sums in a product are taken in float32 (float64 for float64). The result of
    Swoosh is multiplied by the mask of a `Dropout`, or there is None. `chosen` are factors of sequences, (B, 1), or
    None for ones. `kind` of Swoosh is "l" or "r".

    ``sums`` are sums over rows of a result, (parts, channels), each part of some rows, in float32 (float64 for
    float64), for `totals`; of zero rows they are zeros, or no parts.

    Attributes:
        activated: ``(x, weight, bias, dropout, kind, stores)`` -> hidden = x W^T + b, or None unless `stores`, and
            a = mask * swoosh(hidden), of hidden as it is rounded to `low`. weight: (out, in).
        activated_gradient: ``(grad, weight, hidden, dropout, kind)`` -> dhidden = (grad W) * mask * swoosh'(hidden), a
            again, the same bits as before, and sums of dhidden. weight: (channels of grad, channels of hidden).
        added: ``(src, x, weight, bias, chosen, low)`` -> y = src + chosen * (x W^T + b) in the dtype of src, and y in
            `low`: the same tensor where src has that dtype. weight: (out, in).
        added_gradient: ``(grad, dhidden, weight, low)`` -> dsrc = grad + dhidden W in the dtype of grad, dsrc in `low`,
            and its sums. weight: (channels of dhidden, channels of grad).
        weight_gradient: ``(grad, x, dtype)`` -> grad^T x over all rows, (out, in), in `dtype`.
        lowered: ``(grad, chosen, low)`` -> chosen * grad in `low`, and its sums. Where that changes nothing it is grad.
        totals: ``(sums, other)`` -> for each the sums of all rows, (channels,); None for None, which `other` may be.
    """

    activated: Callable[[Tensor, Tensor, Tensor | None, Dropout | None, str, bool], tuple[Tensor | None, Tensor]]
    activated_gradient: Callable[[Tensor, Tensor, Tensor, Dropout | None, str], tuple[Tensor, Tensor, Tensor]]
    added: Callable[..., tuple[Tensor, Tensor]]
    added_gradient: Callable[..., tuple[Tensor, Tensor, Tensor]]
    weight_gradient: Callable[..., Tensor]
    lowered: Callable[..., tuple[Tensor, Tensor]]
    totals: Callable[..., tuple[Tensor, Tensor | None]]
