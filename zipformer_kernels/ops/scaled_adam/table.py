"""The tensors of a step as kernels read them: a table of 64-bit words, one row a tensor and one a group.

Its layout is that of ``AdamTensor`` and ``AdamGroup`` in ``csrc/scaled_adam/scaled_adam.h``. Rows point at where
parameters, gradients and state lie; a tensor's elements are taken in chunks, numbered through all tensors, and
one block or thread works on one chunk.

On a GPU the table lies in device memory. It is sent there from pinned memory whenever a word of it changed, as
gradients move and learning rates fall: a copy that nobody waits for. In a captured CUDA graph the copy is part of
the graph, and what it copies from and to is held for as long as the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from zipformer_kernels.core.launch import DTYPE_CODES
from zipformer_kernels.ops.scaled_adam.reference import Group, Statistics

TENSOR_COLUMNS = ("p", "g", "v", "m", "numel", "first_chunk", "group", "p_dtype", "g_dtype")
GROUP_COUNTS = ("dtype", "first_tensor", "count", "size_period", "clipping_period")
GROUP_POINTERS = (
    "step",
    "skipped",
    "clipped",
    "norms",
    "threshold",
    "rms",
    "scale_exp_avg_sq",
    "scale_grads",
    "contributions",
    "numel",
    "single",
    "lr_tensor",
)
GROUP_OPTIONS = (
    "lr",
    "clipping_scale",
    "beta1",
    "beta2",
    "scalar_lr_scale",
    "eps",
    "param_min_rms",
    "param_max_rms",
    "scalar_max",
)
GROUP_COLUMNS = (*GROUP_COUNTS, *GROUP_POINTERS, *GROUP_OPTIONS)
SUMS = 3  # of p^2, p g, g^2
TENSOR_PLAN = 2  # numbers that pass 2 hands to pass 3 of each tensor ...
GROUP_PLAN = 3  # ... and of each group

_GROUP_ROW = np.dtype([(name, np.float64 if name in GROUP_OPTIONS else np.int64) for name in GROUP_COLUMNS], align=True)


def first_chunks(sizes: Sequence[int], chunk_elements: int) -> tuple[np.ndarray, int]:
    """The number of each tensor's first chunk, and the number of chunks; an empty tensor has none."""
    counts = -(-np.asarray(sizes, dtype=np.int64) // chunk_elements)
    ends = np.cumsum(counts)
    return ends - counts, int(ends[-1])


class Table:
    """The table of one list of groups, and the memory that their steps need besides.

    Args:
        groups: the groups of a step, all on one device.
        chunk_elements: elements of a chunk.
        real: dtype of sums and plans.

    Attributes:
        tensors, groups, chunks: how many there are.
        partials: (3 chunks,) sums of p^2, p g, g^2 over chunks.
        sums: (3, tensors), the same over tensors.
        plans: what pass 2 tells pass 3: of each tensor a and move, of each group ok, c / K and k.
    """

    def __init__(self, groups: Sequence[Group], chunk_elements: int, real: torch.dtype) -> None:
        self.device = groups[0].statistics.rms.device
        self.chunk_elements = chunk_elements
        self.tensors = sum(len(group.params) for group in groups)
        self.groups = len(groups)
        self._statistics = [group.statistics for group in groups]
        params = [p for group in groups for p in group.params]
        self._moments = [v for group in groups for v in group.exp_avg_sq]
        self._copied = [i for i, (p, v) in enumerate(zip(params, self._moments, strict=True)) if _strides_differ(p, v)]
        sizes = [v.numel() for v in self._moments]

        split = self.tensors * len(TENSOR_COLUMNS)
        self._words = np.zeros(split + self.groups * len(GROUP_COLUMNS), np.int64)
        self._rows = self._words[:split].reshape(self.tensors, -1)
        self._group_rows = self._words[split:].view(_GROUP_ROW)
        starts, self.chunks = first_chunks(sizes, chunk_elements)
        self._column("v", [v.data_ptr() for v in self._moments])
        self._column("m", [m.data_ptr() for group in groups for m in group.delta])
        self._column("p_dtype", [DTYPE_CODES[p.dtype] for p in params])
        self._column("numel", sizes)
        self._column("first_chunk", starts)
        self._column("group", [k for k, group in enumerate(groups) for _ in group.params])
        first = 0
        for row, group in zip(self._group_rows, groups, strict=True):
            _describe(row, group.statistics, first)
            first += len(group.params)

        floats = {"dtype": real, "device": self.device}
        self.sums = torch.empty(SUMS, self.tensors, **floats)
        self.partials = torch.empty(SUMS * self.chunks, **floats)
        self.plans = torch.empty(TENSOR_PLAN * self.tensors + GROUP_PLAN * self.groups, **floats)
        self._sent: np.ndarray | None = None
        self._sent_to: Tensor | None = None
        self._spare: Tensor | None = None
        self._captured: list[tuple[Tensor, Tensor]] = []

    def fits(self, groups: Sequence[Group]) -> bool:
        """Whether these are the groups that the table was made for."""
        return len(groups) == len(self._statistics) and all(
            group.statistics is statistics for group, statistics in zip(groups, self._statistics, strict=True)
        )

    def enter(self, groups: Sequence[Group]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Enters where parameters and gradients lie now, and the options of the groups.

        Returns:
            Tensors to hold until the step is launched, and pairs of parameters with other strides than their
            moments and the copies that the step moves in their stead.
        """
        places = np.concatenate([_places(group) for group in groups], axis=1)
        copies = self._copies(groups)
        for i, (_, copy) in zip(self._copied, copies, strict=True):
            places[0, i] = copy.data_ptr()
        self._column("p", places[0])
        self._column("g", places[1])
        self._column("g_dtype", self._codes(groups))
        held: list[Tensor] = []
        for row, group in zip(self._group_rows, groups, strict=True):
            held.extend(_enter_options(row, group))
        return held, copies

    def _copies(self, groups: Sequence[Group]) -> list[tuple[Tensor, Tensor]]:
        """The parameters with other strides than their moments, and copies of them with the moments' strides."""
        if not self._copied:
            return []
        params = [p for group in groups for p in group.params]
        shaped = [(params[i], torch.empty_like(self._moments[i], dtype=params[i].dtype)) for i in self._copied]
        return [(p, copy.copy_(p)) for p, copy in shaped]

    @staticmethod
    def _codes(groups: Sequence[Group]) -> int | list[int]:
        """The codes of the gradients' dtypes; of no matter where there is no gradient."""
        dtypes = set().union(*(group.dtypes for group in groups))
        if len(dtypes) == 1:
            return DTYPE_CODES[dtypes.pop()]
        return [0 if g is None else DTYPE_CODES[g.dtype] for group in groups for g in group.grads]

    def arguments(self) -> tuple[int, ...]:
        """What compiled kernels are given first: addresses and counts of the rows of tensors and of groups, chunks and
        their size, partials, sums, plans. Sends the table to its device if need be.
        """
        words = self.words()
        tensors = words.data_ptr()
        return (
            tensors,
            self.tensors,
            tensors + self._rows.nbytes,
            self.groups,
            self.chunks,
            self.chunk_elements,
            self.partials.data_ptr(),
            self.sums.data_ptr(),
            self.plans.data_ptr(),
        )

    def words(self) -> Tensor:
        """The table on its device: the rows of the tensors, then those of the groups."""
        host = torch.from_numpy(self._words)
        if self.device.type != "cuda":
            return host
        if torch.cuda.is_current_stream_capturing():
            return self._captured_words(host)
        if self._spare is None:
            self._spare = torch.empty_like(host, pin_memory=True)
        if self._sent is None or not np.array_equal(self._sent, self._words):
            self._sent = self._words.copy()
            # The pinned copy may go at once: torch reuses its memory only after the transfer.
            self._sent_to = host.pin_memory().to(self.device, non_blocking=True)
        return self._sent_to

    def _captured_words(self, host: Tensor) -> Tensor:
        if self._spare is None:
            raise RuntimeError("step must run once outside of CUDA graphs before each capture of it")
        pinned, self._spare = self._spare, None
        pinned.copy_(host)
        words = torch.empty_like(host, device=self.device)
        words.copy_(pinned, non_blocking=True)
        self._captured.append((pinned, words))
        return words

    def _column(self, name: str, values: int | Sequence[int] | np.ndarray) -> None:
        self._rows[:, TENSOR_COLUMNS.index(name)] = values


def run(
    groups: Sequence[Group],
    reduce: Callable[[Tensor], None] | None,
    loss_scale: Tensor | None,
    found_inf: Tensor | None,
    tables: dict[tuple, Table],
    chunk_elements: int,
    real: torch.dtype,
    launch: Callable[[str, Table, Tensor | None, Tensor | None], None],
) -> None:
    """One step of a backend whose kernels read a `Table`.

    Args:
        groups: all on one device.
        reduce, loss_scale, found_inf: see `zipformer_kernels.ops.scaled_adam.step`.
        tables: tables of earlier steps, by `chunk_elements` and `real`; updated.
        chunk_elements, real: see `Table`.
        launch: ``(pass, table, loss_scale, found_inf)`` launches one pass: ``partials`` (sums over chunks),
            ``sums`` (of those, over tensors), ``plan``, ``update``.
    """
    table = tables.get((chunk_elements, real))
    if table is None or not table.fits(groups):
        table = tables[chunk_elements, real] = Table(groups, chunk_elements, real)
    held, copies = table.enter(groups)
    loss_scale, found_inf = (
        None if x is None else x.reshape(()).to(table.device, torch.float32, non_blocking=True)
        for x in (loss_scale, found_inf)
    )
    for name in ("partials", "sums"):
        launch(name, table, loss_scale, found_inf)
    if reduce is not None:
        reduce(table.sums)
    for name in ("plan", "update"):
        launch(name, table, loss_scale, found_inf)
    for p, copy in copies:
        p.copy_(copy)
    for group in groups:
        torch.autograd.graph.increment_version(group.params)
    del held  # the launches are on the stream: memory may be reused behind them


def _places(group: Group) -> np.ndarray:
    """(2, N) where the parameters and the gradients of a group lie; 0 for a missing one."""
    if group.places is not None:
        return group.places
    return np.array([[0 if x is None else x.data_ptr() for x in row] for row in (group.params, group.grads)], np.int64)


def _strides_differ(p: Tensor, v: Tensor) -> bool:
    """Whether the elements of p and v, of one shape, lie in another order, or with other gaps."""
    return p.stride() != v.stride() and not (p.is_contiguous() and v.is_contiguous())


def _describe(row: np.void, statistics: Statistics, first_tensor: int) -> None:
    """Enters what stays of one group."""
    row["dtype"] = DTYPE_CODES[statistics.rms.dtype]
    row["first_tensor"] = first_tensor
    row["count"] = len(statistics.rms)
    row["size_period"] = len(statistics.scale_grads)
    row["clipping_period"] = len(statistics.norms)
    for name in GROUP_POINTERS[:-1]:
        row[name] = getattr(statistics, name).data_ptr()


def _enter_options(row: np.void, group: Group) -> list[Tensor]:
    """Enters what may change of one group; returns what the row points at."""
    hyper, held = group.hyper, []
    row["lr_tensor"] = 0
    rms = group.statistics.rms
    if not isinstance(hyper.lr, Tensor):
        row["lr"] = hyper.lr
    elif hyper.lr.device.type == "cpu" and rms.is_cuda:
        row["lr"] = float(hyper.lr)
    else:
        lr = hyper.lr.to(rms.device, rms.dtype, non_blocking=True)
        row["lr"], row["lr_tensor"] = math.nan, lr.data_ptr()
        held.append(lr)
    row["clipping_scale"] = hyper.clipping_scale or 0.0
    row["beta1"], row["beta2"] = hyper.betas
    for name in GROUP_OPTIONS[4:]:
        row[name] = getattr(hyper, name)
    return held
