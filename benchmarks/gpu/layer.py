"""The attention of one training layer of preset L: what its three uses launch, and what that costs for each score.

NonlinAttention uses the first head, two self-attentions use all. Instructions of a pass are those of all kernels of
attention, over the layer's scores: targets times sources, sequences and heads. A use of fewer heads counts for its
share. NonlinAttention's gates are no part of that, but of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import counts, recording
from benchmarks.gpu.recording import Launch
from benchmarks.gpu.roofline import MACHINES
from zipformer_kernels.core import tuning
from zipformer_kernels.ops.attention import AttentionWeights, aggregate
from zipformer_kernels.ops.cases import BATCH, Stack, stacks
from zipformer_kernels.ops.nonlin_attention import nonlin_attention
from zipformer_kernels.presets import preset

KINDS = (("triton", "stored"), ("triton", "recomputed"), ("cuda", "recomputed"))
DTYPE = torch.bfloat16  # the model's, by autocast


def inputs(stack: Stack) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """q, k, p and e; the thirds that NonlinAttention is given; the values of both self-attentions. As views of one
    projection each, as the modules make them.
    """
    sizes = preset("L")
    query, position, value = (sizes[name] for name in ("query_head_dim", "pos_head_dim", "value_head_dim"))
    heads = stack.heads

    def projected(*widths: int) -> list[Tensor]:
        x = torch.empty(stack.frames, BATCH, sum(widths), dtype=DTYPE, requires_grad=True)
        return list((x * 1).split(widths, dim=2))

    q, k, p = (x.unflatten(2, (heads, -1)) for x in projected(heads * query, heads * query, heads * position))
    e = torch.empty(2 * stack.frames - 1, heads, position, dtype=DTYPE, requires_grad=True)
    wide = 3 * stack.channels // 4
    return [q, k, p, e * 1], projected(wide, wide, wide), [projected(heads * value)[0] for _ in range(2)]


def launches(
    native: ModuleType | None, stack: Stack, backend: str, kind: str, target: str = recording.TARGET
) -> Iterator[tuple[str, list[Launch]]]:
    """What the forward and the backward pass launch; arguments as of `recording.recording`."""
    with (
        recording.recording(native, target) as recorded,
        tuning.override(**{BUDGET: 1 << 50 if kind == "stored" else 0}),
    ):
        scores, thirds, values = inputs(stack)
        recorded.clear()
        weights = AttentionWeights(*scores, backend=backend)
        results = [nonlin_attention(weights[0:1], *thirds), *(aggregate(weights, v) for v in values)]
        yield "forward", list(recorded)
        gradients = [torch.empty_like(y) for y in results]
        recorded.clear()
        torch.autograd.backward(results, gradients)
        yield "backward", [launch for launch in recorded if launch.name not in OF_THE_INPUTS]


BUDGET = "attention.stored_bytes"
OF_THE_INPUTS = ("mul", "add_")  # gradients of what `inputs` computes


def rows(
    native: ModuleType, kernels: counts.Kernels, step: Callable[[str], None] = lambda _: None
) -> Iterator[dict[str, Any]]:
    """A row for each stack of L, backend and kind of weights, and direction.

    Args:
        native: the module that `recording.build_module` made.
        kernels: the compiled ones.
        step: called with the name of what is done next.
    """
    for stack in stacks("L")[:4]:
        for backend, kind in KINDS:
            step(f"a layer's attention, {stack.name}, {backend}, {kind}")
            for direction, recorded in launches(native, stack, backend, kind):
                yield row(stack, backend, kind, direction, recorded, kernels)


def row(
    stack: Stack, backend: str, kind: str, direction: str, recorded: list[Launch], kernels: counts.Kernels
) -> dict[str, Any]:
    """Counts and predictions of one pass."""
    scores = stack.frames**2 * BATCH * stack.heads
    own = [counts.counted(launch, kernels, scores) for launch in recorded if launch.kind != "torch"]
    others = [launch for launch in recorded if launch.kind == "torch"]
    return {
        "stack": stack.name,
        "backend": backend,
        "weights": kind,
        "direction": direction,
        "instructions": round(
            sum(one["executed"] for one in own if one["kernel"].startswith("attention.")) / scores, 2
        ),
        "kernels": own,
        "torch": [launch.name for launch in others],
        "predicted_us": {
            m.name: round(
                sum(one["predicted_us"][m.name] for one in own) + 1e6 * sum(counts.torch_time(x, m) for x in others), 1
            )
            for m in MACHINES
        },
    }
