"""NonlinAttention between its projections in inference, with weights that are stored."""

from __future__ import annotations

from torch import Tensor

from zipformer_kernels.ops.nonlin_attention import _op
from zipformer_kernels.ops.shapes import check_shapes


def infer_nonlin_attention(
    projected: Tensor, bias: Tensor | None, weights: Tensor, *, backend: str | None = None
) -> Tensor:
    """(W (x tanh(s))) y of the thirds s, x, y of a projection; the result carries no gradient.

    Args:
        projected: (T, batch, 3 channels), less its bias.
        bias: (3 channels,), or None.
        weights: W, (heads, batch, T, T), of one head in the encoder. All of one dtype.
        backend: which backend to use; see `zipformer_kernels.core.backend`.
    Returns:
        (T, batch, channels).
    Raises:
        ValueError: a shape does not fit.
        BackendError: `backend` cannot serve the call.
    """
    frames, batch, width = projected.shape
    heads = weights.shape[0]
    if width % (3 * heads):
        raise ValueError(f"projected must have a multiple of {3 * heads} channels, got {tuple(projected.shape)}")
    check_shapes(weights=(weights, (heads, batch, frames, frames)), bias=(bias, (width,)))
    return _op.variants["infer"](projected, bias, weights, backend=backend)
