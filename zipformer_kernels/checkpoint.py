"""Loads checkpoints that icefall's recipes and others have written, without running code from them."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zipformer_kernels.encoder import Zipformer
from zipformer_kernels.modules.subsampling import Conv2dSubsampling
from zipformer_kernels.presets import CAUSAL, PRESETS, preset

POS_HEAD_DIM = 4  # shapes tell only its product with the number of heads; every published recipe uses 4

# Harmless classes that icefall's training parameters bring into a checkpoint, beside what torch allows.
# Paths become pure paths: those of another operating system cannot be made.
SAFE_CLASSES: list[Any] = [
    argparse.Namespace,
    *((pathlib.PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((pathlib.PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
]


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit."""


def load_checkpoint(
    path: str | Path, preset_name: str | None = None, causal: bool | None = None
) -> tuple[Conv2dSubsampling, Zipformer]:
    """The conv embed and the encoder of a checkpoint, in eval mode.

    Sizes are read off the shapes of the weights. What shapes cannot tell is taken from the recipes:
    `pos_head_dim` 4, and for a causal model the choice of chunk sizes and left contexts. What matters in
    training only, `encoder_unmasked_dim`, is the preset's if the sizes are one's, else the narrowest width.

    Args:
        path: a ``.safetensors`` file, or one written by `torch.save`: a state_dict, or a dict that has it
            under ``model`` or ``state_dict``, as icefall's ``epoch-*.pt`` and ``pretrained.pt`` do. Keys
            start with ``encoder_embed.`` and ``encoder.``, or with ``module.`` before that; all others, of
            decoder and joiner, are left alone.
        preset_name: "S", "M" or "L", if the checkpoint must have the sizes of that preset.
        causal: whether the checkpoint must be causal or not; None for either.
    Raises:
        CheckpointError: the file is missing or broken, needs classes other than tensors and plain data, or
            its weights do not fit.
        ValueError: there is no such preset.
    """
    weights = _weights(path)
    parts = {
        name: {k.removeprefix(name + "."): v for k, v in weights.items() if k.startswith(name + ".")}
        for name in ("encoder_embed", "encoder")
    }
    if not all(parts.values()):
        raise CheckpointError(f"{path}: no weights of encoder_embed.* and encoder.*, but {_first(weights)}")
    try:
        embed_arguments = _embed_arguments(parts["encoder_embed"])
        arguments = _encoder_arguments(parts["encoder"])
    except KeyError as error:
        raise CheckpointError(f"{path}: not a Zipformer: no weights {error.args[0]}") from error
    except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: not a Zipformer: weights of other shapes: {error}") from error

    found = _matching_preset(arguments)
    if preset_name is not None:
        wrong = [f"{k} is {arguments[k]}, not {v}" for k, v in _sizes(preset_name).items() if arguments[k] != v]
        if wrong:
            hint = f" (it has the sizes of preset {found})" if found else ""
            raise CheckpointError(f"{path}: does not fit preset {preset_name}{hint}: {_first(wrong)}")
    if causal is not None and causal != arguments["causal"]:
        raise CheckpointError(f"{path}: the model is {'' if arguments['causal'] else 'not '}causal")
    arguments["encoder_unmasked_dim"] = (
        PRESETS[found]["encoder_unmasked_dim"] if found else min(arguments["encoder_dim"])
    )

    embed = Conv2dSubsampling.from_preset("S", **embed_arguments)
    encoder = Zipformer(**arguments, **(CAUSAL if arguments["causal"] else {}))
    _load(embed, parts["encoder_embed"], f"{path}: encoder_embed")
    _load(encoder, parts["encoder"], f"{path}: encoder")
    return embed.eval(), encoder.eval()


def _weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's model by name, without the prefix that DistributedDataParallel adds."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file")
    content = _read(path)
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{path}: wanted a state_dict, or a dict with one under 'model'")
    weights = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    return weights


