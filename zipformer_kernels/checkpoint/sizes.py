"""The arguments of a model, from the shapes of its weights and from what stands beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from torch import Tensor

from zipformer_kernels.checkpoint.read import CheckpointError
from zipformer_kernels.presets import CAUSAL, PRESETS, preset

PUBLISHED_HEADS = ((32, 4, 12), (48, 4, 18))
"""Channels per head of queries, positions and values in the recipes that have been published."""

HEAD_ARGUMENTS = ("num_heads", "query_head_dim", "pos_head_dim", "value_head_dim")


class Shapes:
    """The shapes of the weights of one part of a model."""

    def __init__(self, state: Mapping[str, Tensor], part: str) -> None:
        self.state = state
        self.part = part

    def __call__(self, name: str, ndim: int) -> tuple[int, ...]:
        """The shape of one. Raises CheckpointError where it is missing, empty or of another rank."""
        if name not in self.state:
            raise CheckpointError(f"not a Zipformer: no weights {self.part}.{name}")
        shape = tuple(self.state[name].shape)
        if len(shape) != ndim or 0 in shape:
            raise CheckpointError(
                f"not a Zipformer: {self.part}.{name} is {shape}, wanted {ndim} dimensions above zero"
            )
        return shape


def encoder_arguments(
    state: Mapping[str, Tensor], heads: Mapping[str, Any], stored: Mapping[Any, Any]
) -> dict[str, Any]:
    """Arguments of `Zipformer`.

    Args:
        state: the weights, by their names in a `Zipformer`.
        heads: what the caller says of `HEAD_ARGUMENTS`, by name: a number, or one for each stack.
        stored: the parameters of the training, if they lie beside the weights.
    Raises:
        CheckpointError: the weights are not a Zipformer's, or the arguments do not fit or do not suffice.
    """
    shapes = Shapes(state, "encoder")
    stacks = 1 + max((int(key.split(".")[1]) for key in state if re.match(r"encoders\.\d+\.", key)), default=0)
    source = "" if heads else " in the parameters that the checkpoint holds"
    known = heads or {name: stored[name] for name in HEAD_ARGUMENTS if stored.get(name) is not None}
    known = {name: _per_stack(name, value, stacks) for name, value in known.items()}
    causal = any(key.endswith("depthwise_conv.causal_conv.weight") for key in state)
    found: dict[str, list[int]] = {}
    for i in range(stacks):
        own = {name: values[i] for name, values in known.items()}
        for name, value in _stack_arguments(shapes, i, causal, own, source).items():
            found.setdefault(name, []).append(value)
    arguments = {name: tuple(values) for name, values in found.items()}
    (pos_dim, *others) = set(arguments.pop("pos_dim"))
    if others:
        raise CheckpointError(f"not a Zipformer: stacks with positions of {pos_dim} and of {others[0]} channels")
    arguments |= {
        "output_downsampling_factor": shapes("downsample_output.bias", 1)[0],
        "pos_dim": pos_dim,
        "causal": causal,
    }
    return arguments | _untold_by_shapes(arguments, stored)


def embed_arguments(state: Mapping[str, Tensor], feature_dim: Any) -> dict[str, int]:
    """Arguments of `Conv2dSubsampling`; `feature_dim` as the caller or the stored parameters have it, or None.

    Two strides of 2 give four numbers of bins the same weights. The models of all four are one, but for the bins that
    their `in_channels` lets in; without `feature_dim` it is the lowest here.
    """
    shapes = Shapes(state, "encoder_embed")
    channels = [shapes(f"conv.{i}.weight", 4)[0] for i in (0, 4, 7)]
    out_channels, flat = shapes("out.weight", 2)
    width, rest = divmod(flat, channels[2])
    if rest or not width:
        raise CheckpointError(
            f"not a Zipformer: encoder_embed.out.weight takes {flat} numbers of {channels[2]} channels"
        )
    fitting = range(4 * width + 3, 4 * width + 7)
    (bins,) = _numbers("feature_dim", feature_dim) if feature_dim is not None else fitting[:1]
    if bins not in fitting:
        raise CheckpointError(f"feature_dim: the weights are for {fitting[0]} to {fitting[-1]} bins, got {bins}")
    return {
        "in_channels": bins,
        "out_channels": out_channels,
        **{f"layer{i + 1}_channels": count for i, count in enumerate(channels)},
    }


def check_preset(arguments: Mapping[str, Any], name: str) -> None:
    """Raises CheckpointError where the arguments are not those of a preset, ValueError where there is none."""
    wrong = [f"{k} is {arguments[k]}, not {v}" for k, v in _sizes(name).items() if arguments[k] != v]
    if wrong:
        found = _matching_preset(arguments)
        hint = f" (it has the sizes of preset {found})" if found else ""
        raise CheckpointError(f"does not fit preset {name}{hint}: {'; '.join(wrong[:3])}")


def _stack_arguments(shapes: Shapes, i: int, causal: bool, known: Mapping[str, int], source: str) -> dict[str, int]:
    """Arguments of `Zipformer` for one stack."""
    downsampled = f"encoders.{i}.downsample.bias" in shapes.state
    stack = f"encoders.{i}.encoder" if downsampled else f"encoders.{i}"
    layers = {key.split(".layers.")[1].split(".")[0] for key in shapes.state if key.startswith(f"{stack}.layers.")}
    if not layers:
        raise CheckpointError(f"not a Zipformer: no weights {shapes.part}.{stack}.layers.*: stack {i} has no layers")
    layer = f"{stack}.layers.0"
    conv = "chunkwise_conv." if causal else ""
    positions, pos_dim = shapes(f"{layer}.self_attn_weights.linear_pos.weight", 2)
    queries = shapes(f"{layer}.self_attn_weights.in_proj.weight", 2)[0] - positions  # and as many for keys
    rows = {
        "query_head_dim": queries // 2,
        "pos_head_dim": positions,
        "value_head_dim": shapes(f"{layer}.self_attn1.in_proj.weight", 2)[0],
    }
    if queries <= 0 or queries % 2:
        raise CheckpointError(f"not a Zipformer: {queries} rows for the queries and keys of stack {i}")
    return {
        "downsampling_factor": shapes(f"encoders.{i}.downsample.bias", 1)[0] if downsampled else 1,
        "encoder_dim": shapes(f"{layer}.norm.bias", 1)[0],
        "num_encoder_layers": len(layers),
        "feedforward_dim": shapes(f"{layer}.feed_forward2.in_proj.weight", 2)[0],
        "cnn_module_kernel": shapes(f"{layer}.conv_module1.depthwise_conv.{conv}weight", 3)[2],
        "pos_dim": pos_dim,
        **_heads(rows, i, known, source),
    }


def _heads(rows: Mapping[str, int], i: int, known: Mapping[str, int], source: str) -> dict[str, int]:
    """How a stack's rows split into heads, which shapes do not tell: any common divisor would do.

    Args:
        rows: heads times channels per head, by argument.
        i: which stack, for errors.
        known: some of `HEAD_ARGUMENTS`; one of them tells the rest.
        source: where these are from, for errors.
    """
    common = math.gcd(*rows.values())
    splits = [
        {"num_heads": heads, **{name: count // heads for name, count in rows.items()}}
        for heads in range(1, common + 1)
        if common % heads == 0
    ]
    published = [split for split in splits if tuple(split.values())[1:] in PUBLISHED_HEADS]
    fitting = [split for split in splits if known.items() <= split.items()]
    if known and not fitting:
        said = ", ".join(f"{name} {value}" for name, value in known.items())
        raise CheckpointError(f"{said}{source}: does not fit the weights of stack {i}, but {_told(splits)}")
    if len(fitting) > 1 and not published:
        raise CheckpointError(
            f"num_heads: the weights of stack {i} fit {_told(splits)}: say which by num_heads, pos_head_dim, "
            "query_head_dim or value_head_dim"
        )
    (split,) = fitting if len(fitting) == 1 else published
    return split


def _told(splits: list[dict[str, int]]) -> str:
    return " or ".join(", ".join(f"{name} {value}" for name, value in split.items()) for split in splits)


def _untold_by_shapes(arguments: Mapping[str, Any], stored: Mapping[Any, Any]) -> dict[str, Any]:
    """What no weight depends on: from the stored parameters, else from the recipe."""
    found = _matching_preset(arguments)
    unmasked = PRESETS[found]["encoder_unmasked_dim"] if found else min(arguments["encoder_dim"])
    names = {"encoder_unmasked_dim": unmasked, **(CAUSAL if arguments["causal"] else {})}
    return {name: _numbers(name, stored[name]) if stored.get(name) is not None else names[name] for name in names}


def _numbers(name: str, value: Any) -> tuple[int, ...]:
    """Whole numbers as people and icefall's parameters write them: 4, (4, 8), "4,8"."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    if parts and all(
        (isinstance(part, Integral) and not isinstance(part, bool))
        or (isinstance(part, str) and re.fullmatch(r"\s*-?\d+\s*", part))
        for part in parts
    ):
        return tuple(map(int, parts))
    raise CheckpointError(f"{name}: wanted a whole number or several, got {value!r}")


def _per_stack(name: str, value: Any, stacks: int) -> tuple[int, ...]:
    numbers = _numbers(name, value)
    numbers = numbers * stacks if len(numbers) == 1 else numbers
    if len(numbers) != stacks:
        raise CheckpointError(f"{name}: wanted one number or {stacks}, one per stack, got {value!r}")
    return numbers


def _sizes(preset_name: str) -> dict[str, Any]:
    """What shapes tell of a preset, as `encoder_arguments` gives it."""
    sizes = {name: value for name, value in preset(preset_name).items() if name != "encoder_unmasked_dim"}
    stacks = len(sizes["downsampling_factor"])
    per_head = ("query_head_dim", "pos_head_dim", "value_head_dim")
    return sizes | {name: (sizes[name],) * stacks for name in per_head}


def _matching_preset(arguments: Mapping[str, Any]) -> str | None:
    return next((name for name in PRESETS if _sizes(name).items() <= arguments.items()), None)
