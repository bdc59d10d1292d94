"""Swaps the modules of a model built from upstream's classes for ours, in place, and back.

A swap keeps the module object and gives it our class: attributes, parameters, buffers, children, hooks and
the training flag are not copied but stay where they are. So everything that refers to them stays valid:
optimizers, ``state_dict`` keys, checkpoints, a DistributedDataParallel around the model, modules used in two
places, and the model itself where it is one of those swapped.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from zipformer_kernels import modules as ours
from zipformer_kernels import training
from zipformer_kernels.encoder import Zipformer

Shapes = dict[str, tuple["int | None", ...]]  # by dotted path; None for any size

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
ORIGINAL = "_upstream_original"  # the attribute under which a swapped module keeps its `_Original`
MISSING = object()


@dataclass(frozen=True)
class Report:
    """What `convert` or `revert` did. ``print`` it for a summary.

    Attributes:
        swapped: (path, class name) of each module swapped; the path as in `named_modules`, "" for the model.
        kept: (path, class name, reason) of each module that should have been swapped but was left as it was.
    """

    swapped: list[tuple[str, str]] = field(default_factory=list)
    kept: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        counts = Counter(name for _, name in self.swapped)
        lines = [f"swapped: {len(self.swapped)}"]
        lines += [f"  {count:5} {name}" for name, count in sorted(counts.items())]
        lines += [f"kept: {len(self.kept)}"]
        lines += [f"  {path or '(the model)'} ({name}): {reason}" for path, name, reason in self.kept]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Row:
    """How to recognise one class of upstream's, and what becomes of it.

    Attributes:
        build: makes the smallest module of ours; upstream's must have every attribute that it has.
        ops: the ops for whose sake the class is swapped; none for a class that only comes along.
        shapes: the shapes that the parameters must have, given the module's own settings.
        drops: attributes that only upstream's class has; not every version of it has all.
        adds: attributes that only ours has, from the module.
        replaces: attributes that ours needs otherwise, from the module.
        arguments: the arguments of upstream's forward, where they are not named as ours.
    """

    build: Callable[[], nn.Module]
    ops: tuple[str, ...] = ()
    shapes: Callable[[Any], Shapes] = lambda module: {}
    drops: tuple[str, ...] = ()
    adds: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    replaces: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    arguments: tuple[str, ...] | None = None

    @cached_property
    def example(self) -> nn.Module:
        with torch.device("meta"):  # where initial values take no memory and no random numbers
            return self.build()

    def mismatch(self, module: nn.Module) -> str | None:
        """Why `module` cannot become ours, or None if it can."""
        wanted = _attributes(self.example)
        missing = wanted - _attributes(module) - self.adds.keys()
        if missing:
            return f"it has no {_listed(missing)}"
        unknown = {*module._parameters, *module._buffers, *module._modules} - wanted
        if unknown:
            return f"it has {_listed(unknown)}, which ours would not use"
        patched = {name for name in vars(module) if callable(getattr(type(self.example), name, None))}
        if patched:
            return f"its {_listed(patched)} was replaced on the object"
        return self._mismatched_methods(type(module)) or self._mismatched_shapes(module)

    def _mismatched_methods(self, theirs: type) -> str | None:
        for name in ("forward", "streaming_forward"):
            if hasattr(type(self.example), name):
                wanted = self.arguments or _arguments(getattr(type(self.example), name))
                got = _arguments(getattr(theirs, name, None))
                if got != wanted:
                    return f"its {name} takes ({', '.join(got)}), wanted ({', '.join(wanted)})"
        return None

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

    def changes(self, module: nn.Module) -> dict[str, Any]:
        """The attributes that a swap changes, with their new values."""
        values = {name: value(module) for name, value in {**self.adds, **self.replaces}.items()}
        values |= dict.fromkeys(self.drops, MISSING)
        values[ORIGINAL] = _Original(type(module), {name: vars(module).get(name, MISSING) for name in values})
        return values


@dataclass(frozen=True)
class _Original:
    """What a swapped module was: its class, and the attributes that the swap changed."""

    cls: type[nn.Module]
    attributes: dict[str, Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Original:
        kept = {k: v if v is MISSING else copy.deepcopy(v, memo) for k, v in self.attributes.items()}
        return _Original(self.cls, kept)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled as None: a pickled model must load where upstream cannot be imported, and upstream's
        # compiled functions cannot be pickled at all.
        return type(None), ()


def convert(model: nn.Module, ops: Iterable[str] | None = None) -> Report:
    """Swaps, in place, every module of `model` that is of a class of upstream's for ours.

    The model may hold modules of the package ``zipformer`` or of an icefall recipe. They are recognised by
    the name of their class, by the attributes, parameters and children they have, by the arguments of their
    methods and by the shapes of their parameters, not by where the class was imported from. Whatever does not
    fit in all of this, such as a subclass, is kept and reported. Only an edit of a method's body is not seen.

    Modules that pass attention weights or masks to each other are swapped together or not at all: a layer
    with its four modules that use attention, and stacks and encoder only if all inside them are.

    Afterwards ``isinstance`` sees our classes. A pickled copy of the model needs this package and not
    upstream, and cannot be reverted; a deep copy can. Swapping twice does nothing more.

    Args:
        model: the model, or any part of one.
        ops: the ops to swap modules for: any of "swoosh", "bias_norm", "swoosh_linear", "attention",
            "nonlin_attention". By default all, and every module of upstream's besides.

    Returns:
        What was swapped, and what was kept and why.

    Raises:
        TypeError: `model` is not a module, or `ops` a single string.
        ValueError: there is no such op.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
    rows = _selected(ops)
    report = Report()
    reasons: dict[nn.Module, str | None] = {}
    paths = {module: path for path, module in model.named_modules()}
    for module in paths:
        name = _upstream_name(type(module))
        if name in rows and not isinstance(module, type(rows[name].example)):
            subclass = type(module).__name__ != name or _upstream_name(*type(module).__bases__) is not None
            reasons[module] = f"it is a subclass of {name}" if subclass else rows[name].mismatch(module)
    _keep_attention_together(paths, reasons)

    swaps = []
    for module, reason in reasons.items():
        name = type(module).__name__
        if reason is None:
            report.swapped.append((paths[module], name))
            swaps.append((module, type(rows[name].example), rows[name].changes(module)))
        else:
            report.kept.append((paths[module], name, reason))
    for swap in swaps:  # only now, so that an error leaves the model whole
        _change(*swap)
    return report


