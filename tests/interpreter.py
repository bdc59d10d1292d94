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
