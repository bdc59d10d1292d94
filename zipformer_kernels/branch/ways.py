"""The ways to run a residual branch, ``src + last(middle(first(src)))``, and how a call settles which.

| way | where | what it leaves out |
|---|---|---|
| one kernel | CPU, few rows | everything: one call reads the weights once, which takes the time there |
| in place | CPU | intermediate results, which are overwritten, and the sum, which the last product starts from |
| one node | GPU, also with gradients | the sum, casts, and nodes of the graph: `zipformer_kernels.branch.node` |
| in parts | CPU, also with gradients | hidden channels of all rows at once (`zipformer_kernels.branch.recompute`) |
| modules | everywhere | nothing: every module is called, as upstream calls it |

The first two are for calls without gradients. `settle` decides for all branches of a layer at once, and nothing
is asked again until the call is over. A branch that is not plain (`zipformer_kernels.branch.plain`), or has no such
way, runs by the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zipformer_kernels.branch.branch import Branch
from zipformer_kernels.branch.nodes import Nodes
from zipformer_kernels.branch.plain import NONE, parameters_of, plain_parts
from zipformer_kernels.core import backend as backends
from zipformer_kernels.core.call import autocast_dtype, unreadable, watcher
from zipformer_kernels.core.launch import CPU_DTYPES, INFERENCE_DTYPES, few_rows
from zipformer_kernels.core.op import SettledBackend

Added = tuple[Tensor, Tensor | None]
"""src plus a branch, and the next state of a stream."""


class Given(NamedTuple):
    """What a way runs a branch on.

    Attributes:
        backend: the backend that was settled, or None where each op chooses its own.
        src: (T, batch, channels).
        state: left context in a stream, or None.
        context: other arguments of the branch's forward.
        settings: its arguments by name.
        over: whether src may be overwritten.
        nodes: what the layer's nodes share, for `NODE`.
        balancer: of the branch's result, or None; likewise.
        chosen: draws which sequences of a tensor get the branch, (batch, 1), or None for all; likewise.
    """

    backend: SettledBackend | None
    src: Tensor
    state: Tensor | None
    context: tuple[Any, ...]
    settings: dict[str, Any]
    over: bool
    nodes: Nodes | None = None
    balancer: nn.Module | None = None
    chosen: Callable[[Tensor], Tensor | None] = lambda _: None


def _one_kernel(branch: Branch, given: Given) -> Added | None:
    return branch.one_kernel(given.backend, given.src, given.state, *given.context, **given.settings)


def _in_place(branch: Branch, given: Given) -> Added:
    first, last = branch.in_proj, branch.out_proj
    bias = None if branch.defers_bias else first.bias
    x, state = branch.in_place(
        given.backend, F.linear(given.src, first.weight, bias), given.state, *given.context, **given.settings
    )
    return add_product(given.src, x, last.weight, last.bias, given.over), state


def _node(branch: Branch, given: Given) -> Added | None:
    return given.nodes.add(branch, given.src, given.state, given.context, given.settings, given.balancer, given.chosen)


def _in_parts(branch: Branch, given: Given) -> Added | None:
    y = branch.in_parts(given.src, *given.context)
    return None if y is None else (y, None)


@dataclass(frozen=True)
class Way:
    """A way to run a branch.

    Attributes:
        name: as in the table above.
        dtypes: of src, that it takes.
        few: whether it is for few rows only, see `zipformer_kernels.core.launch.few_rows`.
        gradients: whether it is for calls that may have gradients, or for those that have none; None: for both.
        autocast: whether it serves under autocast.
        add: runs a branch; returns None where the branch has no such way.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    few: bool
    gradients: bool | None
    autocast: bool
    add: Callable[[Branch, Given], Added | None]


ONE_KERNEL = Way("one kernel", INFERENCE_DTYPES, True, False, False, _one_kernel)
IN_PLACE = Way("in place", INFERENCE_DTYPES, False, False, False, _in_place)
NODE = Way("one node", CPU_DTYPES, False, None, True, _node)
IN_PARTS = Way("in parts", CPU_DTYPES, False, True, False, _in_parts)

