"""When Zipformer's modules draw from Python's ``random``, and when they must not."""

from __future__ import annotations

import random

import torch


def being_traced() -> bool:
    """True while torch.compile, torch.export, torch.onnx or torch.jit.trace records the model.

    A recorded draw would be frozen into the graph, so in eval mode modules draw nothing while they are
    recorded.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def logging_draw(probability: float) -> bool:
    """Draws the number by which upstream decides, with `probability`, to write a line of log.

    The draw is kept because the sequence of draws decides which dropouts, skips and penalties a training step
    gets: under the same seed a run here and a run of upstream then take the same decisions.
    """
    return random.random() < probability
