"""The parameters of a group, their state and their gradients: whether all are as they were, and where they lie.

Kernels read and write through addresses that stand in a table, and take the elements of a parameter, its gradient and
its moments in one order. So a tensor that has come to another memory, dtype, device, size, stride or class must be seen
before every step. Preset L has 3,452 of them, and Python takes a microsecond to ask them once: the compiled module
(``csrc/scaled_adam/rows.h``) visits each once, where torch has DLPack's table of functions for C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zipformer_kernels.core import backend
from zipformer_kernels.core.call import LOWEST, PLAIN
from zipformer_kernels.optim.shards import is_sharded, local

MOMENTS = ("exp_avg_sq", "delta")

_EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # since torch 2.10


@dataclass
class Look:
    """What a look at a group found.

    Attributes:
        grads: a gradient for each parameter, or None.
        odd: the places of those that are not plain tensors of their parameter's dtype and device and the moments'
            strides, or whose memory cannot be read as it is.
        places: (2, N) where parameters and gradients lie; 0 where there is none, and for odd ones.
    """

    grads: list[Tensor | None]
    odd: list[int]
    places: np.ndarray


class Rows:
    """The rows of a group in Python.

    Args:
        params: the parameters; where they are DTensors, this process's shards of them are looked at.
        entries: the state of each, which has `MOMENTS`.
        readable: whether kernels may take the addresses of all. Else none is looked at, and all gradients are odd.
    """

    def __init__(self, params: list[Tensor], entries: list[dict[str, Any]], readable: bool) -> None:
        self._params, self._entries, self._readable = params, entries, readable
        self._values = _values(entries)
        self._forms = list(map(_form, params))
        self._strides = [local(entry[MOMENTS[0]]).stride() for entry in entries]
        self._moments = self._moments_now()

    def look(self, params: list[Tensor]) -> Look | None:
        """What is found; or None if these are not the parameters, or they or their state are not as they were, but for
        where parameters lie.
        """
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            return None
        values = _values(self._entries)
        if len(values) != len(self._values) or not all(map(is_, values, self._values)):
            return None
        if list(map(_form, params)) != self._forms or self._moments_now() != self._moments:
            return None
        grads = [p.grad for p in params]
        if not self._readable:
            return Look(grads, list(range(len(grads))), np.zeros((2, len(grads)), np.int64))
        found = list(map(self._address_of_gradient, grads, self._forms, self._strides))
        odd = [i for i, address in enumerate(found) if address is None]
        return Look(grads, odd, np.array([[local(p).data_ptr() for p in params], [a or 0 for a in found]], np.int64))

    def _moments_now(self) -> list[int]:
        if not self._readable:
            return []
        return [local(entry[name]).data_ptr() for entry in self._entries for name in MOMENTS]

    @staticmethod
    def _address_of_gradient(g: Tensor | None, form: Sequence[Any], strides: tuple[int, ...]) -> int | None:
        """Where g lies, or None if it is odd."""
        if g is None:
            return 0
        _, dtype, device, sizes, _ = form
        if type(g) not in PLAIN or g.layout is not torch.strided or g.dtype is not dtype or g.device != device:
            return None
        if g.size() != sizes or g.stride() != strides or g.is_neg():
            return None
        try:
            address = g.data_ptr()
        except RuntimeError:  # it has no memory
            return None
        return address if address >= LOWEST or g.numel() == 0 else None


class _NativeRows:
    """The same, for plain parameters and state, by the compiled module."""

    def __init__(self, params: list[Tensor], entries: list[dict[str, Any]]) -> None:
        self._rows = backend.native.AdamRows(_EXCHANGE, params, entries, MOMENTS, tuple(PLAIN), Tensor.is_neg)

    def look(self, params: list[Tensor]) -> Look | None:
        found = Look([], [], np.empty((2, len(params)), np.int64))
        p_places, g_places = (row.ctypes.data for row in found.places)
        return found if self._rows.look(params, p_places, g_places, found.grads, found.odd) else None


def rows_of(params: list[Tensor], entries: list[dict[str, Any]], readable: bool) -> Rows | _NativeRows:
    """The rows of a group; see `Rows`."""
    if readable and _EXCHANGE is not None and hasattr(backend.native, "AdamRows") and not any(map(is_sharded, params)):
        return _NativeRows(params, entries)
    return Rows(params, entries, readable)


def _values(dicts: Sequence[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dicts)))


def _form(p: Tensor) -> tuple[Any, ...]:
    x = local(p)
    return type(p), x.dtype, x.device, x.size(), x.stride()


def same_values(state: dict[Any, Any], values: list[Any]) -> bool:
    """Whether the values of a dict are still these objects."""
    if hasattr(backend.native, "same_values"):
        return backend.native.same_values(state, values)
    return len(state) == len(values) and all(map(is_, state.values(), values))
