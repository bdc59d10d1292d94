"""What Zipformer's modules decide by Python's ``random``, and when they must not draw.

Layer skips, balancers, whitening, limits and penalties are drawn from Python's generator, dropout masks from
torch's. The latter is known to torch.compile and torch.utils.checkpoint; the former is not, hence this file.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import SupportsFloat

from torch import Tensor

from zipformer_kernels.core.call import being_traced, has_values, watcher

_drawing = True


def all_ones(mask: Tensor) -> bool:
    """Whether a mask is known to be 1 everywhere, so that nothing need be multiplied by it.

    It is looked at on the CPU only, where that is no wait, and not while the call is recorded or transformed.
    """
    return mask.device.type == "cpu" and watcher() is None and has_values(mask) and bool((mask == 1).all())


@contextmanager
def without_draws() -> Iterator[None]:
    """Within the block, what Python's ``random`` would decide does not happen, unless its probability is 1.

    A training step then is a function of the weights, the batch and torch's generator, and ``torch.compile`` with
    ``fullgraph=True`` records a layer whole. Dropout and the skipping of sequences go on: their rates are
    attributes of the modules. It holds for the whole process, not for one thread.
    """
    global _drawing
    previous = _drawing
    _drawing = False
    try:
        yield
    finally:
        _drawing = previous


def number(value: SupportsFloat) -> float:
    """float(value), which torch.compile before 2.8 cannot record for a module such as `ScheduledFloat`."""
    return value.__float__()


def happens(probability: SupportsFloat) -> bool:
    """Draws whether an event of a probability happens: one draw of Python's ``random``.

    While a graph is recorded, no number is drawn for what is certain: drawing one ends the graph.

    Args:
        probability: a number, or a schedule. A schedule draws when it is read, and is read after the draw; read it
            with ``float`` where upstream reads it before.
    """
    if _drawing and not being_traced():
        return random.random() < number(probability)
    probability = number(probability)
    if _drawing and 0.0 < probability < 1.0:
        return random.random() < probability
    return probability >= 1.0


def logging_draw(probability: float) -> bool:
    """Draws the number by which upstream decides, with `probability`, to write a line of log.

    It is drawn though nothing is logged, because the sequence of draws decides which dropouts, skips and penalties a
    training step gets: under the same seed a run here and a run of upstream then take the same decisions. While a graph
    is recorded there is no draw and no log.
    """
    return _drawing and not being_traced() and random.random() < probability


def logging_draw_unrecorded() -> None:
    """`logging_draw` where it is known that nobody records the call, and nothing hangs on what is drawn."""
    if _drawing:
        random.random()


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Lets activation checkpointing draw from Python's ``random`` again what the forward pass drew.

    ``torch.utils.checkpoint.checkpoint`` restores torch's generators before it computes again, but not Python's: the
    second pass would skip and penalise otherwise than the first, and gradients would belong to neither. Pass
    this function to it::

        checkpoint(layer, src, pos_emb, use_reentrant=False, context_fn=checkpoint_contexts)

    Returns:
        The contexts of the forward pass and of its repetition.
    """
    drawn_from = []

    @contextmanager
    def forward() -> Iterator[None]:
        drawn_from.append(random.getstate())
        yield

    @contextmanager
    def again() -> Iterator[None]:
        state = random.getstate()
        random.setstate(drawn_from[0])
        try:
            yield
        finally:
            random.setstate(state)

    return forward(), again()
