"""What the launchers of conv_module share: its arguments as kernels take them, and the gradients they fill in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zipformer_kernels.core.joint import side_by_side
from zipformer_kernels.core.launch import like, unsupported_dtype


def unsupported(dtypes: tuple[torch.dtype, ...], a: Tensor, *rest: object) -> str | None:
    """Why kernels for `dtypes` cannot serve a call, or None if they can."""
    *parameters, _, _, dtype = rest[1:]
    reason = unsupported_dtype(a, dtypes)
    if reason is None and dtype not in (a.dtype, torch.float32):
        return f"it takes {a.dtype} to itself or float32 only, not to {dtype}"
    if reason is None and a.dtype == torch.float64 != dtype:
        return f"it takes float64 to itself only, not to {dtype}"
    wide = torch.promote_types(a.dtype, torch.float32)
    for parameter in parameters:
        if reason is None and parameter is not None and torch.promote_types(parameter.dtype, wide) != wide:
            return f"it takes parameters in float64 only for a in float64, got {a.dtype}"
    return reason


def chunk_length(chunk_size: int, frames: int) -> int:
    """Frames per chunk as kernels take them: at least 1, and no more than there are."""
    return chunk_size if 0 < chunk_size <= frames else max(frames, 1)


class Shape(NamedTuple):
    """`ConvModuleShape` of ``csrc/conv_module/conv_module.h``; strides are those of a and s."""

    frames: int
    batch: int
    channels: int
    frame_stride: int
    batch_stride: int
    kernel: int
    chunk: int


class Arguments:
    """The arguments of a call.

    a and s have channels of stride 1 and the same strides; parameters are dense and in float32, or float64 for a in
    float64; padding is of bytes.
    """

    def __init__(
        self,
        a: Tensor,
        s: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        causal_weight: Tensor | None,
        causal_bias: Tensor | None,
        edge_scale: Tensor | None,
        padding: Tensor | None,
        chunk_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.given = a, s
        if a.stride(2) != 1 or a.stride() != s.stride():
            a, s = a.contiguous(), s.contiguous()
        self.a, self.s, self.dtype = a, s, dtype
        self.wide = torch.promote_types(a.dtype, torch.float32)
        self.given_parameters = weight, bias, causal_weight, causal_bias, edge_scale
        self.parameters = tuple(None if p is None else p.to(self.wide).contiguous() for p in self.given_parameters)
        self.padding = None if padding is None else padding.contiguous().view(torch.uint8)
        self.kernel = weight.shape[2]
        self.chunked = causal_weight is not None
        self.chunk = chunk_length(chunk_size if self.chunked else -1, a.shape[0])

    @property
    def shape(self) -> Shape:
        """The sizes as kernels take them."""
        return Shape(*self.a.shape, *self.a.stride()[:2], self.kernel, self.chunk)

    def result(self) -> Tensor:
        """y, uninitialised."""
        return self.a.new_empty(self.a.shape, dtype=self.dtype)

    def parts(self, tile: int, most: int) -> int:
        """Into how many groups to split the frames: at most `most`, each of at least one tile of one sequence."""
        frames, batch, _ = self.a.shape
        return max(1, min(most, batch * -(-frames // tile)))


class Gradients:
    """The gradients that are wanted, uninitialised: da and ds, both or none, and room for partial sums.

    da and ds are dense, or the halves of one tensor where a and s are; `step` is from row to row of them.

    `partials` is (parts, P): in each row one part's share of the gradients of all parameters, one after another, a
    bias that is None included; `offsets` says where each begins.
    """

    def __init__(self, arguments: Arguments, needs: tuple[bool, ...], parts: int) -> None:
        self.arguments, self.needs, self.parts = arguments, needs, parts
        a, kernel = arguments.a, arguments.kernel
        self.da = self.ds = self.partials = None
        self.step = a.shape[2]
        joint = side_by_side(a, arguments.s) if needs[0] and needs[1] else None
        if joint is not None:
            self.step = joint.shape[2]
            self.da, self.ds = torch.empty_like(joint).chunk(2, dim=2)
        elif needs[0] or needs[1]:
            self.da, self.ds = a.new_empty(a.shape), a.new_empty(a.shape)
        rows = (kernel, 1, kernel // 2 + 1, 1, 2 * kernel) if arguments.chunked else (kernel, 1)
        self.lengths = [a.shape[2] * row for row in rows]
        self.offsets = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        if any(needs[2:]):
            new = torch.Tensor.new_empty if a.numel() > 0 else torch.Tensor.new_zeros
            self.partials = new(a, (parts, sum(self.lengths)), dtype=arguments.wide)

    def returned(self) -> tuple[Tensor | None, ...]:
        """One gradient, or None, per tensor argument, in their dtypes and strides. Adds up the parts in order."""
        gradients: list[Tensor | None] = [None] * 8
        for i, gradient in enumerate((self.da, self.ds)):
            if self.needs[i]:
                given = self.arguments.given[i]
                beside = self.step > given.shape[2]
                gradients[i] = gradient if beside else like(gradient, torch.empty_like(given))
        if self.partials is not None:
            sums = self.partials.sum(0) if self.parts > 1 else self.partials[0]
            for i, (share, given) in enumerate(
                zip(sums.split(self.lengths), self.arguments.given_parameters, strict=False), start=2
            ):
                if self.needs[i]:
                    gradients[i] = like(share.view(given.shape).to(given.dtype), torch.empty_like(given))
        return tuple(gradients)
