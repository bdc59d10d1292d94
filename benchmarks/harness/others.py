"""Other people's code for our ops: upstream's, k2's and torch's flex_attention, on an op's arguments.

Each peer is ``(*args) -> (function, arguments)``: what it computes on, laid out beforehand as that code wants it, so
that the layout is not timed. A peer raises `Unserved` where it has no way to do the work.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import upstream
from benchmarks.harness.machine import DEVICE
from benchmarks.harness.peers import Unserved

Call = tuple[Callable[..., Tensor], tuple[Any, ...]]


def _upstream(*names: str) -> list[Any]:
    reason = upstream.unavailable()
    if reason is not None:
        raise Unserved(reason)
    return upstream.load(*names)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().contiguous().requires_grad_()


def bare(module: nn.Module, *names: str) -> nn.Module:
    """The module with these children taken out, so that only the op's work is left of it."""
    for name in names:
        setattr(module, name, nn.Identity())
    return module.eval().to(DEVICE)


def swoosh_upstream(x: Tensor, kind: str) -> Call:
    """``_swooshl`` and ``_swooshr``."""
    (scaling,) = _upstream("scaling")
    return {"l": scaling._swooshl, "r": scaling._swooshr}[kind], (x,)


def swoosh_k2(x: Tensor, kind: str) -> Call:
    """k2's fused kernels, which take float32."""
    if x.dtype != torch.float32:
        raise Unserved("k2's kernels take float32")
    if importlib.util.find_spec("k2") is None:
        raise Unserved("k2 is not installed")
    import k2

    return {"l": k2.swoosh_l, "r": k2.swoosh_r}[kind], (x,)


def bias_norm_upstream(x: Tensor, bias: Tensor, log_scale: Tensor) -> Call:
    """``BiasNormFunction``."""
    (scaling,) = _upstream("scaling")
    return (lambda *args: scaling.BiasNormFunction.apply(*args, -1, False)), (x, bias, log_scale)


def swoosh_linear_upstream(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, kind: str, dtype: torch.dtype
) -> Call:
    """``ActivationDropoutAndLinearFunction``, which draws the dropout mask itself; under autocast in half precision."""
    (scaling,) = _upstream("scaling")
    forward, backward = {
        "l": (scaling._swooshl, scaling._swooshl_and_deriv),
        "r": (scaling._swooshr, scaling._swooshr_and_deriv),
    }[kind]
    shared = None if mask is None else next((i for i, size in enumerate(mask.shape) if size < x.shape[i]), None)
    rate = 0.0 if mask is None else 0.3
    function = scaling.ActivationDropoutAndLinearFunction

    def run(*args: Tensor | None) -> Tensor:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype.itemsize == 2):
            return function.apply(*args, forward, backward, rate, shared)

    return run, (x, weight, bias)


def attention_upstream(*args: Any) -> Call:
    """``RelPositionMultiheadAttentionWeights`` and ``SelfAttention`` without their projections."""
    (module,) = _upstream("zipformer")
    v, penalty = args[4], args[10]
    if penalty != 0.0:
        raise Unserved("upstream adds a penalty in training only, and at random")
    value = bare(module.SelfAttention(1, 1, 1), "in_proj", "out_proj", "whiten")
    shape = (v.shape[0], v.shape[1], v.shape[2] * v.shape[3])
    weights, inputs = _weights(module, *args[:4], *args[6:10])

    def run(x: Tensor, e: Tensor, v: Tensor) -> Tensor:
        return value(v, weights(x, e)).unflatten(2, (args[4].shape[2], -1))

    return run, (*inputs, _leaf(v.reshape(shape)))


