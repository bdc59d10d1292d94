"""Runs a model or an op as on a GPU, without one and without computing: every launch is recorded, none is made.

Tensors are allocated on the CPU and never filled, which costs no memory until somebody writes to it. PyTorch's
operations get results of the right shape and nothing in them; Triton kernels are compiled with the specialisation that
the launch would give them; the module with the CUDA kernels is linked to recorder.cpp in place of CUDA's runtime. What
looks at numbers gets True for a comparison, and 0.

The package is told that tensors of the CPU are a GPU's, so import it after this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

from benchmarks.gpu.pretending import TARGET, as_on_a_gpu, everywhere  # before the package
from zipformer_kernels.branch.products.plain import multiplies_widely
from zipformer_kernels.core import launch

ROOT = Path(__file__).parents[2]
OBJECTS = ROOT / "build/objects"  # of all builds in a checkout
FEW = 8  # elements of results that a program may look at: they are zeros


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kind: ``torch``, ``triton`` or ``cuda``.
        name: of PyTorch's operation; of a Triton kernel, such as ``attention.delta_kernel``; of a CUDA kernel, mangled.
        bytes: of the tensors that it is given, and of those that it makes. Of the CUDA kernels that one call launches
            the first has them all.
        flops: of PyTorch's operation, where it is a product.
        of_scores: whether PyTorch's operation takes or makes a tensor with a score for each pair of frames.
        grid: blocks.
        threads: of a block.
        shared: dynamic shared memory of a block, bytes.
        call: of a CUDA kernel, what of the compiled module launched it, such as ``swoosh_forward``.
        numbers: the arguments that are no tensors, by name; of a CUDA kernel those of the call that launched it, the
            tensors' addresses among them.
        compiled: the compiled Triton kernel.
    """

    kind: str
    name: str
    bytes: int = 0
    flops: int = 0
    of_scores: bool = False
    grid: tuple[int, int, int] = (1, 1, 1)
    threads: int = 0
    shared: int = 0
    call: str = ""
    numbers: dict[str, Any] = field(default_factory=dict, compare=False)
    compiled: Any = field(default=None, compare=False, repr=False)

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


class _Native:
    """The compiled module; what its functions launch goes to `record`.

    Attributes:
        addresses: bytes of the tensors whose addresses were taken since the last call, by address.
    """

    def __init__(self, module: ModuleType, record: Any) -> None:
        self._module, self._record = module, record
        self.build = module.build | {"emulated": True}  # else it asks for a GPU
        self.addresses: dict[int, int] = {}
        library = ctypes.CDLL(module.__file__)
        library.record_launches(True)
        self._drain = library.recorded_launches
        self._drain.restype = ctypes.c_char_p

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if not name.endswith("_cuda"):
            return found

        def call(*args: Any, **named: Any) -> None:
            found(*args, **named)
            numbers = dict(zip(self._module.fields[name], args, strict=False)) | named
            moved = sum(self.addresses.get(x, 0) for x in set(tree_flatten(list(numbers.values()))[0]))
            self.addresses.clear()
            for line in self._drain().decode().splitlines():
                kernel, *sizes = line.split()
                x, y, z, threads_x, threads_y, threads_z, shared = map(int, sizes)
                launched = {"threads": threads_x * threads_y * threads_z, "shared": shared, "grid": (x, y, z)}
                self._record(
                    Launch("cuda", kernel, moved, **launched, call=name.removesuffix("_cuda"), numbers=numbers)
                )
                moved = 0

        return call


