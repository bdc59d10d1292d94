"""Reads pickles as data: nothing that a file names is imported, and nothing that it asks for is called.

A pickle is a program for a small machine. Here its machine holds numbers, strings, containers, and the inert classes
below; never a class, function or module of Python. Where a pickle calls something, a short table says what that
means if it makes a tensor or a container, and all else becomes a `Placeholder`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, BinaryIO, ClassVar, NamedTuple

import torch
from torch import Tensor


class Global(NamedTuple):
    """The name of a class or function in a pickle."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Placeholder:
    """Stands for an object that is not made.

    Attributes:
        kind: its class, or the function that would make it.
        arguments: what that would be called with.
        entries: the attributes that it would get, and the items if it is a mapping.
        elements: the elements that it would get, if it is a list or set.
    """

    kind: Any
    arguments: tuple[Any, ...] = ()
    entries: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    def build(self, state: Any) -> None:
        """Takes the attributes that a pickle sets: a dict of them, or two."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.entries.update(part)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, value: Any) -> None:
        self.elements.append(value)

    add = append


@dataclass(eq=False)
class Storage:
    """The memory of one or several tensors, which stays in the file until it is asked for."""

    dtype: torch.dtype
    count: int
    read: Callable[[], bytes | memoryview]

    @cached_property
    def elements(self) -> Tensor:
        """All elements, (count,)."""
        content = bytearray(self.read())
        if len(content) != self.count * self.dtype.itemsize:
            raise ValueError(f"a storage of {len(content)} bytes, not of {self.count} {self.dtype}")
        return torch.frombuffer(content, dtype=self.dtype) if content else torch.empty(0, dtype=self.dtype)


@dataclass(eq=False)
class StoredTensor:
    """A tensor in a file."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor. Raises RuntimeError where it would exceed its storage."""
        return self.storage.elements.as_strided(self.size, self.stride, self.offset)


STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "UntypedStorage": torch.uint8,
}


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *more: Any) -> Any:
    """`torch._utils._rebuild_tensor` and `_rebuild_tensor_v2`."""
    negated = more[2:] and more[2]  # metadata: the numbers in the storage are not yet the tensor's
    if not isinstance(storage, Storage) or negated:
        return Placeholder(Global("torch", "Tensor"), (storage, offset, size, stride, *more))
    return StoredTensor(storage, offset, tuple(size), tuple(stride))


def _parameter(data: Any, *_: Any) -> Any:
    """`torch._utils._rebuild_parameter`, and with the attributes that one may have in Python."""
    return data


def _typed(make: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with attributes, or of a subclass, which may mean anything."""
    plain = kind in PLAIN_TENSORS and make in TENSORS
    return TENSORS[make](*arguments) if plain else Placeholder(kind, tuple(arguments))


def _bytes(text: Any, encoding: Any) -> Any:
    """`_codecs.encode`, as which pickles up to protocol 2 write bytes."""
    if encoding != "latin1" or not isinstance(text, str):
        return Placeholder(Global("_codecs", "encode"), (text, encoding))
    return text.encode("latin1")


PLAIN_TENSORS = (
    Global("torch", "Tensor"),
    Global("torch._tensor", "Tensor"),
    Global("torch.nn.parameter", "Parameter"),
)

TENSORS: dict[Any, Callable[..., Any]] = {
    Global("torch._utils", "_rebuild_tensor"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}

CALLS: dict[Any, Callable[..., Any]] = {
    **TENSORS,
    Global("torch._tensor", "_rebuild_from_type"): _typed,
    Global("torch._tensor", "_rebuild_from_type_v2"): _typed,
    Global("torch", "Size"): tuple,
    Global("collections", "OrderedDict"): dict,
    Global("_codecs", "encode"): _bytes,
}
"""What a call in a pickle makes, by what is called. None of these runs anything of the file's choice."""


class Unpickler(pickle._Unpickler):
    """Python's own unpickler, without those of its instructions that import, call or alter objects.

    Args:
        file: where the pickle begins; after `load`, where it ends.
        storage: makes a `Storage` from what a pickle says of it: dtype, key and number of elements.
        calls: what a call makes, by what is called.
    """

    def __init__(
        self,
        file: BinaryIO,
        storage: Callable[[torch.dtype, str, int], Storage] | None = None,
        calls: Mapping[Any, Callable[..., Any]] = CALLS,
    ) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self._storage = storage
        self._calls = calls

    def find_class(self, module: str, name: str) -> Any:
        return Global(module, name)

    def get_extension(self, code: int) -> None:
        self.append(Global("copyreg", f"extension {code}"))

    def persistent_load(self, saved: Any) -> Any:
        if self._storage is None or not isinstance(saved, tuple) or saved[0] != "storage":
            return Placeholder(Global("pickle", "persistent object"), (saved,))
        kind, key, _, count, *view = saved[1:]
        dtype = STORAGES.get(kind.name) if isinstance(kind, Global) else None
        if dtype is None or any(part is not None for part in view):
            return Placeholder(kind, saved)
        return self._storage(dtype, key, count)

    def _instantiate(self, what: Any, arguments: Any) -> None:
        if not isinstance(arguments, (tuple, list)):
            raise pickle.UnpicklingError(f"a call with {type(arguments).__name__} for arguments")
        make = self._calls.get(what) if isinstance(what, Global) else None
        self.append(make(*arguments) if make else Placeholder(what, tuple(arguments)))

    def _reduce(self) -> None:
        arguments, what = self.stack.pop(), self.stack.pop()
        self._instantiate(what, arguments)

    def _newobj_ex(self) -> None:
        keywords = self.stack.pop()
        arguments, what = self.stack.pop(), self.stack.pop()
        self.append(Placeholder(what, (arguments, keywords)))

    def _build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Placeholder):
            self.stack[-1].build(state)  # attributes of dicts and tensors are of no use here

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _reduce,
        pickle.NEWOBJ_EX[0]: _newobj_ex,
        pickle.BUILD[0]: _build,
    }