def nonlin_attention_upstream(*args: Any) -> Call:
    """``RelPositionMultiheadAttentionWeights`` and ``NonlinAttention`` without their projections."""
    (module,) = _upstream("zipformer")
    q, k, p, e, gate, x, y, _, *masks = args
    hidden = gate.shape[2] * gate.shape[3]
    nonlin = bare(module.NonlinAttention(1, hidden), "in_proj", "out_proj", "balancer", "whiten1", "whiten2")
    weights, inputs = _weights(module, q, k, p, e, *masks)

    def run(x: Tensor, e: Tensor, parts: Tensor) -> Tensor:
        return nonlin(parts, weights(x, e)).unflatten(2, gate.shape[2:])

    return run, (*inputs, _leaf(torch.cat([part.flatten(2) for part in (gate, x, y)], dim=2)))


def _weights(
    module: Any, q: Tensor, k: Tensor, p: Tensor, e: Tensor, padding: Tensor | None, mask: Tensor | None, *chunks: int
) -> tuple[Callable[[Tensor, Tensor], Tensor], tuple[Tensor, Tensor]]:
    """Upstream's attention weights as a function of the projection (T, B, C) and the projected positions."""
    if q.shape[0] != k.shape[0] or chunks[0] > 0:
        raise Unserved("upstream's self-attention takes as many sources as targets, and dense masks")
    made = module.RelPositionMultiheadAttentionWeights(1, 1, q.shape[2], q.shape[3], p.shape[3], pos_emb_skip_rate=0.0)
    made = bare(made, "in_proj", "linear_pos", "whiten_keys", "balance_keys")
    projected = torch.cat([part.flatten(2) for part in (q, k, p)], dim=2)
    return (lambda x, e: made(x, e, padding, mask)), (_leaf(projected), _leaf(e.flatten(1).unsqueeze(0)))


def conv_module_upstream(
    a: Tensor,
    s: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    causal_weight: Tensor | None,
    causal_bias: Tensor | None,
    edge_scale: Tensor | None,
    padding: Tensor | None,
    chunk_size: int,
    dtype: torch.dtype,
) -> Call:
    """``ConvolutionModule`` without its projections."""
    (module,) = _upstream("zipformer")
    conv = module.ConvolutionModule(a.shape[2], weight.shape[2], causal=chunk_size > 0)
    conv = bare(conv, "in_proj", "out_proj", "balancer1", "balancer2", "whiten").to(a.dtype)
    inner = conv.depthwise_conv
    if chunk_size > 0:
        inner.chunkwise_conv_scale.data.copy_(edge_scale)
        inner.causal_conv.weight.data.copy_(causal_weight)
        inner.causal_conv.bias.data.copy_(causal_bias)
        inner = inner.chunkwise_conv
    inner.weight.data.copy_(weight)
    inner.bias.requires_grad_(bias is not None).data.copy_(0 if bias is None else bias)
    size = {"chunk_size": chunk_size} if chunk_size > 0 else {}
    projected = _leaf(torch.cat([a, s], dim=2))
    return (lambda x, *_: conv(x, padding, **size)), (projected, *conv.parameters())


