"""The classes of ours that a module can be given, and what it must have for that."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from zipformer_kernels import modules as ours
from zipformer_kernels import training
from zipformer_kernels.modules.encoder import Zipformer

Shapes = dict[str, tuple["int | None", ...]]  # by dotted path; None for any size

OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@dataclass(frozen=True, eq=False)
class Row:
    """One class of ours.

    Attributes:
        build: makes the smallest module of it; upstream's must have every attribute that it has.
        ops: the ops for whose sake modules become it; none for a class that only comes along.
        shapes: the shapes that the parameters must have, given the module's own settings.
        optional: children that upstream's may have or not.
        drops: attributes that only upstream's class has; not every version of it has all.
        adds: attributes that not every version of upstream's class has, from the module.
        replaces: attributes that ours needs otherwise, from the module.
    """

    build: Callable[[], nn.Module]
    ops: tuple[str, ...] = ()
    shapes: Callable[[Any], Shapes] = lambda module: {}
    optional: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    adds: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    replaces: dict[str, Callable[[Any], Any]] = field(default_factory=dict)

    @cached_property
    def example(self) -> nn.Module:
        drawn = random.getstate(), torch.get_rng_state()
        try:
            with torch.device("cpu"):  # on "meta" initial values would import torch.compile's whole machinery
                return self.build()
        finally:
            random.setstate(drawn[0])
            torch.set_rng_state(drawn[1])

    @cached_property
    def attributes(self) -> set[str]:
        return attributes(self.example)

    def mismatch(self, module: nn.Module) -> str | None:
        """Why `module` cannot become ours, or None if it can: of attributes, parameters and children alone."""
        missing = self.attributes - attributes(module) - self.adds.keys()
        if missing:
            return f"it has no {listed(missing)}"
        unknown = {*module._parameters, *module._buffers, *module._modules} - self.attributes - {*self.optional}
        if unknown:
            return f"it has {listed(unknown)}, which ours would not use"
        return self.patched(module) or self._mismatched_shapes(module)

    def patched(self, module: nn.Module) -> str | None:
        """The same of methods that were replaced on the object."""
        names = {name for name in vars(module) if callable(getattr(type(self.example), name, None))}
        return f"its {listed(names)} was replaced on the object" if names else None

    def _mismatched_shapes(self, module: nn.Module) -> str | None:
        try:
            shapes = self.shapes(module)
            tensors = {path: operator.attrgetter(path)(module) for path in shapes}
        except AttributeError as error:
            return str(error)
        for path, wanted in shapes.items():
            got = wanted if tensors[path] is None else tuple(tensors[path].shape)  # there may be no bias
            if len(got) != len(wanted) or any(w not in (None, g) for w, g in zip(wanted, got, strict=True)):
                return f"its {path} has shape {got}, wanted {wanted}"
        return None


def attributes(module: nn.Module) -> set[str]:
    """The names of what a module has and `nn.Module` has not."""
    return set(vars(module)) - OF_EVERY_MODULE | {*module._parameters, *module._buffers, *module._modules}


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


ATTENTION = ("attention", "nonlin_attention")


def _encoder() -> nn.Module:
    return Zipformer(downsampling_factor=(1,), encoder_dim=8, encoder_unmasked_dim=8, num_heads=1)


def _layer() -> nn.Module:
    return ours.ZipformerEncoderLayer(8, 2, 1, 1, 1, 1, 8)


def _stack() -> nn.Module:
    return ours.ZipformerEncoder(_layer(), 1, pos_dim=2, dropout=0.0, warmup_begin=0.0, warmup_end=1.0)


def _timed_stack() -> nn.Module:
    return ours.TimedEncoder(ours.TimedEncoderLayer(8, 2, 1, 1, 1, 1, 8), 1, 8, -1, 2, 0.0, 1.0)


def _weights_shapes(m: Any) -> Shapes:
    return {
        "in_proj.weight": (m.num_heads * (2 * m.query_head_dim + m.pos_head_dim), m.embed_dim),
        "linear_pos.weight": (m.num_heads * m.pos_head_dim, None),
    }


def _nonlin_shapes(m: Any) -> Shapes:
    return {"in_proj.weight": (3 * m.hidden_channels, None), "out_proj.weight": (None, m.hidden_channels)}


def _self_attention_shapes(m: Any) -> Shapes:
    values, channels = m.in_proj.weight.shape
    return {"out_proj.weight": (channels, values)}


def _swoosh_linear_shapes(m: Any) -> Shapes:
    return {"weight": (None, None), "bias": (len(m.weight),)}


def _depthwise_shapes(m: Any) -> Shapes:
    channels, width = len(m.causal_conv.weight), m.kernel_size
    return {
        "causal_conv.weight": (channels, 1, (width + 1) // 2),
        "chunkwise_conv.weight": (channels, 1, width),
        "chunkwise_conv_scale": (2, channels, width),
    }


def _conv_embed_shapes(m: Any) -> Shapes:
    return {"conv.0.weight": (None, 1, 3, 3), "out.weight": (None, m.out.in_features)}


ROWS = {
    "SwooshL": Row(ours.SwooshL, ("swoosh",), drops=("func",)),
    "SwooshR": Row(ours.SwooshR, ("swoosh",), drops=("func",)),
    "BiasNorm": Row(
        lambda: ours.BiasNorm(1),
        ("bias_norm",),
        shapes=lambda m: {"log_scale": (), "bias": (m.num_channels,)},
    ),
    "ActivationDropoutAndLinear": Row(
        lambda: ours.ActivationDropoutAndLinear(1, 1),
        ("swoosh_linear",),
        shapes=_swoosh_linear_shapes,
        drops=("forward_func", "backward_func"),
    ),
    "RelPositionMultiheadAttentionWeights": Row(
        lambda: ours.RelPositionMultiheadAttentionWeights(1, 2, 1, 1, 1), ATTENTION, shapes=_weights_shapes
    ),
    "SelfAttention": Row(lambda: ours.SelfAttention(1, 1, 1), ATTENTION, shapes=_self_attention_shapes),
    "NonlinAttention": Row(lambda: ours.NonlinAttention(1, 1), ATTENTION, shapes=_nonlin_shapes),
    "ZipformerEncoderLayer": Row(_layer, ATTENTION, shapes=lambda m: {"bypass_scale": (m.embed_dim,)}),
    "ZipformerEncoder": Row(_stack, ATTENTION),
    "DownsampledZipformerEncoder": Row(lambda: ours.DownsampledZipformerEncoder(_stack(), 8, 2, 0.0, False), ATTENTION),
    "Zipformer": Row(_encoder, ATTENTION),
    "TimedEncoderLayer": Row(
        lambda: ours.TimedEncoderLayer(8, 2, 1, 1, 1, 1, 8, use_conv=False),
        ATTENTION,
        optional=("conv_module1", "conv_module2"),
    ),
    "TimedEncoder": Row(_timed_stack, ATTENTION),
    "TimedDownsampledEncoder": Row(lambda: ours.TimedDownsampledEncoder(_timed_stack(), 8, 2), ATTENTION),
    "BypassModule": Row(lambda: ours.BypassModule(1), shapes=lambda m: {"bypass_scale": (None,)}),
    "SimpleDownsample": Row(
        lambda: ours.SimpleDownsample(1, 1, 0.0, False),
        shapes=lambda m: {"bias": (m.downsample,)},
        adds={"causal": lambda m: False},
    ),
    "SimpleUpsample": Row(lambda: ours.SimpleUpsample(1, 1)),
    "CompactRelPositionalEncoding": Row(
        lambda: ours.CompactRelPositionalEncoding(2, 0.0),
        # Upstream's table takes the dtype of the last input, and may have lost digits; ours is made anew.
        adds={"max_len": lambda m: 1000},
        replaces={"pe": lambda m: None},
    ),
    "ConvolutionModule": Row(lambda: ours.ConvolutionModule(1, 1, False), adds={"causal": lambda m: False}),
    "ChunkCausalDepthwiseConv1d": Row(lambda: ours.ChunkCausalDepthwiseConv1d(1, 1), shapes=_depthwise_shapes),
    "FeedforwardModule": Row(lambda: ours.FeedforwardModule(1, 1, 0.0)),
    "ConvNeXt": Row(lambda: ours.ConvNeXt(1), adds={"padding": lambda m: m.depthwise_conv.padding}),
    "Conv2dSubsampling": Row(
        lambda: ours.Conv2dSubsampling(7, 1),
        shapes=_conv_embed_shapes,
        adds={
            "in_channels": lambda m: None,
            "layer3_channels": lambda m: m.conv[7].out_channels,
            "out_width": lambda m: m.out.in_features // m.conv[7].out_channels,
        },
    ),
    "Balancer": Row(lambda: training.Balancer(1, 0), drops=("mem_cutoff",)),
    "Whiten": Row(lambda: training.Whiten(1, 1.0, 1.0, 0.0)),
    "Dropout2": Row(lambda: training.Dropout2(0.0)),
    "Dropout3": Row(lambda: training.Dropout3(0.0, 0)),
    "ScaleGrad": Row(lambda: training.ScaleGrad(1.0)),
    "ScheduledFloat": Row(
        lambda: training.ScheduledFloat((0.0, 0.0)),
        replaces={"schedule": lambda m: training.PiecewiseLinear(*m.schedule.pairs)},
    ),
    "Identity": Row(nn.Identity),
}
