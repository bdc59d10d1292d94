"""The sums over rows that backward takes on a GPU, all in one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zipformer_kernels.core.launch import like
from zipformer_kernels.ops.conv_module.arguments import Arguments


class Sums:
    """The gradients of all parameters and, where `inputs`, the sums of da and of ds, one after another.

    Partial sums of a group of rows are (rows, channels), a parameter's row for each of its taps, in the same order.

    Attributes:
        inputs, parameters: whether da and ds, and whether any parameter's gradient is wanted.
        lengths: of each parameter's gradient, one that is None included; then of the sums of da and ds.
        rows: of partial sums.
    """

    def __init__(self, arguments: Arguments, inputs: bool, parameters: bool) -> None:
        kernel, channels = arguments.kernel, arguments.a.shape[2]
        taps = (kernel, 1, kernel // 2 + 1, 1, 2 * kernel) if arguments.chunked else (kernel, 1)
        rows = [*(taps if parameters else ()), *([2] if inputs else ())]
        self.arguments, self.inputs, self.parameters = arguments, inputs, parameters
        self.lengths, self.rows = [channels * count for count in rows], sum(rows)

    def partials(self, parts: int) -> Tensor:
        """Uninitialised, (parts, rows, channels)."""
        a = self.arguments.a
        return torch.empty(parts, self.rows, a.shape[2], dtype=torch.float32, device=a.device)

    def empty(self) -> Tensor:
        """The sums, flat and uninitialised; zeros where there is nothing to add up."""
        a = self.arguments.a
        new = torch.empty if a.numel() > 0 else torch.zeros
        return new(sum(self.lengths), dtype=torch.float32, device=a.device)

    def gradients(self, sums: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
        """The wanted gradients of the five parameters, in their dtypes and strides, from the flat sums."""
        gradients: list[Tensor | None] = [None] * 5
        if self.parameters:
            given = self.arguments.given_parameters
            for i, share in enumerate(sums.split(self.lengths)[: 5 if self.arguments.chunked else 2]):
                if needs[i]:
                    gradients[i] = like(share.view(given[i].shape).to(given[i].dtype), torch.empty_like(given[i]))
        return gradients

    def of_inputs(self, sums: Tensor) -> Tensor | None:
        """The sums of da and ds, (1, 2 channels)."""
        return sums[sums.numel() - self.lengths[-1] :].unsqueeze(0) if self.inputs else None
