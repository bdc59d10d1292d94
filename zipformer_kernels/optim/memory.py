"""Where the tensors of a step lie: kernels write through addresses, so none may reach out of its storage.

Only sizes, strides and addresses are looked at, never values: nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.nn import Parameter


def check_memory(tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """Checks that tensors which a step writes lie within their storages, and apart.

    Args:
        tensors: plain, strided, with storage.
        names: theirs, for messages.
    Raises:
        ValueError: an element lies outside of its tensor's storage, or two elements in one place.
    """
    spans = []
    for i, (x, name) in enumerate(zip(tensors, names, strict=True)):
        if x.numel() == 0:
            continue
        check_within(x, name)
        spans.append((*_span(x), i))
    spans.sort()
    cluster: list[int] = []  # tensors whose spans touch
    reach = 0
    for begin, end, i in spans:
        if begin >= reach:
            _check_apart(cluster, tensors, names)
            cluster = []
        cluster.append(i)
        reach = max(reach, end)
    _check_apart(cluster, tensors, names)


def check_within(x: Tensor, name: str) -> None:
    """Checks that a tensor lies within its storage, if it is plain and has one. Raises ValueError."""
    if type(x) not in (Tensor, Parameter) or x.is_meta or x._is_zerotensor():
        return
    begin, end = _span(x)
    wanted, found = end - begin + x.storage_offset() * x.element_size(), x.untyped_storage().nbytes()
    if wanted > found and x.numel() > 0:
        raise ValueError(f"{name} must lie within its storage: it needs {wanted} bytes, got {found}")


def _span(x: Tensor) -> tuple[int, int]:
    """The address of the first byte of x and the one after its last."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + elements * x.element_size()


def _check_apart(cluster: list[int], tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """Checks that no two elements of some tensors share a byte."""
    if len(cluster) == 0 or (len(cluster) == 1 and _distinct(tensors[cluster[0]])):
        return
    owners = _touching(cluster, tensors) or _sharing(cluster, tensors)
    if owners is None:
        return
    first, second = (names[i] for i in owners)
    if first == second:
        raise ValueError(f"{first} must have each element in a place of its own, got strides that make some share one")
    raise ValueError(f"{first} and {second} must lie apart, got tensors that share memory: tie them as one Parameter")


def _touching(cluster: list[int], tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Two tensors without holes whose spans overlap, if any; `cluster` is in the order of their first bytes."""
    last, reach = None, 0
    for i in cluster:
        begin, end = _span(tensors[i])
        if end - begin != tensors[i].numel() * tensors[i].element_size():
            continue
        if last is not None and begin < reach:
            return last, i
        last, reach = i, end
    return None


def _sharing(cluster: list[int], tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The owners of two elements in one place, if any. Tensors may interleave, as columns of one matrix do."""
    places = [_bytes(tensors[i]) for i in cluster]
    owner = np.repeat(cluster, [len(place) for place in places])
    place = np.concatenate(places)
    order = np.argsort(place, kind="stable")
    twice = np.flatnonzero(np.diff(place[order]) == 0)
    return None if len(twice) == 0 else tuple(owner[order[twice[0] : twice[0] + 2]])


def _distinct(x: Tensor) -> bool:
    """Whether strides alone show that no two elements of x share a place."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def _bytes(x: Tensor) -> np.ndarray:
    """The addresses of all bytes of x."""
    places = np.full(1, x.data_ptr(), np.int64)
    for size, stride in (*zip(x.shape, x.stride(), strict=True), (x.element_size(), None)):
        step = 1 if stride is None else stride * x.element_size()
        places = np.add.outer(places, np.arange(size) * step).reshape(-1)
    return places