class _Uncomputed(TorchDispatchMode):
    """Results of the right shape, with nothing in them, for every operation of PyTorch."""

    def __init__(self, record: Any) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        schema, name = operation._schema, operation._schema.name.removeprefix("aten::")
        if makes_no_launch(operation):
            return operation(*args, **kwargs)
        if name == "_local_scalar_dense":
            return True if args[0].dtype == torch.bool else 0
        if name == "equal":
            return True
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if schema.is_mutable:
            changed = [
                kwargs[a.name] if a.name in kwargs else args[i]
                for i, a in enumerate(schema.arguments)
                if a.alias_info is not None and a.alias_info.is_write and (a.name in kwargs or i < len(args))
            ]
            result, made = self._mutated(schema, changed), tree_flatten(changed)[0]
            if name in ("copy_", "fill_", "zero_"):
                given = given[1:]
        else:
            if name == "_softmax" and args[0].dtype == torch.bfloat16:  # autocast on a GPU, unlike that on a CPU
                wide = self.__torch_dispatch__(torch.ops.aten._to_copy.default, (), args[:1], {"dtype": torch.float32})
                return self.__torch_dispatch__(operation, (), (wide, *args[1:]), kwargs)
            result = self._shaped(operation, args, kwargs)
            made = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
        product = name in ("mm", "addmm", "bmm", "baddbmm")  # convolutions here are depthwise: their bytes count
        flops = flop_registry[operation.overloadpacket](*args, **kwargs, out_val=result) if product else 0
        of_scores = name == "bmm" or any(x.ndim == 4 and min(x.shape[2:]) >= 100 for x in (*given, *made))
        self.record(Launch("torch", name, sum(map(extent, (*given, *made))), flops, of_scores))
        return result

    @staticmethod
    def _mutated(schema: Any, changed: list) -> Any:
        """What an operation in place returns: what it has changed."""
        return None if not schema.returns else changed[0] if len(schema.returns) == 1 else tuple(changed)

    @staticmethod
    def _shaped(operation: Any, args: tuple, kwargs: dict) -> Any:
        """An operation's results, shaped as device meta has them."""

        def absent(x: Any) -> Any:
            if isinstance(x, Tensor):
                return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
            return torch.device("meta") if isinstance(x, torch.device) else x

        def unfilled(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
            return made.zero_() if x.numel() <= FEW else made

        if any(a.name == "device" for a in operation._schema.arguments):
            kwargs = {**kwargs, "device": torch.device("meta")}
        return tree_map(unfilled, operation(*tree_map(absent, args), **tree_map(absent, kwargs)))


def makes_no_launch(operation: Any) -> bool:
    """Whether an operation only looks at a tensor in another way, allocates one, or computes on the host."""
    schema = operation._schema
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    name = schema.name.removeprefix("aten::")
    return view or "empty" in name or name in ("_unsafe_view", "lift_fresh", "promote_types", "result_type")


def extent(x: Tensor) -> int:
    """Bytes of the memory that a tensor's elements lie in: those that it repeats count once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride != 0 or size == 0 else 1
    return count * x.element_size()


def build_module() -> Path:
    """The compiled module with CUDA kernels for all targets, linked to recorder.cpp; compiles what changed.

    Its objects are those of the module that is compiled for tests (tests/compiled.py), and so it has that one's name.

    Raises:
        RuntimeError: nvcc does not compile for `TARGET`, or a compiler failed.
    """
    build = csrc_build()
    targets, reason = build.cuda_plan(every=True)
    if not any(target.startswith(TARGET) for target in targets):
        raise RuntimeError(reason or f"CUDA kernels are compiled for {', '.join(targets)}, not for {TARGET}")
    plan = build.module_plan("_all_targets", targets)
    plan.compile(Path(__file__).with_name("recorder.cpp"), [f"-I{build.cuda_home(build.nvcc())}/include"])
    output = ROOT / "build/recorder/_all_targets.so"
    plan.run(output, OBJECTS, ["-shared", "-fopenmp"])
    return output


def cuda_objects(*ops: str) -> Iterator[tuple[str, Path]]:
    """Ops, if none is given all of them, and the objects with their CUDA kernels, which `build_module` has compiled."""
    suffix = "_".join(csrc_build().cuda_plan(every=True)[0])
    for path in sorted(OBJECTS.glob(f"csrc_*_{suffix}.o")):
        found = re.match(r"csrc_(\w+?)_cuda", path.name)
        if found and (not ops or found[1] in ops):
            yield found[1], path


def csrc_build() -> ModuleType:
    """csrc/build.py, imported."""
    return _load("zipformer_kernels_build", ROOT / "csrc/build.py")


def load_module(path: Path) -> ModuleType:
    """The module that `build_module` made."""
    return _load("_all_targets", path)


def silent(module: ModuleType) -> SimpleNamespace:
    """The module of `load_module` for `as_on_a_gpu`: its kernels are launched by nobody, and nobody notes it."""
    ctypes.CDLL(module.__file__).record_launches(False)
    return SimpleNamespace(**vars(module) | {"build": module.build | {"emulated": True}})  # else it asks for a GPU


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def recording(native: ModuleType | None = None, target: str = TARGET) -> Iterator[list[Launch]]:
    """Within the block nothing is computed; yields the list that the launches go to.

    The package chooses backends as on a GPU: CUDA kernels, Triton, PyTorch. Afterwards Triton goes on to compile for
    the same target.

    Args:
        native: the module of `load_module`; without it there are no CUDA kernels.
        target: the compute capability that Triton compiles for.
    """
    launches: list[Launch] = []
    run, pointer = JITFunction.run, launch.pointer

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        numbers = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
        tensors = {x.data_ptr(): x for x in given.values() if isinstance(x, Tensor)}
        launches.append(
            Launch(
                "triton",
                f"{self.fn.__module__.split('.')[2]}.{self.fn.__name__}",
                sum(map(extent, tensors.values())),
                grid=(*(grid(given) if callable(grid) else grid), 1, 1)[:3],
                threads=32 * compiled.metadata.num_warps,
                shared=compiled.metadata.shared,
                numbers=numbers,
                compiled=compiled,
            )
        )
        return compiled

    module = None if native is None else _Native(native, launches.append)

    def noted(x: Tensor | None) -> int:
        address = pointer(x)
        if x is not None and module is not None:
            module.addresses[address] = extent(x)
        return address

    with contextlib.ExitStack() as stack:
        stack.enter_context(as_on_a_gpu(module, target))
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        for patch in (*everywhere(pointer, noted), *everywhere(multiplies_widely, lambda x: True)):
            stack.enter_context(patch)
        # who looks on here does not count
        stack.enter_context(mock.patch("zipformer_kernels.core.call.count_dispatch_modes", return_value=0))
        stack.enter_context(_Uncomputed(launches.append))
        yield launches


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    """bfloat16 autocast as a model on a GPU has it: upstream asks for CUDA's in some places."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        torch.set_autocast_enabled("cuda", False)
