"""Compares what modules do before and after a swap, on a batch of the user's or on small random inputs."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zipformer_kernels.convert.calls import CALLS
from zipformer_kernels.convert.swap import Match, swap

BATCH = tuple[Any, ...] | list[Any] | dict[str, Any]
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}  # of the RMS of a result; rounding alone is far below
HALF_TOLERANCE = 5e-2
GRADIENT_TOLERANCE = 1e-3
SEEDS = 2
BATCH_COUNTS = (0.0, 10000.0)  # training goes by a schedule


def outputs(model: nn.Module, batch: BATCH) -> list[Tensor]:
    """All tensors that a model returns for a batch, in evaluation and without gradients.

    Modes and random generators are afterwards what they were.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), seeded(0):
            return _tensors(model(**batch) if isinstance(batch, dict) else model(*batch))
    finally:
        for module, mode in modes.items():
            module.training = mode


def difference(
    actual: list[Tensor], expected: list[Tensor], tolerance: float | None = None
) -> tuple[float, str | None]:
    """The largest difference, as a part of the RMS of the tensor that it is in, and why they disagree, or None."""
    if [x.shape for x in actual] != [x.shape for x in expected]:
        shapes = [", ".join(str(tuple(x.shape)) for x in xs) for xs in (actual, expected)]
        return float("inf"), f"results have the shapes {shapes[0]}, wanted {shapes[1]}"
    largest, reason = 0.0, None
    for x, wanted in zip(actual, expected, strict=True):
        limit = tolerance or TOLERANCES.get(wanted.dtype, HALF_TOLERANCE)
        x, wanted = x.detach().double(), wanted.detach().double()
        size = max(wanted.square().mean().sqrt().item() if wanted.numel() else 0.0, 1e-20)
        error = (x - wanted).abs().max().item() / size if wanted.numel() else 0.0
        largest = max(largest, error)
        if not error <= limit:  # NaN is none
            reason = f"results differ by {error:.1e} of their RMS"
    return largest, reason


class Trials:
    """Trial runs, one for all modules of the same class, shapes and settings."""

    def __init__(self) -> None:
        self._reasons: dict[Any, str | None] = {}

    def reason(self, module: nn.Module, match: Match) -> str | None:
        """Why a module does something else than ours would, or None."""
        shapes = tuple((name, tuple(x.shape)) for name, x in module.named_parameters())
        held = tuple((name, repr(x)) for name, x in sorted(vars(module).items()) if isinstance(x, int | float | str))
        key = type(module), match.name, repr(match.settings), shapes, held
        if key not in self._reasons:
            self._reasons[key] = tried(module, match)
        return self._reasons[key]


def tried(module: nn.Module, match: Match) -> str | None:
    """Runs a copy of a module as it is and as ours, in evaluation and training, with the same seeds.

    Returns:
        Why they disagree, or None where outputs, gradients and the numbers drawn agree.
    """
    try:
        with seeded(0):
            theirs, ours = (copy.deepcopy(module).float().cpu() for _ in range(2))
            swap(ours, match)
            for mode, count in [(False, None), *((True, count) for count in BATCH_COUNTS)]:
                for seed in range(SEEDS):
                    for index in range(len(CALLS[match.name](theirs))):
                        runs = [_run(side, match.name, index, mode, count, seed) for side in (ours, theirs)]
                        reason = _disagreement(*runs)
                        if reason is not None:
                            return f"a trial run in {'training' if mode else 'evaluation'} disagrees: {reason}"
    except Exception as error:  # whatever a stranger's module raises, it is not swapped
        return f"a trial run failed: {type(error).__name__}: {error}"
    return None


def _run(
    module: nn.Module, name: str, index: int, training: bool, count: float | None, seed: int
) -> tuple[list[Tensor], list[Tensor], Any]:
    """The outputs and gradients of one call, and the numbers that come next from the generators."""
    module.train(training).zero_grad()
    for part in module.modules():
        if hasattr(part, "batch_count"):
            part.batch_count = count
    with seeded(seed):
        method, *args = CALLS[name](module)[index]
        args = [x.requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
        results = _tensors(getattr(module, method)(*args))
        leaves = [x for x in args if torch.is_tensor(x) and x.requires_grad] + list(module.parameters())
        gradients = []
        if any(y.requires_grad for y in results):
            drawn = torch.Generator().manual_seed(seed)
            loss = sum((y * torch.randn(y.shape, generator=drawn)).sum() for y in results if y.requires_grad)
            gradients = torch.autograd.grad(loss, [x for x in leaves if x.requires_grad], allow_unused=True)
        return results, [x for x in gradients if x is not None], (random.random(), torch.rand(()).item())


def _disagreement(ours: tuple[list[Tensor], list[Tensor], Any], theirs: tuple[list[Tensor], list[Tensor], Any]) -> Any:
    if ours[2] != theirs[2]:
        return "random numbers are drawn otherwise"
    reason = difference(ours[0], theirs[0])[1]
    if reason is None and len(ours[1]) == len(theirs[1]):
        reason = difference(ours[1], theirs[1], GRADIENT_TOLERANCE)[1]
        return reason and f"gradients: {reason}"
    return reason or "other parameters have gradients"


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block both generators start from a seed; afterwards they are as before."""
    python, cpu = random.getstate(), torch.get_rng_state()
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)


def _tensors(result: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if torch.is_tensor(result):
        return [result]
    if isinstance(result, float):
        return [torch.tensor(result, dtype=torch.float64)]
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, tuple | list):
        return [x for part in result for x in _tensors(part)]
    return [result.materialize()] if hasattr(result, "materialize") else []