def _read(path: str | Path) -> Any:
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # an optional dependency

            return load_file(path)
        with torch.serialization.safe_globals(SAFE_CLASSES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # there is hardly an exception that a broken file cannot raise
        unsafe = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and unsafe:
            raise CheckpointError(
                f"{path}: needs the class {unsafe[1]}, and code from a checkpoint is never run: save it "
                f"again with its weights alone, torch.save({{'model': checkpoint['model']}}, ...)"
            ) from error
        lines = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {lines[0]}") from error


def _encoder_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `Zipformer` from the shapes of its weights. Raises KeyError for a missing name."""
    per_stack: dict[str, list[int]] = {}
    num_stacks = 1 + max((int(k.split(".")[1]) for k in state if re.match(r"encoders\.\d+\.", k)), default=0)
    causal = any(key.endswith("depthwise_conv.causal_conv.weight") for key in state)
    for i in range(num_stacks):
        downsampled = f"encoders.{i}.downsample.bias" in state
        stack = f"encoders.{i}.encoder" if downsampled else f"encoders.{i}"
        layer = f"{stack}.layers.0"
        rows, pos_dim = state[f"{layer}.self_attn_weights.linear_pos.weight"].shape
        heads = rows // POS_HEAD_DIM
        conv = "chunkwise_conv." if causal else ""
        query_and_pos = len(state[f"{layer}.self_attn_weights.in_proj.weight"]) // heads
        found = {
            "downsampling_factor": len(state[f"encoders.{i}.downsample.bias"]) if downsampled else 1,
            "encoder_dim": len(state[f"{layer}.norm.bias"]),
            "num_encoder_layers": len(
                {k.split(".layers.")[1].split(".")[0] for k in state if k.startswith(stack + ".layers.")}
            ),
            "query_head_dim": (query_and_pos - POS_HEAD_DIM) // 2,
            "value_head_dim": len(state[f"{layer}.self_attn1.in_proj.weight"]) // heads,
            "num_heads": heads,
            "feedforward_dim": len(state[f"{layer}.feed_forward2.in_proj.weight"]),
            "cnn_module_kernel": state[f"{layer}.conv_module1.depthwise_conv.{conv}weight"].shape[2],
        }
        for name, value in found.items():
            per_stack.setdefault(name, []).append(value)
    return {
        **{name: tuple(values) for name, values in per_stack.items()},
        "output_downsampling_factor": len(state["downsample_output.bias"]),
        "pos_head_dim": POS_HEAD_DIM,
        "pos_dim": pos_dim,
        "causal": causal,
    }


def _embed_arguments(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Arguments of `Conv2dSubsampling` from the shapes of its weights. Raises KeyError for a missing name."""
    channels = [len(state[f"conv.{i}.weight"]) for i in (0, 4, 7)]
    out_channels, flat = state["out.weight"].shape
    return {
        # Two strides of 2 make four numbers of bins one width; of them 80, 40 and their like is this.
        "in_channels": 4 * (flat // channels[2]) + 4,
        "out_channels": out_channels,
        **{f"layer{i + 1}_channels": count for i, count in enumerate(channels)},
    }


def _sizes(preset_name: str) -> dict[str, Any]:
    """What shapes tell of a preset, as `_encoder_arguments` gives it."""
    sizes = {name: value for name, value in preset(preset_name).items() if name != "encoder_unmasked_dim"}
    stacks = len(sizes["downsampling_factor"])
    return sizes | {name: (sizes[name],) * stacks for name in ("query_head_dim", "value_head_dim")}


def _matching_preset(arguments: Mapping[str, Any]) -> str | None:
    return next((name for name in PRESETS if _sizes(name).items() <= arguments.items()), None)


def _load(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    wanted = module.state_dict()
    wrong = [f"{key} is missing" for key in wanted if key not in state]
    wrong += [f"{key} has no place" for key in state if key not in wanted]
    wrong += [
        f"{key} is {tuple(state[key].shape)}, not {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    if wrong:
        raise CheckpointError(f"{what} does not fit: {_first(wrong)}")
    module.load_state_dict(state, strict=True)


def _first(items: Iterable[str], count: int = 3) -> str:
    items = list(items)
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return "; ".join(items[:count]) + more if items else "none at all"
