"""Mends Triton's interpreter where it computes something else than a GPU would."""

import numpy as np


def mend_bfloat16_dot() -> None:
    """tl.dot of bfloat16 tiles: the interpreter keeps them as 16-bit integers and would multiply those (triton 3.6)."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    interpreted = InterpreterBuilder.create_dot

    def widened(tile: TensorHandle) -> TensorHandle:
        if tile.dtype.scalar != tl.bfloat16:
            return tile
        return TensorHandle((tile.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return interpreted(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def mend_bfloat16_rounding() -> None:
    """Casts from float32 to bfloat16: the interpreter cuts the lower bits off instead of rounding to nearest."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    interpreted = InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return interpreted(self, src, dst_type)
        bits = np.ascontiguousarray(src.data, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        data = np.where(np.isnan(src.data), bits >> 16 | 0x40, rounded).astype(np.uint16)
        return TensorHandle(data.reshape(np.shape(src.data)), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_impl
