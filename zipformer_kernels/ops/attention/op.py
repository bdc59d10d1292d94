"""The op ``attention``, and what it needs of the scores beforehand: variants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.core.op import Op, triton_launchers
from zipformer_kernels.ops.attention import cpu, cuda, eager, reference

_SCORES = "Tensor q, Tensor k, Tensor? p, Tensor? e"
_MASKS = "Tensor? key_padding_mask, Tensor? attn_mask, int chunk, int left_chunks"
_PENALTY = "float penalty, float limit"

_op = Op(
    "attention",
    f"{_SCORES}, Tensor v, Tensor softmax, {_MASKS}, {_PENALTY}",
    reference=reference.attention,
    backends={
        "eager": eager.launchers,
        "cpu": cpu.launchers,
        "cuda": cuda.launchers,
        **triton_launchers(__package__),
    },
    saves=("q", "k", "p", "e", "v", "softmax", "key_padding_mask", "attn_mask"),
    saves_outputs=(0,),
    fake=lambda q, k, p, e, v, *_: (v.new_empty(q.shape[0], *v.shape[1:]),),
)

_op.variant(
    "softmax",
    f"{_SCORES}, {_MASKS}",
    when="the two numbers for each target that make weights of scores, before the first use of weights not stored",
    reference=reference.softmax_rows,
    saves=(),
    fake=lambda q, *_: (reference.empty_rows(q),),
)

_op.variant(
    "weights",
    f"{_SCORES}, {_MASKS}, {_PENALTY}",
    when="the weights themselves, to be stored",
    reference=reference.weights,
    saves=("q", "k", "p", "e", "key_padding_mask", "attn_mask"),
    saves_outputs=(0,),
    fake=lambda q, k, *_: (q.new_empty(q.shape[2], q.shape[1], q.shape[0], k.shape[0]),),
)


def _fake_stream(src: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    context, weights = rest[2:4]
    return torch.empty_like(src), src.new_empty(weights.shape[3], src.shape[1], context.shape[2])


_op.variant(
    "stream",
    "Tensor src, Tensor in_weight, Tensor? in_bias, Tensor context, Tensor weights, Tensor out_weight, "
    "Tensor? out_bias, bool gated",
    when="a module that averages and its residual sum, without gradients, on a stream's chunk of few rows",
    reference=reference.stream,
    saves=(),
    outputs=2,
    fake=_fake_stream,
)
