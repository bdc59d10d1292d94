"""Whether whole models compute the same: outputs and gradients, on a short input, with attention that counts.

A fresh model hardly uses its attention: its output stays within 2% without any. So the output projections of
self-attention and of NonlinAttention are multiplied by `BOOST`, after which a model without either is far off.

What rounding may do is measured. Upstream in float64 is what all is held against. Our model must agree with it in
float64, on the reference implementations; so what it computes is right. Then each peer, in the dtype that is timed, may
be `FACTOR` times as far from upstream in float64 as a model is that knows nothing but rounding: our reference in that
dtype for ours, upstream in that dtype for upstream compiled.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.harness.peers import Wrong
from zipformer_kernels import use_backend

BOOST = 10.0
BOOSTED = re.compile(r"(self_attn\d*|nonlin_attention)\.out_proj\.(weight|bias)$")

FACTOR = 10.0
"""How much farther off a peer may be than rounding alone. Without NonlinAttention it is 40 times as far in bfloat16."""

EXACT = {"output": 1e-9, "gradients": 1e-4, "parameter": 1e-2}
"""How far two models may be apart in float64. Balancer and Whiten change gradients in float32 whatever x is."""

SLACK = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""How far the gradient of one parameter may always be off: where it is a few numbers, rounding may be small by luck."""

VANISHING = 1e-6
"""A gradient that is a smaller share than this of all of them is nothing but rounding."""

Results = dict[str, Tensor]
"""``output``, and by the name of a parameter its gradient; in float64."""


def boost(module: nn.Module) -> nn.Module:
    """The module, the output projections of its attention multiplied by `BOOST`."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if BOOSTED.search(name):
                parameter *= BOOST
    return module


@dataclass(frozen=True)
class Errors:
    """How far results are from the ones expected.

    Attributes:
        output: the relative error of the output.
        gradients: of all gradients together.
        parameters: for each parameter the error of its gradient, as a share of the norm of all gradients.
        shares: for each parameter the norm of its gradient, as such a share.
    """

    output: float
    gradients: float = 0.0
    parameters: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)


def errors(results: Results, expected: Results) -> Errors:
    """How far results are from the ones expected, in the Euclidean norm."""
    difference = {name: (results[name] - expected[name]).norm().item() for name in expected}
    size = {name: x.norm().item() for name, x in expected.items()}
    output = difference.pop("output") / size.pop("output")
    if not size:
        return Errors(output)
    whole = torch.tensor(list(size.values())).norm().item()
    parameters = {name: off / whole for name, off in difference.items()}
    gradients = torch.tensor(list(parameters.values())).norm().item()
    return Errors(output, gradients, parameters, {name: x / whole for name, x in size.items()})


class ModelCheck:
    """Checks the models of peers against upstream's, or, where there is no upstream, against our reference.

    Args:
        build: makes a peer's model, in float32.
        probe: runs a model on a short input, in a dtype, by autocast where it is half, and gives its `Results`; a model
            of float64 in float64.
        dtype: what is timed.
        upstream: the name of the peer that the others are held against, or None.
        ours: the name of ours.
    """

    def __init__(
        self,
        build: Callable[[str], nn.Module],
        probe: Callable[[nn.Module, torch.dtype], Results],
        dtype: torch.dtype,
        upstream: str | None = "upstream",
        ours: str = "ours",
    ) -> None:
        self._build, self._probe, self._dtype = build, probe, dtype
        self._upstream, self._ours = upstream, ours
        self._known: dict[tuple[str, torch.dtype], Results] = {}

    def check(self, peer: str, ours: bool, change: Callable[[nn.Module], nn.Module] = lambda module: module) -> None:
        """Raises `Wrong` where a peer's model is off.

        Args:
            peer: which.
            ours: whether it is ours, by whatever way it runs.
            change: made with the model beforehand, such as `torch.compile`.
        """
        plain = self._ours if ours else self._upstream
        reference = self._upstream or self._ours
        expected = self._reference(reference, torch.float64)
        if ours:
            self._exactly(errors(self._reference(plain, torch.float64), expected), reference)
        rounding = errors(self._reference(plain, self._dtype), expected)
        results = self._probe(change(boost(self._build(peer))), self._dtype)
        self._rounded(errors(results, expected), rounding, reference)

    def _reference(self, peer: str, dtype: torch.dtype) -> Results:
        """What a peer's model gives in a dtype, ours on the reference implementations of its ops."""
        if (peer, dtype) not in self._known:
            module = boost(self._build(peer))
            with use_backend("eager"):
                found = self._probe(module.double() if dtype == torch.float64 else module, dtype)
            self._known[peer, dtype] = found
        return self._known[peer, dtype]

    def _exactly(self, error: Errors, reference: str) -> None:
        limits = Errors(
            EXACT["output"],
            EXACT["gradients"],
            {name: max(EXACT["parameter"] * share, VANISHING) for name, share in error.shares.items()},
        )
        _within(error, limits, f"{reference} in float64, itself in float64")

    def _rounded(self, error: Errors, rounding: Errors, reference: str) -> None:
        limits = Errors(
            FACTOR * rounding.output,
            FACTOR * rounding.gradients,
            {
                name: max(FACTOR * rounding.parameters[name], SLACK[self._dtype] * share, VANISHING)
                for name, share in error.shares.items()
            },
        )
        _within(error, limits, f"{reference} in float64")


def _within(error: Errors, limits: Errors, reference: str) -> None:
    """Raises `Wrong` where an error passes its limit; NaN does."""
    if not error.output <= limits.output:
        raise Wrong(f"its output is off by {error.output:.1e} from {reference}; {limits.output:.1e} would pass")
    if not error.gradients <= limits.gradients:
        raise Wrong(
            f"its gradients are off by {error.gradients:.1e} from {reference}; {limits.gradients:.1e} would pass"
        )
    for name, off in error.parameters.items():
        if not off <= limits.parameters[name]:
            share = error.shares[name]
            raise Wrong(f"its gradient of {name} is off by {off / share:.1e} from {reference}")


@contextlib.contextmanager
def draws_of_float32() -> Iterator[None]:
    """Within the block masks are drawn in float32, so that a seed gives the same ones in every dtype."""
    rand = torch.rand

    def drawn(*size: Any, dtype: torch.dtype | None = None, **how: Any) -> Tensor:
        return rand(*size, **how)

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return x
        return x * ((rand(x.shape, device=x.device) >= p) / (1.0 - p)).to(x.dtype)

    with mock.patch.object(torch, "rand", drawn), mock.patch.object(nn.functional, "dropout", dropout):
        yield


def gradients_of(module: nn.Module, output: Tensor) -> Results:
    """The output, and the gradients of all parameters for one fixed gradient of it."""
    generator = torch.Generator(output.device).manual_seed(1)
    weight = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
    (output * weight).sum().backward()
    found = {"output": output.detach().double()}
    for name, parameter in module.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name.replace("_orig_mod.", "")] = gradient.double()
    module.zero_grad(set_to_none=True)
    return found