def revert(model: nn.Module) -> Report:
    """Undoes `convert`: every module it swapped gets back its class and the attributes the swap had changed.

    What training has changed since (parameters, batch counts, the state of a Whiten) stays.

    Args:
        model: the model, or any part of one.

    Returns:
        What was swapped back, and what was kept: modules that were pickled, and so forgot what they were.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    for path, module in model.named_modules():
        if ORIGINAL not in vars(module):
            continue
        name, original = type(module).__name__, getattr(module, ORIGINAL)
        if original is None:
            report.kept.append((path, name, "it was pickled since it was swapped"))
            continue
        _change(module, original.cls, {**original.attributes, ORIGINAL: MISSING})
        report.swapped.append((path, original.cls.__name__))
    return report


LAYER = "ZipformerEncoderLayer"
LAYER_PARTS = ("self_attn_weights", "self_attn1", "self_attn2", "nonlin_attention")
PART_CLASSES = ("RelPositionMultiheadAttentionWeights", "SelfAttention", "NonlinAttention")
STACKS = (LAYER, "ZipformerEncoder", "DownsampledZipformerEncoder", "Zipformer", "Zipformer2")


def _keep_attention_together(paths: dict[nn.Module, str], reasons: dict[nn.Module, str | None]) -> None:
    """Adds reasons to keep modules that would hand attention weights or masks to others that are kept."""

    def kept(module: nn.Module, classes: tuple[str, ...]) -> bool:
        return reasons.get(module) is not None and _is_of(module, classes)

    parts_of_swapped = set()
    for layer in [module for module in paths if _is_of(module, (LAYER,))]:
        parts = {name: getattr(layer, name, None) for name in LAYER_PARTS}
        odd = [name for name, p in parts.items() if not _is_of(p, PART_CLASSES) or kept(p, PART_CLASSES)]
        if odd and layer in reasons:
            reasons[layer] = reasons[layer] or f"its {_listed(odd)}, which it needs swapped too, is kept"
        if not kept(layer, (LAYER,)):
            parts_of_swapped.update(parts.values())
    for module in reasons:
        if _is_of(module, PART_CLASSES) and module not in parts_of_swapped:
            reasons[module] = reasons[module] or "there is no layer around it that is swapped too"
    for module in reversed(reasons):  # from the innermost out
        inside = [paths[m] for m in module.modules() if m is not module and kept(m, STACKS)]
        if inside and _is_of(module, STACKS):
            reasons[module] = reasons[module] or f"{inside[0]}, which it needs swapped too, is kept"


def _is_of(module: nn.Module | None, names: tuple[str, ...]) -> bool:
    return _upstream_name(type(module)) in names


def _selected(ops: Iterable[str] | None) -> dict[str, _Row]:
    if ops is None:
        return _ROWS
    if isinstance(ops, str):
        raise TypeError(f"ops: wanted a collection of names, got the string {ops!r}")
    ops = set(ops)
    known = {op for row in _ROWS.values() for op in row.ops}
    if ops - known:
        raise ValueError(f"ops: wanted names among {_listed(known)}, got {_listed(ops - known)}")
    return {name: row for name, row in _ROWS.items() if ops & set(row.ops)}


def _upstream_name(*classes: type) -> str | None:
    """The nearest name in the table that one of the classes or their bases bears."""
    return next((base.__name__ for cls in classes for base in cls.__mro__ if base.__name__ in _ROWS), None)


def _attributes(module: nn.Module) -> set[str]:
    return set(vars(module)) - OF_EVERY_MODULE | {*module._parameters, *module._buffers, *module._modules}


def _arguments(method: Callable[..., Any] | None) -> tuple[str, ...]:
    return () if method is None else tuple(inspect.signature(method).parameters)[1:]


def _change(module: nn.Module, cls: type[nn.Module], attributes: dict[str, Any]) -> None:
    """Gives a module another class and other plain attributes; MISSING stands for none."""
    module.__class__ = cls
    for name, value in attributes.items():
        if value is MISSING:
            vars(module).pop(name, None)
        else:
            vars(module)[name] = value


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


ATTENTION = ("attention", "nonlin_attention")


def _encoder() -> nn.Module:
    return Zipformer(downsampling_factor=(1,), encoder_dim=8, encoder_unmasked_dim=8, num_heads=1)


def _layer() -> nn.Module:
    return ours.ZipformerEncoderLayer(8, 2, 1, 1, 1, 1, 8)


def _stack() -> nn.Module:
    return ours.ZipformerEncoder(_layer(), 1, pos_dim=2, dropout=0.0, warmup_begin=0.0, warmup_end=1.0)


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
    return {"conv.0.weight": (None, 1, 3, 3), "out.weight": (None, m.out_width * m.layer3_channels)}


_ROWS = {
    "SwooshL": _Row(ours.SwooshL, ("swoosh",), drops=("func",)),
    "SwooshR": _Row(ours.SwooshR, ("swoosh",), drops=("func",)),
    "BiasNorm": _Row(
        lambda: ours.BiasNorm(1),
        ("bias_norm",),
        shapes=lambda m: {"log_scale": (), "bias": (m.num_channels,)},
    ),
    "ActivationDropoutAndLinear": _Row(
        lambda: ours.ActivationDropoutAndLinear(1, 1),
        ("swoosh_linear",),
        shapes=_swoosh_linear_shapes,
        drops=("forward_func", "backward_func"),
    ),
    "RelPositionMultiheadAttentionWeights": _Row(
        lambda: ours.RelPositionMultiheadAttentionWeights(1, 2, 1, 1, 1), ATTENTION, shapes=_weights_shapes
    ),
    "SelfAttention": _Row(lambda: ours.SelfAttention(1, 1, 1), ATTENTION, shapes=_self_attention_shapes),
    "NonlinAttention": _Row(lambda: ours.NonlinAttention(1, 1), ATTENTION, shapes=_nonlin_shapes),
    LAYER: _Row(_layer, ATTENTION, shapes=lambda m: {"bypass_scale": (m.embed_dim,)}),
    "ZipformerEncoder": _Row(_stack, ATTENTION),
    "DownsampledZipformerEncoder": _Row(
        lambda: ours.DownsampledZipformerEncoder(_stack(), 8, 2, 0.0, False), ATTENTION
    ),
    "Zipformer": _Row(_encoder, ATTENTION),
    "Zipformer2": _Row(_encoder, ATTENTION),
    "BypassModule": _Row(lambda: ours.BypassModule(1), shapes=lambda m: {"bypass_scale": (None,)}),
    "SimpleDownsample": _Row(
        lambda: ours.SimpleDownsample(1, 1, 0.0, False), shapes=lambda m: {"bias": (m.downsample,)}
    ),
    "SimpleUpsample": _Row(lambda: ours.SimpleUpsample(1, 1)),
    "CompactRelPositionalEncoding": _Row(
        lambda: ours.CompactRelPositionalEncoding(2, 0.0),
        # Upstream's table takes the dtype of the last input, and may have lost digits; ours is made anew.
        adds={"max_len": lambda m: 1000},
        replaces={"pe": lambda m: None},
    ),
    "ConvolutionModule": _Row(lambda: ours.ConvolutionModule(1, 1, False)),
    "ChunkCausalDepthwiseConv1d": _Row(lambda: ours.ChunkCausalDepthwiseConv1d(1, 1), shapes=_depthwise_shapes),
    "FeedforwardModule": _Row(lambda: ours.FeedforwardModule(1, 1, 0.0)),
    "ConvNeXt": _Row(lambda: ours.ConvNeXt(1)),
    "Conv2dSubsampling": _Row(
        lambda: ours.Conv2dSubsampling(7, 1), shapes=_conv_embed_shapes, adds={"in_channels": lambda m: None}
    ),
    "Balancer": _Row(lambda: training.Balancer(1, 0), drops=("mem_cutoff",)),
    "Whiten": _Row(lambda: training.Whiten(1, 1.0, 1.0, 0.0)),
    "Dropout2": _Row(lambda: training.Dropout2(0.0)),
    "Dropout3": _Row(lambda: training.Dropout3(0.0, 0)),
    "ScaleGrad": _Row(lambda: training.ScaleGrad(1.0)),
    "ScheduledFloat": _Row(
        lambda: training.ScheduledFloat((0.0, 0.0)),
        replaces={"schedule": lambda m: training.PiecewiseLinear(*m.schedule.pairs)},
    ),
    "Identity": _Row(nn.Identity, arguments=("x",)),
}
