"""The one door between the ops and torch: torch.library operators and autograd.Function.

An op is a reference in plain PyTorch and, for each backend, a set of `Launchers`. `Op` joins them:

- outside of tracing, one `torch.autograd.Function` calls the launchers directly (a few microseconds a call);
- under `torch.compile` the same launchers stand behind the operators ``zipformer_kernels::<op>`` and
  ``zipformer_kernels::<op>_backward``, with fakes and a registered backward;
- on backend ``eager`` the compiler and every exporter see the reference itself, plain PyTorch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.core import backend as backends
from zipformer_kernels.core.autograd import aliases, apply_op
from zipformer_kernels.core.call import barred, watcher, without_autocast
from zipformer_kernels.core.launch import like

_LIBRARY = torch.library.Library("zipformer_kernels", "FRAGMENT")


@dataclass(frozen=True)
class Launchers:
    """One backend of one op. All three functions take the op's arguments, in the order of its schema.

    Attributes:
        supports: ``(*args)`` -> why this backend cannot serve the call, or None if it can. It looks at dtypes, shapes
            and strides only; whether the backend runs on the tensors' device is settled before.
        forward: ``(*args)`` -> outputs and extras, one flat tuple of new tensors. Extras are what backward needs
            besides inputs and outputs.
        backward: ``(needs, grads, saved, *args)`` -> one gradient, or None, per tensor argument. `needs` says which
            are wanted; `grads` has one tensor per output, of any strides; `saved` are the op's saved outputs followed
            by the extras; tensor arguments that the op does not save arrive as None. Gradients are allocated as
            `torch.empty_like` would, or side by side as the arguments lie (`zipformer_kernels.core.joint`). None where
            the op's results carry no gradient.
        worthwhile: ``(*args)`` -> whether ``auto`` should choose this backend for the call, as far as measured.
        variants: this backend's launchers of the op's variants, by their names.
    """

    supports: Callable[..., str | None]
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor | None, ...]] | None
    worthwhile: Callable[..., bool] = lambda *_: True
    variants: dict[str, Launchers] = field(default_factory=dict, compare=False)


class SettledBackend(str):
    """The name of a backend that was settled before the call: an op then asks nothing, and its result has no gradient.

    Who settles it has seen that nobody looks on, that the tensors are plain, and that the backend serves them.
    """


def triton_launchers(package: str) -> dict[str, Launchers]:
    """``<package>.triton.launchers``, or nothing where Triton cannot run: importing it would fail."""
    if backends.missing["triton"] is not None:
        return {}
    return {"triton": importlib.import_module(f"{package}.triton").launchers}


class Op:
    """An operation with one reference and several backends behind one call.

    Args:
        name: its name in `torch.ops.zipformer_kernels`.
        schema: its arguments in torch's schema language, without defaults, e.g. ``Tensor x, Tensor? mask, int dim``.
        reference: the op in differentiable PyTorch: ``(*args)`` -> output, or a tuple of outputs.
        backends: launchers by backend name; ``eager`` among them.
        saves: names of the tensor arguments that backward reads or that can need a gradient; none for an op whose
            results carry no gradient.
        outputs: how many results a caller gets.
        saves_outputs: which of them backward reads.
        extras: how many further tensors forward returns for backward.
        fake: ``(*args)`` -> tensors shaped as what forward returns, computed without data. By default, for one
            output and no extras, `torch.empty_like` of the first argument.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable[..., Any],
        backends: dict[str, Launchers],
        saves: Sequence[str],
        outputs: int = 1,
        saves_outputs: Sequence[int] = (),
        extras: int = 0,
        fake: Callable[..., tuple[Tensor, ...]] | None = None,
    ) -> None:
        self.name = name
        self.when: str | None = None
        self.variants: dict[str, Op] = {}
        self.reference = reference
        self.backends = backends
        self.outputs = outputs
        self.saves_outputs = tuple(saves_outputs)
        self.fake = fake or (lambda x, *_: (torch.empty_like(x),))
        kinds, names = zip(*(argument.split() for argument in schema.split(", ")), strict=True)
        self.arity = len(kinds)
        self.tensors = tuple(i for i, kind in enumerate(kinds) if kind.startswith("Tensor"))
        self.saved = tuple(i for i in self.tensors if names[i] in saves)
        self._define(schema, kinds, names, extras)

    def variant(self, name: str, schema: str, *, when: str, **kwargs: Any) -> Op:
        """Adds a variant: the op for special calls, such as those without gradients.

        It runs on the backends whose launchers have launchers of that variant (`Launchers.variants`).

        Args:
            name: its name among the op's variants; torch knows it as ``<op>_<name>``.
            schema: its arguments.
            when: which calls it is for, in a few words, for `explain` and ``zipformer-kernels info``.
            **kwargs: as of an op, less the backends; a variant has its own reference, made of the op's.
        """
        serving = {key: own.variants[name] for key, own in self.backends.items() if name in own.variants}
        variant = self.variants[name] = Op(f"{self.name}_{name}", schema, backends=serving, **kwargs)
        variant.when = when
        return variant

    def add_backend(self, name: str, launchers: Launchers) -> None:
        """Gives the op the launchers of one more backend, which `zipformer_kernels.core.backend.register` knows.

        Raises:
            ValueError: there is no such backend, or the op has launchers for it.
        """
        if name not in backends.registry:
            raise ValueError(f"backend must be one of {', '.join(backends.BACKENDS)}, got {name!r}")
        if name in self.backends:
            raise ValueError(f"{self.name} has launchers for {name!r} already")
        for variant in launchers.variants:
            if variant not in self.variants:
                raise ValueError(f"{self.name} has the variants {', '.join(self.variants)}, got {variant!r}")
        self.backends[name] = launchers
        for variant, own in launchers.variants.items():
            self.variants[variant].backends[name] = own

    # ---- choosing a backend ----

    def unsupported(self, name: str, *args: Any) -> str | None:
        """Why backend `name` cannot serve a call with these arguments, or None if it can."""
        return self._unsupported(name, barred(self._tensors(args), watcher()), args)

    def _unsupported(self, name: str, bar: str | None, args: tuple[Any, ...]) -> str | None:
        if name not in self.backends:
            return backends.missing[name] or f"{self.name} has no {name} kernels"
        if bar is not None and name != "eager":
            return bar
        device = args[self.tensors[0]].device.type
        return backends.unserved_device(name, device) or self.backends[name].supports(*args)

    def select(self, backend: str | None, *args: Any) -> str:
        """The name of the backend that a call with these arguments gets. Raises `BackendError`."""
        watched_by = watcher()
        return self._select(backend, watched_by, barred(self._tensors(args), watched_by), args)

    def _select(self, backend: str | None, watched_by: str | None, bar: str | None, args: tuple[Any, ...]) -> str:
        request = backends.requested(backend)
        if request == "auto":
            if bar is not None or watched_by == "export":  # what is exported must not need this package
                return "eager"
            for name in backends.serving.get(args[self.tensors[0]].device.type, ()):
                launchers = self.backends.get(name)
                if launchers is not None and launchers.supports(*args) is None and launchers.worthwhile(*args):
                    return name
            return "eager"
        reasons = []
        for name in backends.asked_for(backend, request, self.backends):
            reason = self._unsupported(name, bar, args)
            if reason is None:
                return name
            reasons.append(f"backend {name!r} cannot serve this call: {reason}")
        raise backends.BackendError(f"{self.name}: {'; '.join(reasons)}")

    def explain(self, *args: Any, backend: str | None = None) -> str:
        """Says which backend a call gets, why each other one would not serve it, and which variants there are."""
        lines = [f"{self.name}: runs on {self.select(backend, *args)!r} (asked for: {backends.requested(backend)!r})"]
        for name in backends.BACKENDS:
            reason = self.unsupported(name, *args)
            lines.append(f"  {name:7}{'available' if reason is None else 'no: ' + reason}")
        for name, variant in self.variants.items():
            lines.append(f"  variant {name!r} on {', '.join(variant.backends)}: {variant.when}")
        return "\n".join(lines)

    # ---- the call ----

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        """Runs the op. Arguments as in its schema."""
        if type(backend) is SettledBackend:
            return self._results(self.backends[backend].forward(*args))
        watched_by, tensors = watcher(), self._tensors(args)
        bar = barred(tensors, watched_by)
        name = self._select(backend, watched_by, bar, args)
        if name == "eager" and (watched_by is not None or bar is not None):
            return self.reference(*args)
        if watched_by is not None:
            results = getattr(torch.ops.zipformer_kernels, self.name)(*args, name)
            return self._results((results,) if isinstance(results, Tensor) else results)
        launchers = self.backends[name]
        if torch.is_grad_enabled():
            for x in tensors:
                if x is not None and x.requires_grad:
                    return apply_op(self, launchers, *args)
        return self._results(without_autocast(launchers.forward, *args))

    def _tensors(self, args: Sequence[Any]) -> list[Tensor | None]:
        return [args[i] for i in self.tensors]

    def _results(self, results: tuple[Tensor, ...]) -> Any:
        return results[0] if self.outputs == 1 else tuple(results[: self.outputs])

    def _to_store(self, args: Sequence[Any], results: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """What backward reads: saved arguments, then saved outputs, then extras."""
        stored = [args[i] for i in self.saved]
        if self.saves_outputs:
            stored += [results[i] for i in self.saves_outputs]
        return *stored, *results[self.outputs :]

    def _arguments(self, stored: Sequence[Tensor | None], values: Sequence[Any]) -> list[Any]:
        """The op's arguments again: saved tensors where they were saved, None for the other tensors."""
        args = list(values)
        for i, tensor in zip(self.saved, stored, strict=False):
            args[i] = tensor
        return args

    def _values(self, args: Sequence[Any]) -> list[Any]:
        """The arguments with None in place of every tensor."""
        values = list(args)
        for i in self.tensors:
            values[i] = None
        return values

    def _spread(self, gradients: Iterable[Tensor | None]) -> list[Tensor | None]:
        """One gradient per argument from one per tensor argument."""
        spread: list[Tensor | None] = [None] * self.arity
        for i, gradient in zip(self.tensors, gradients, strict=True):
            spread[i] = gradient
        return spread

    def _reference_backward(
        self, needs: Sequence[bool], grads: Sequence[Tensor], saved: Sequence[Tensor], *args: Any
    ) -> tuple[Tensor | None, ...]:
        """Launchers' backward, differentiable, through the reference."""
        args = aliases(args)
        outputs = self.reference(*args)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        wanted = [args[i] for i, need in zip(self.tensors, needs, strict=True) if need]
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
        return tuple(next(found) if need else None for need in needs)

    # ---- the operators behind tracing ----

    def _define(self, schema: str, kinds: Sequence[str], names: Sequence[str], extras: int) -> None:
        count = self.outputs + extras
        returns = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
        _LIBRARY.define(f"{self.name}({schema}, str backend) -> {returns}")
        qualified = f"zipformer_kernels::{self.name}"
        torch.library.impl(qualified, "CompositeExplicitAutograd", self._operator, lib=_LIBRARY)
        torch.library.register_fake(qualified, self._operator_fake, lib=_LIBRARY)
        if not self.saved:
            return

        grads = ", ".join(f"Tensor grad{i}" for i in range(self.outputs))
        stored = [f"{kinds[i]} {names[i]}" for i in self.saved]
        stored += [f"Tensor saved{i}" for i in range(len(self.saves_outputs) + extras)]
        self._stored_count = len(stored)
        values = [f"{kinds[i]} {names[i]}" for i in range(len(names)) if i not in self.tensors]
        arguments = ", ".join(["bool[] needs", grads, *stored, *values, "str backend"])
        gradients = ", ".join(["Tensor"] * len(self.tensors))
        returns = "Tensor" if len(self.tensors) == 1 else f"({gradients})"
        _LIBRARY.define(f"{self.name}_backward({arguments}) -> {returns}")

        torch.library.register_autograd(
            qualified, self._operator_gradient, setup_context=self._operator_context, lib=_LIBRARY
        )
        torch.library.impl(qualified + "_backward", "CompositeExplicitAutograd", self._backward_operator, lib=_LIBRARY)
        torch.library.register_fake(qualified + "_backward", self._backward_fake, lib=_LIBRARY)

    def _operator(self, *args: Any) -> Any:
        *args, name = args
        return _one_or_all(without_autocast(self.backends[name].forward, *args))

    def _operator_fake(self, *args: Any) -> Any:
        return _one_or_all(self.fake(*args[:-1]))

    def _operator_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *args, ctx.name = inputs
        results = (output,) if isinstance(output, Tensor) else output
        ctx.save_for_backward(*self._to_store(args, results))
        ctx.values = [value for i, value in enumerate(args) if i not in self.tensors]
        ctx.set_materialize_grads(True)

    def _operator_gradient(self, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = [ctx.needs_input_grad[i] for i in self.tensors]
        operator = getattr(torch.ops.zipformer_kernels, self.name + "_backward")
        gradients = operator(needs, *grads[: self.outputs], *ctx.saved_tensors, *ctx.values, ctx.name)
        gradients = (gradients,) if isinstance(gradients, Tensor) else gradients
        return *self._spread(g if need else None for g, need in zip(gradients, needs, strict=True)), None

    def _split_backward(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Takes apart the arguments of the backward operator, after `needs`."""
        *arguments, name = arguments
        grads, rest = arguments[: self.outputs], arguments[self.outputs :]
        stored, values = rest[: self._stored_count], iter(rest[self._stored_count :])
        args = self._arguments(stored, [None if i in self.tensors else next(values) for i in range(self.arity)])
        return name, tuple(grads), tuple(stored[len(self.saved) :]), args

    def _backward_operator(self, needs: Sequence[bool], *arguments: Any) -> Any:
        name, grads, saved, args = self._split_backward(arguments)
        gradients = without_autocast(self.backends[name].backward, tuple(needs), grads, saved, *args)
        return _one_or_all(
            tuple(
                grads[0].new_empty(0) if gradient is None else like(gradient, torch.empty_like(args[i]))
                for i, gradient in zip(self.tensors, gradients, strict=True)
            )
        )

    def _backward_fake(self, needs: Sequence[bool], *arguments: Any) -> Any:
        _, grads, _, args = self._split_backward(arguments)
        return _one_or_all(
            tuple(
                torch.empty_like(args[i]) if need else grads[0].new_empty(0)
                for i, need in zip(self.tensors, needs, strict=True)
            )
        )


def _one_or_all(results: tuple[Tensor, ...]) -> Any:
    return results[0] if len(results) == 1 else results