WAYS: dict[str, tuple[Way, ...]] = {"cpu": (ONE_KERNEL, IN_PLACE, IN_PARTS), "cuda": (NODE,)}
"""For each type of device its ways, the best first; where none serves, modules are called."""


class Settlement(NamedTuple):
    """How the branches of one call run.

    Attributes:
        ways: the ways to try, in order; none where modules are called.
        backend: what the ops of those ways run on; None: each chooses its own.
        fused: the names of the layer's parts whose calls may be left out.
        low: the dtype of products, that of autocast or of src, where branches may run as one node; else None.
    """

    ways: tuple[Way, ...] = ()
    backend: SettledBackend | None = None
    fused: Set[str] = NONE
    low: torch.dtype | None = None


MODULES = Settlement()


def settle(
    module: nn.Module, src: Tensor, others: Sequence[Tensor | None], when: int, masks: Sequence[Tensor | None] = ()
) -> Settlement:
    """How a module's branches run in this call, asked once.

    Args:
        module: of a class declared by `zipformer_kernels.branch.plain.made_of`.
        src: (T, batch, channels).
        others: all other tensors of the call that have to be of the dtype of src: positions, states.
        when: `When.INFERENCE`, `When.CHUNK` in a stream, or `When.ANY` for calls that may have gradients, or train.
        masks: its masks, of any dtype.
    """
    device = src.device.type
    offered = WAYS.get(device)
    if offered is None or (when and torch.is_grad_enabled()):
        return MODULES
    if watcher() is not None:
        return MODULES
    few, cast = few_rows(src), autocast_dtype(src)
    low = src.dtype if cast is None or src.dtype == torch.float64 else cast
    ways = tuple(
        way
        for way in offered
        if src.dtype in way.dtypes
        and (few or not way.few)
        and way.gradients in (None, not when)
        and (way.autocast or cast is None)
    )
    backend = settled_backend() if IN_PLACE in ways else None
    if not ways or (backend is None and IN_PLACE in ways):  # that one launches kernels itself
        return MODULES
    nodes = has_nodes(ways)
    if nodes and backends.candidates(device, ("eager",))[:1] == ("eager",):
        return MODULES
    fused = plain_parts(module, when)
    if not fused:
        return MODULES
    parameters = list(parameters_of(module, fused))
    if low != src.dtype and src.dtype != torch.float32:
        return MODULES
    if not _alike(src, [src, *parameters]) or not {x.dtype for x in others if x is not None} <= {src.dtype, low}:
        return MODULES
    if unreadable([src, *others, *parameters, *masks]) is not None:
        return MODULES
    return Settlement(ways, backend, fused, low if nodes else None)


def has_nodes(ways: Sequence[Way]) -> bool:
    """Whether branches may run as one node."""
    return any(way.name == NODE.name for way in ways)


def settled_backend() -> SettledBackend | None:
    """The backend for ways on the CPU: the best there is, or the one asked for; None where that is another's."""
    request = backends.requested()
    if request == "auto":
        return _ON_CPU.get(backends.serving["cpu"][0])
    names = request.split(",")
    return _ON_CPU.get(next((name for name in names if backends.unserved_device(name, "cpu") is None), None))


_ON_CPU = {name: SettledBackend(name) for name in ("cpu", "eager")}


def only_computes(x: Tensor, *others: Tensor) -> bool:
    """Whether a call on x, and on others that it reads itself, may overwrite its results, as `IN_PLACE` does."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype not in IN_PLACE.dtypes:
        return False
    given = x, *others
    return watcher() is None and autocast_dtype(x) is None and _alike(x, given) and unreadable(given) is None


def _alike(src: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Whether all are of the dtype of src."""
    return {x.dtype for x in tensors if x is not None} == {src.dtype}


def add_product(src: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, over: bool) -> Tensor:
    """src + x W^T + b, in a new tensor or in that of src.

    Args:
        src: (..., out_channels).
        x: (..., in_channels), of as many rows.
        weight: (out_channels, in_channels).
        bias: (out_channels,), or None.
        over: whether the result may replace src.
    """
    if over and src.is_contiguous():
        out = src if bias is None else src.add_(bias)
    else:
        out = src.clone(memory_format=torch.contiguous_format) if bias is None else torch.add(src, bias).contiguous()
    out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    return out
