"""Mends Triton's interpreter where it computes something else than a GPU would, and halves the time that it takes."""

import dataclasses

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


def quicken() -> None:
    """Does once what the interpreter does again for every operation or call (triton 3.6); results stay the same.

    It looks up all of Triton's language at every call of a function inside a kernel, makes a new type, of a new shape,
    for every tensor, and compares shapes number by number. And it looks for overflows of integers, only to drop what it
    finds unless kernels are debugged.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    block_type, tensor, constexpr = tl.core.block_type, tl.core.tensor, tl.core.constexpr
    launch, make_type, make_tensor = interpreter.GridExecutor.__call__, block_type.__init__, tensor.__init__
    in_numpy, broadcast = interpreter._get_np_dtype, TritonSemantic.broadcast_impl_value
    patched, types, blocks, shapes, dtypes = set(), {}, {}, {}, {}

    def begin_launch(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def call_function(self, *args, **kwargs):
        if self.fn not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn)
        return self.rewrite()(*args, **kwargs)

    def new_type(self, element_ty, shape):
        if type(element_ty) is not tl.core.dtype:  # names of pointers do not tell them all apart
            return make_type(self, element_ty, shape)
        numbers = shape.values if type(shape) is tl.core.tuple else shape
        key = element_ty.name, *(n.value if isinstance(n, constexpr) else n for n in numbers)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(self.__dict__)
        self.__dict__.update(types[key])

    def with_element_type(self, element_ty):
        if type(element_ty) is not tl.core.dtype:
            return block_type(element_ty, self.shape)
        key = element_ty.name, *self.shape.values
        if key not in blocks:
            blocks[key] = block_type(element_ty, self.shape)
        return blocks[key]

    def new_tensor(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    def numpy_dtype(dtype):
        dtype = dtype.element_ty if type(dtype) is block_type else dtype
        if type(dtype) is not tl.core.dtype:
            return in_numpy(dtype)
        if dtype.name not in dtypes:
            dtypes[dtype.name] = in_numpy(dtype)
        return dtypes[dtype.name]

    def broadcast_both(self, *pair):
        one, other = (x.type.shape.values if x.type.is_block() else None for x in pair)
        if one == other:
            return pair
        if one is None or other is None:
            block = pair[one is None].type
            return tuple(splat(self, x, block.with_element_ty(x.type.scalar)) for x in pair)
        if len(one) != len(other) or any(m != n and 1 not in (m, n) for m, n in zip(one, other, strict=True)):
            return broadcast(self, *pair)
        shape = [n if m == 1 else m for m, n in zip(one, other, strict=True)]
        return tuple(grow(self, x, shape) for x in pair)

    def splat(self, x, type):
        return x if x.type.is_block() else self.tensor(self.builder.create_splat(type, x.handle), type)

    def grow(self, x, shape):
        if x.type.shape.values == shape:
            return x
        return self.tensor(self.builder.create_broadcast(x.handle, shape), block_type(x.type.scalar, shape))

    interpreter.GridExecutor.__call__ = begin_launch
    interpreter.InterpretedFunction.__call__ = call_function
    block_type.__init__, tensor.__init__ = new_type, new_tensor
    block_type.with_element_ty = with_element_type
    interpreter._get_np_dtype = numpy_dtype
    TritonSemantic.broadcast_impl_value = broadcast_both
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
