"""What every op must do, written once. `test_contract.py` asks it of each op on each lane, on the op's cases.

An op is found by its name, and its arguments are those of its cases. What is special to it stands in ``test_<op>.py``,
which may define

- ``assert_matches(args, y, dy, grads, backend)``: holds a result and its gradients, by position of the argument,
  against the op's formula in float64, with bounds made for it; by default `assert_matches_reference`;
- ``call(args)``: the public function for the op's arguments; by default the op itself, which checks nothing.

All memory is poisoned (`poison.py`), so that what a kernel leaves unwritten is NaN in every one of these tests.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lanes import ISAS, Lane
from torch import Tensor

from zipformer_kernels import ops
from zipformer_kernels.core import backend
from zipformer_kernels.core.op import Op
from zipformer_kernels.ops.cases import Case

NAMES = [name for name in ops.names() if isinstance(ops.get(name), Op)]
ENOUGH = 60  # elements of a case's largest tensor, so that it has more than one of everything

# Relative to the norm of the float64 result. Half precision rounds operands to the dtype before they enter a product.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}

Args = Sequence[Any]
Gradients = dict[int, Tensor]


def relative(actual: Tensor, expected: Tensor, floor: float = 1e-12) -> float:
    """The error's norm over that of the expected tensor, or over `floor` where that is larger."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    return ((actual - expected).norm() / max(expected.norm().item(), floor)).item()


def wide(args: Args) -> list[Any]:
    """The arguments on the CPU and in float64."""
    return [torch.float64 if isinstance(x, torch.dtype) else _wide(x) if torch.is_tensor(x) else x for x in args]


def _wide(x: Tensor) -> Tensor:
    return x.detach().double().cpu().requires_grad_(x.requires_grad) if x.is_floating_point() else x.cpu()


def leaves(args: Args) -> list[int]:
    """Positions of the arguments that require a gradient."""
    return [i for i, x in enumerate(args) if torch.is_tensor(x) and x.requires_grad]


def run(call: Callable[[Args], Tensor], args: Args, dy: Tensor | None = None) -> tuple[Tensor, Tensor, Gradients]:
    """The result, a gradient for it, and those of the arguments that require one."""
    y = call(args)
    dy = torch.randn_like(y) if dy is None else dy
    wanted = leaves(args)
    found = torch.autograd.grad(y, [args[i] for i in wanted], dy) if wanted else ()
    return y, dy, dict(zip(wanted, found, strict=True))


def assert_matches_reference(op: Op, args: Args, y: Tensor, dy: Tensor, grads: Gradients, backend: str) -> None:
    """Within `TOLERANCE` of the op's reference in float64, in the Euclidean norm."""
    exact, _, expected = run(lambda args: op.reference(*args), wide(args), dy.detach().double().cpu())
    assert relative(y, exact) < TOLERANCE[y.dtype]
    floor = 0.1 * dy.double().norm().item()  # of a gradient that vanishes only rounding is left
    for i, grad in grads.items():
        assert grad.dtype == args[i].dtype
        assert relative(grad, expected[i], floor) < 3 * TOLERANCE[y.dtype], f"gradient of argument {i}"


@dataclass(frozen=True)
class Contract:
    """One op, and what is special to it."""

    name: str
    op: Op
    cases: tuple[Case, ...]
    call: Callable[[Args], Tensor]
    assert_matches: Callable[..., None]

    @property
    def operator(self) -> Any:
        """What torch.compile sees in place of the op."""
        return getattr(torch.ops.zipformer_kernels, self.name).default

    @property
    def names(self) -> list[str]:
        """Of the op's arguments."""
        return [argument.name for argument in self.operator._schema.arguments[:-1]]

    @property
    def takes_what_it_computed(self) -> bool:
        """Whether an argument was computed from the others, which then cannot be changed alone."""
        return "softmax" in self.names

    def check(self, args: Args, lane: Lane, dy: Tensor | None = None) -> tuple[Tensor, Tensor, Gradients]:
        """`run` on a lane, held against float64."""
        with lane.active():
            y, dy, grads = run(self.call, args, dy)
        self.assert_matches(args, y, dy, grads, lane.backend)
        return y, dy, grads

    @functools.cached_property
    def kinds(self) -> list[Case]:
        """A small case for each kind of arguments: which are there, and of how many dimensions. The fullest first."""
        found: dict[tuple, tuple[tuple, Case]] = {}
        for case in self.cases:
            args = case.inputs(torch.float32, "cpu")
            tensors = [x for x in args if torch.is_tensor(x)]
            kind = tuple(x.ndim if torch.is_tensor(x) else None for x in args)
            size = max(x.numel() for x in tensors)
            if min(x.numel() for x in tensors) == 0:
                continue
            rank = (size < ENOUGH, abs(size - ENOUGH))
            if kind not in found or rank < found[kind][0]:
                found[kind] = rank, case
        fullness = {kind: sum(n is not None for n in kind) for kind in found}
        return [found[kind][1] for kind in sorted(found, key=lambda kind: -fullness[kind])]

    @property
    def extremes(self) -> list[Case]:
        """The fullest kind, and the barest if there are several."""
        return self.kinds[:1] + self.kinds[1:][-1:]


