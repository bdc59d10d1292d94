"""Lists of tensors that ScaledAdam is tested and measured on: awkward ones, and as many as a model has."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.ops.cases import Case, stacks
from zipformer_kernels.ops.scaled_adam.reference import Group, Hyper, Statistics
from zipformer_kernels.presets import preset

ODD = [(3, 5), (), (0, 2), (7,), (2, 3, 4), (1,), (130, 129)]
MODEL = [shape for _ in range(100) for shape in ((768, 256), (768,), (256,), (256,), (), (256, 1, 31))]
FLOPS_PER_ELEMENT = 20


def parameters(name: str) -> list[tuple[int, ...]]:
    """The shapes of all parameters of a preset's conv embed and encoder; their order is not the model's."""
    sizes = preset(name)
    first = sizes["encoder_dim"][0]
    shapes = [(8, 1, 3, 3), (32, 8, 3, 3), (128, 32, 3, 3), (128, 1, 7, 7), (384, 128, 1, 1), (128, 384, 1, 1)]
    shapes += [(shape[0],) for shape in shapes]  # biases
    shapes += [(first, 128 * 19), (first,), (first,), (), (sizes["output_downsampling_factor"],)]
    for stack, layers in zip(stacks(name), sizes["num_encoder_layers"], strict=True):
        shapes += layers * _of_layer(stack.channels, stack.hidden, stack.heads, stack.kernel, sizes)
        if stack.downsampling > 1:
            shapes += [(stack.downsampling,), (stack.channels,)]
    return shapes


def _of_layer(d: int, hidden: int, heads: int, kernel: int, sizes: dict[str, Any]) -> list[tuple[int, ...]]:
    query, position, value = (heads * sizes[f"{part}_head_dim"] for part in ("query", "pos", "value"))
    gated = 3 * d // 4
    products = [(2 * query + position, d), *2 * [(value, d), (d, value)], (3 * gated, d), (d, gated)]
    for width in (hidden * 3 // 4, hidden, hidden * 5 // 4):
        products += [(width, d), (d, width)]
    products += 2 * [(2 * d, d), (d, 1, kernel), (d, d)]
    biases = [(shape[0],) for shape in products]
    return [*products, *biases, (position, sizes["pos_dim"]), (), *4 * [(d,)]]  # the last of norm and bypasses


def group(params: list[Tensor], grads: list[Tensor | None], lr: float = 0.045, clipping_scale: float = 2.0) -> Group:
    """A group of tensors that have not been stepped yet, with the recipes' options."""
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    floats = {"dtype": dtype, "device": params[0].device}
    counts = {"dtype": torch.int64, "device": params[0].device}
    moments = [[torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params] for _ in "vm"]
    single = [p.numel() == 1 for p in params]
    statistics = Statistics(
        step=torch.zeros((), **counts),
        skipped=torch.zeros((), **counts),
        clipped=torch.zeros((), **counts),
        norms=torch.zeros(100, **floats),
        threshold=torch.full((), math.inf, **floats),
        rms=torch.stack([p.to(dtype).square().mean().sqrt().nan_to_num(0.0) for p in params]),
        scale_exp_avg_sq=torch.zeros(len(params), **floats),
        scale_grads=torch.zeros(4, len(params), **floats),
        numel=torch.tensor([max(p.numel(), 1) for p in params], **floats),
        single=torch.tensor(single, device=params[0].device),
    )
    hyper = Hyper(lr, clipping_scale, (0.9, 0.98), 0.1, 1e-8, 1e-5, 3.0, 10.0)
    dtypes = {x.dtype for x in (*params, *grads) if x is not None}
    return Group(params, grads, *moments, single, statistics, hyper, dtypes)


def _case(name: str, shapes: list[tuple[int, ...]], large: bool = False) -> Case:
    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple[list[Group]]:
        p, g = ([torch.randn(shape, device=device).to(dtype) for shape in shapes] for _ in "pg")
        return ([group(p, g)],)

    n = sum(map(math.prod, shapes))
    return Case(
        name,
        inputs,
        # For the sums p and g are read; for the update p, g, v, m, and p, v, m written; v and m in float32.
        lambda size: {"step": n * (5 * size + 16)},
        {"step": n * FLOPS_PER_ELEMENT},
        large,
    )


CASES = [
    _case("odd shapes", ODD),
    _case("20M in 600 tensors", MODEL, large=True),
    _case("all parameters of L", parameters("L"), large=True),
]