def depthwise_conv2d_upstream(x: Tensor, weight: Tensor, bias: Tensor | None) -> Call:
    """The convolution that upstream's ``ConvNeXt`` calls, on the layout that upstream has, channels before frames."""

    def run(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        pad = [taps // 2 for taps in weight.shape[2:]]
        return nn.functional.conv2d(x, weight, *bias, padding=pad, groups=x.shape[1])

    return run, (_leaf(x), weight, *(() if bias is None else (bias,)))


def bypass_upstream(src_orig: Tensor, src: Tensor, scale: Tensor) -> Call:
    """``BypassModule``, given the scale that it would draw."""
    (module,) = _upstream("zipformer")
    made = bare(module.BypassModule(1))

    def run(src_orig: Tensor, src: Tensor, scale: Tensor) -> Tensor:
        made._get_bypass_scale = lambda batch_size: scale
        return made(src_orig, src)

    return run, (src_orig, src, scale)


def downsample_upstream(src: Tensor, bias: Tensor, mask: Tensor | None, channels: int) -> Call:
    """``SimpleDownsample``."""
    if mask is not None or channels != src.shape[2]:
        raise Unserved("upstream masks and widens elsewhere")
    (module,) = _upstream("zipformer")
    made = module.SimpleDownsample(channels, len(bias), 0.0, False)
    made.bias = nn.Parameter(bias.detach().clone())
    return (lambda src, *_: made(src)), (src, made.bias)


def upsample_bypass_upstream(src_orig: Tensor, src: Tensor, scale: Tensor, mask: Tensor | None, factor: int) -> Call:
    """``SimpleUpsample``, and ``BypassModule`` with the scale that it would draw."""
    if mask is not None or src.shape[2] != src_orig.shape[2]:
        raise Unserved("upstream masks and widens elsewhere")
    (module,) = _upstream("zipformer")
    repeated, (mixed, _) = module.SimpleUpsample(src.shape[2], factor), bypass_upstream(src_orig, src, scale)

    def run(src_orig: Tensor, src: Tensor, scale: Tensor) -> Tensor:
        return mixed(src_orig, repeated(src)[: len(src_orig)], scale)

    return run, (src_orig, src, scale)


def attention_flex(*args: Any) -> Call:
    """torch's flex_attention with the positional term as a score modification; 12 channels padded to 16."""
    if DEVICE.type != "cuda":
        raise Unserved("flex_attention is timed on a GPU only")
    q, k, p, e, v, _, padding, mask, chunk, *_ = args
    if padding is not None or mask is not None or chunk > 0:
        raise Unserved("flex_attention is timed without masks only")
    from torch.nn.attention.flex_attention import flex_attention

    return flex(torch.compile(flex_attention), q, k, p, e, v)


def flex(attend: Callable[..., Tensor], q: Tensor, k: Tensor, p: Tensor, e: Tensor, v: Tensor) -> Call:
    """The call of `attend`, flex_attention compiled or not, and its arguments, heads first."""
    channels, last, size = v.shape[3], q.shape[0] - 1, p.shape[3]
    by_head = [_leaf(x.permute(1, 2, 0, 3)) for x in (q, k, p)]
    value = _leaf(nn.functional.pad(v, (0, max(0, 16 - channels))).permute(1, 2, 0, 3))

    def run(q: Tensor, k: Tensor, p: Tensor, e: Tensor, v: Tensor) -> Tensor:
        def positional(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            for c in range(size):
                score = score + p[b, h, i, c] * e[last - i + j, h, c]
            return score

        return attend(q, k, v, score_mod=positional, scale=1.0).permute(2, 0, 1, 3)[..., :channels]

    return run, (*by_head, _leaf(e), value)


def balancer_upstream(
    grad: Tensor, x: Tensor, variance: Tensor | None, mean: Tensor | None, channel_dim: int, *limits: float
) -> Call:
    """The backward pass of ``BalancerFunction``."""
    if variance is not None:
        raise Unserved("upstream takes the moments of x itself")
    (scaling,) = _upstream("scaling")
    context = SimpleNamespace(saved_tensors=(x,), config=(*limits, channel_dim % x.ndim))
    return (lambda grad: scaling.BalancerFunction.backward(context, grad)[0]), (grad,)


OTHERS: dict[str, dict[str, Callable[..., Call]]] = {
    "swoosh": {"upstream": swoosh_upstream, "k2": swoosh_k2},
    "bias_norm": {"upstream": bias_norm_upstream},
    "swoosh_linear": {"upstream": swoosh_linear_upstream},
    "attention": {"upstream": attention_upstream, "flex_attention": attention_flex},
    "nonlin_attention": {"upstream": nonlin_attention_upstream},
    "conv_module": {"upstream": conv_module_upstream},
    "depthwise_conv2d": {"upstream": depthwise_conv2d_upstream},
    "bypass": {"upstream": bypass_upstream},
    "downsample": {"upstream": downsample_upstream},
    "upsample_bypass": {"upstream": upsample_bypass_upstream},
    "balancer": {"upstream": balancer_upstream},
}
"""By op, then by peer."""

UNCHECKED = {("swoosh_linear", "upstream"): "it draws its own dropout mask"}
"""Peers whose results cannot be compared, and why."""