@functools.cache
def contract(name: str) -> Contract:
    """The contract of an op."""
    op = ops.get(name)
    cases = importlib.import_module(f"{ops.__name__}.{name}.cases").CASES
    own = importlib.import_module(f"test_{name}") if importlib.util.find_spec(f"test_{name}") else None
    call = getattr(own, "call", lambda args: op(*args))
    matches = getattr(own, "assert_matches", functools.partial(assert_matches_reference, op))
    return Contract(name, op, tuple(case for case in cases if not case.large), call, matches)


# ---- layouts ----


def sliced(x: Tensor) -> tuple[Tensor, Tensor]:
    """The inside of a larger tensor, not aligned to 16 bytes."""
    block = torch.full([n + 3 for n in x.shape] or [3], 7, device=x.device, dtype=x.dtype)
    return block, block[tuple(slice(1, 1 + n) for n in x.shape)] if x.ndim else block[1]


def spaced(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every second element of a larger tensor."""
    block = torch.full((*x.shape, 2), 7, device=x.device, dtype=x.dtype)
    return block, block[..., 1]


def turned(x: Tensor) -> tuple[Tensor, Tensor]:
    """Its dimensions in reverse order in memory."""
    block = torch.full(x.shape[::-1], 7, device=x.device, dtype=x.dtype)
    return block, block.permute(list(range(x.ndim - 1, -1, -1)))


LAYOUTS = {"sliced": sliced, "spaced": spaced, "turned": turned}


def laid_out(args: Args, layout: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[list[Any], list[Tensor]]:
    """The same arguments in another layout, and the memory in which they lie."""
    made, blocks = [], []
    for x in args:
        if torch.is_tensor(x):
            block, view = layout(x)
            view.copy_(x.detach())
            blocks.append(block)
            x = view.detach().requires_grad_(x.requires_grad)
        made.append(x)
    return made, blocks


def expanded(args: Args, dim: int) -> list[Any]:
    """The arguments with one element of a dimension, where they have it, repeated all along it."""
    return [
        x.detach().narrow(dim, 0, 1).expand(x.shape).requires_grad_(x.requires_grad)
        if torch.is_tensor(x) and x.ndim > dim
        else x
        for x in args
    ]


def frozen(args: Args, wanted: Sequence[int]) -> list[Any]:
    """The arguments, of which only the wanted require a gradient."""
    return [x.detach().requires_grad_(i in wanted) if i in leaves(args) else x for i, x in enumerate(args)]


def subsets(positions: Sequence[int]) -> Iterator[list[int]]:
    """None, each alone, and all but each."""
    yield []
    yield from ([i] for i in positions)
    if len(positions) > 2:
        yield from ([i for i in positions if i != left] for left in positions)


# ---- instruction sets ----


def ways(op: Op) -> list:
    """A pytest parameter for each way in which an op runs: its backends, that of the CPU on each instruction set."""
    names = [name for name in backend.BACKENDS if name in op.backends]
    sets = [("cpu", isa) for isa in ISAS]
    every = [way for name in names for way in (sets if name == "cpu" else [(name, None)])]
    return [pytest.param(Lane(name), isa, id="-".join(filter(None, (name, isa)))) for name, isa in every]
