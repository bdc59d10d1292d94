"""What launchers share: dtype codes, dense views of tensors, and the way into the compiled module."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from zipformer_kernels.core import backend, tuning
from zipformer_kernels.core.call import LOWEST, PLAIN, unreadable
from zipformer_kernels.core.private import current_device, current_stream

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
"""Dtypes as `csrc/common/dtypes.h` numbers them."""

GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU_DTYPES = (*GPU_DTYPES, torch.float64)
INFERENCE_DTYPES = (torch.float32, torch.float64)
"""Of kernels on the CPU that take no half precision: those for inference, and the gates of nonlin_attention."""

FEW_ROWS = tuning.entry("linear.few_rows")


def few_rows(x: Tensor) -> bool:
    """Whether x, (..., channels), has no more than `FEW_ROWS` rows."""
    return x.numel() <= FEW_ROWS.value * x.shape[-1]


def unsupported_dtype(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why kernels for `dtypes` cannot take x, or None if they can."""
    return None if x.dtype in dtypes else _refused(x.dtype, dtypes)


def _refused(dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> str:
    return f"it takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {dtype}"


def unsupported_dtypes(tensors: Iterable[Tensor | None], dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why kernels that take tensors of one of `dtypes` cannot take these, or None if they can; masks go with any."""
    found = {x.dtype for x in tensors if x is not None}
    found.discard(torch.bool)
    if len(found) > 1:
        return f"it takes tensors of one dtype, got {' and '.join(sorted(map(str, found)))}"
    for dtype in found:  # of one; torch.compile before 2.8 cannot record more of what sets can do
        if dtype not in dtypes:
            return _refused(dtype, dtypes)
    return None


def pointer(x: Tensor | None) -> int:
    """The address of a tensor, 0 for none: the only way in which one gets to a kernel.

    Whether a call's tensors can be read is asked before; here they come last.

    Raises:
        TypeError: x has no memory to read.
    """
    if x is None:
        return 0
    address = x.data_ptr() if type(x) in PLAIN else 0
    if address < LOWEST:
        reason = unreadable((x,))
        if reason is not None:
            raise TypeError(f"a kernel cannot take a tensor: {reason}")
    return address


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, copied where they are not contiguous."""
    return tuple(x if x is None else x.contiguous() for x in tensors)


def dense(x: Tensor) -> Tensor:
    """x itself if its elements fill one stretch of memory in some order of its dimensions, else a contiguous copy."""
    return x if x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x) else x.contiguous()


def like(x: Tensor, model: Tensor) -> Tensor:
    """x with the strides of the dense tensor `model`, copied if it has others."""
    return x if x.stride() == model.stride() else torch.empty_like(model, dtype=x.dtype).copy_(x)


def as_empty_like(result: Tensor, x: Tensor) -> Tensor:
    """The contiguous `result` with the strides that `torch.empty_like` gives to x, copied if they differ."""
    return result if x.is_contiguous() else torch.empty_like(x, dtype=result.dtype).copy_(result)


def cdiv(count: int, size: int) -> int:
    """How many blocks of `size` hold `count` elements. (`triton.cdiv` is made for kernels: a call takes 3 us here.)"""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The lowest power of two that is not below `count`; 1 for 0."""
    return 1 << max(count - 1, 0).bit_length()


def multiprocessors(x: Tensor) -> int:
    """How many the device of x has; on the CPU, for the stand-ins, so few that all loops of a kernel run."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


_HERE = nullcontext()


def on_device(x: Tensor) -> AbstractContextManager:
    """A context in which launches go to the device of x."""
    device = x.get_device()  # -1 on the CPU
    return _HERE if device < 0 or device == current_device() else torch.cuda.device(device)


def call_cpu(function: str, x: Tensor, *args: int | float, **named: int | float | tuple) -> None:
    """Calls ``<function>_cpu`` of the compiled module with torch's thread count.

    Arguments are the fields of the struct that the kernel takes, in their order or by name.
    """
    getattr(backend.native, function + "_cpu")(*args, **named, threads=torch.get_num_threads())


def call_cuda(function: str, x: Tensor, *args: int | float, **named: int | float | tuple) -> None:
    """Calls ``<function>_cuda`` on the device of x and torch's current stream; arguments as of `call_cpu`."""
    launch, device = getattr(backend.native, function + "_cuda"), x.get_device()
    if device < 0:
        launch(*args, **named, stream=0)  # the emulator, which has none
    elif device == current_device():
        launch(*args, **named, stream=current_stream(device))
    else:
        with torch.cuda.device(device):
            launch(*args, **named, stream=current_stream(device))
