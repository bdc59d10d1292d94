"""Loads checkpoints that icefall's recipes and others have written, without running code from them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zipformer_kernels.checkpoint.read import CheckpointError, describe, mapping_of, read, reading, tensor_of
from zipformer_kernels.checkpoint.sizes import (
    HEAD_ARGUMENTS,
    check_preset,
    embed_arguments,
    encoder_arguments,
)
from zipformer_kernels.modules.encoder import Zipformer
from zipformer_kernels.modules.subsampling import Conv2dSubsampling
from zipformer_kernels.presets import preset

__all__ = ["CheckpointError", "load_checkpoint", "load_encoder"]

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What DistributedDataParallel, AveragedModel, torch.compile and others put between the parts of a weight's name."""

STATE_DICTS = ("model", "state_dict", "model_state_dict", "module")
"""Under which names a checkpoint holds the weights: icefall, Lightning, many scripts, DeepSpeed."""

EMBED, ENCODER = "encoder_embed.", "encoder."


def load_checkpoint(
    path: str | Path,
    preset_name: str | None = None,
    causal: bool | None = None,
    *,
    model_avg: bool = False,
    prefix: str | None = None,
    num_heads: int | tuple[int, ...] | None = None,
    query_head_dim: int | tuple[int, ...] | None = None,
    pos_head_dim: int | tuple[int, ...] | None = None,
    value_head_dim: int | tuple[int, ...] | None = None,
    feature_dim: int | None = None,
) -> tuple[Conv2dSubsampling, Zipformer]:
    """The conv embed and the encoder of a checkpoint, in eval mode.

    Nothing that a file names is imported, and no code of it runs: other objects beside the weights (training
    parameters of any class, samplers, schedulers) are passed over.

    Sizes are read off the shapes of the weights. Some things shapes do not tell:

    - How rows split into heads. Weights of 4 heads with 4 channels for positions have the shapes of 2 heads with 8.
      What an argument says holds, else what icefall's parameters beside the weights say, else the split of the
      published recipes (query, position and value channels 32, 4, 12 or 48, 4, 18) if it fits, else the only one
      there is; otherwise the checkpoint is refused. One of the four arguments suffices.
    - Filterbank bins: four numbers of them have the same weights and the same model. Without `feature_dim` and without
      icefall's parameters, the conv embed takes all four, its `in_channels` being None.
    - Chunk sizes and left contexts of a causal model, and `encoder_unmasked_dim`, which matters in training only:
      icefall's parameters if they are there, else the recipe's and the preset's, or the narrowest width for sizes of
      no preset.

    Args:
        path: a safetensors file, or one written by `torch.save` of any version or `pickle.dump`: a state_dict, or a
            dict that has it under ``model``, ``state_dict``, ``model_state_dict`` or ``module``. Keys start with
            ``encoder_embed.`` and ``encoder.``, whatever (``module.``, ``_orig_mod.``, ``model.``) stands before
            that; all others, of decoder and joiner, are left alone.
        preset_name: "S", "M", "L" or "XL", if the checkpoint must have the sizes of that preset.
        causal: whether the checkpoint must be causal or not; None for either.
        model_avg: take the average over the training that icefall saves as ``model_avg``, not the last weights.
        prefix: what stands before ``encoder.`` in the names, without wrappers, if the file holds several encoders.
        num_heads, query_head_dim, pos_head_dim, value_head_dim: as in `Zipformer`.
        feature_dim: bins of the features.
    Raises:
        CheckpointError: the file is missing, broken or of another kind, its weights do not fit, or an argument is
            needed.
        ValueError: there is no such preset.
    """
    heads = _given(locals())
    if preset_name is not None:
        preset(preset_name)
    with reading(path):
        weights, parameters = _contents(read(path), model_avg)
        before = _prefix(weights, prefix, ENCODER)
        encoder = _encoder(_part(weights, before), parameters, heads, preset_name, causal)
        state = _part(weights, before.removesuffix(ENCODER) + EMBED)
        if not state:
            raise CheckpointError(f"no weights of {EMBED}*, but {_first(weights)}; load_encoder takes an encoder alone")
        bins = parameters.get("feature_dim") if feature_dim is None else feature_dim
        embed = Conv2dSubsampling.from_preset("S", **embed_arguments(state, bins))
        if bins is None:
            embed.in_channels = None
        _load(embed, state, "encoder_embed")
    return embed.eval(), encoder


def load_encoder(
    path: str | Path,
    preset_name: str | None = None,
    causal: bool | None = None,
    *,
    model_avg: bool = False,
    prefix: str | None = None,
    num_heads: int | tuple[int, ...] | None = None,
    query_head_dim: int | tuple[int, ...] | None = None,
    pos_head_dim: int | tuple[int, ...] | None = None,
    value_head_dim: int | tuple[int, ...] | None = None,
) -> Zipformer:
    """The encoder of a checkpoint, in eval mode; as `load_checkpoint`, but without a conv embed.

    The weights may also be those of a `Zipformer` alone, whose names start with ``encoders.``.
    """
    heads = _given(locals())
    if preset_name is not None:
        preset(preset_name)
    with reading(path):
        weights, parameters = _contents(read(path), model_avg)
        return _encoder(_part(weights, _prefix(weights, prefix, "")), parameters, heads, preset_name, causal)


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `HEAD_ARGUMENTS` that the caller has given."""
    return {name: arguments[name] for name in HEAD_ARGUMENTS if arguments[name] is not None}


def _contents(content: Any, model_avg: bool) -> tuple[dict[str, Any], Mapping[Any, Any]]:
    """The weights by their names without wrappers, and the parameters of the training, if they are there."""
    outer = mapping_of(content)
    if outer is None:
        raise CheckpointError(f"is {describe(content)}, wanted a state_dict, or a dict with one under 'model'")
    names = ("model_avg",) if model_avg else STATE_DICTS
    if model_avg and mapping_of(outer.get("model_avg")) is None:
        raise CheckpointError(f"model_avg: it holds none, but {_first(map(str, outer))}")
    inner = outer
    for name in names:
        inner = mapping_of(inner.get(name)) or inner
    if "_modules" in inner:
        raise CheckpointError("is a pickled torch.nn.Module, whose class is not imported: save its state_dict()")
    weights: dict[str, Any] = {}
    for key, value in inner.items():
        name = ".".join(part for part in str(key).split(".") if part not in WRAPPERS)
        if name in weights:
            raise CheckpointError(f"holds {name} twice, once as {key}")
        weights[name] = value
    return weights, _parameters([one for one in map(mapping_of, (content, *outer.values())) if one])


def _parameters(candidates: list[Mapping[Any, Any]]) -> Mapping[Any, Any]:
    """Of all that may be a training's parameters, those that name what only a Zipformer has, and the bins."""
    heads = next((one for one in candidates if not {*HEAD_ARGUMENTS[1:]}.isdisjoint(one)), {})
    bins = next((one["feature_dim"] for one in candidates if "feature_dim" in one), None)
    return {"feature_dim": bins, **heads}


def _prefix(weights: Mapping[str, Any], before: str | None, end: str) -> str:
    """What stands before ``encoders.`` in the names of an encoder's weights: something that ends in `end`."""
    matches = (re.match(r"(|.*?\.)encoders\.\d+\.", name) for name in weights)
    found = {match[1] for match in matches if match and match[1].endswith(end)}
    if before is not None:
        start = f"{before.rstrip('.')}." if before else ""
        found &= {start, start + ENCODER}
    if ENCODER in found:
        return ENCODER
    if len(found) > 1:
        several = ", ".join(sorted(one.removesuffix(ENCODER) or "''" for one in found))
        raise CheckpointError(f"prefix: it holds several encoders, wanted one of {several}")
    if not found:
        asked = "" if before is None else f"prefix {before!r}: "
        raise CheckpointError(f"{asked}no weights of {ENCODER}encoders.*, but {_first(weights)}")
    return found.pop()


def _part(weights: Mapping[str, Any], start: str) -> dict[str, Tensor]:
    """The weights whose names begin with `start`, by the rest of their names."""
    part = {}
    for name, value in weights.items():
        if name.startswith(start):
            with reading(name):
                part[name.removeprefix(start)] = tensor_of(value)
    return part


def _encoder(
    state: Mapping[str, Tensor],
    parameters: Mapping[Any, Any],
    heads: Mapping[str, Any],
    preset_name: str | None,
    causal: bool | None,
) -> Zipformer:
    arguments = encoder_arguments(state, heads, parameters)
    if preset_name is not None:
        check_preset(arguments, preset_name)
    if causal is not None and causal != arguments["causal"]:
        raise CheckpointError(f"the model is {'' if arguments['causal'] else 'not '}causal")
    try:
        encoder = Zipformer(**arguments)
    except ValueError as error:
        raise CheckpointError(f"not a Zipformer: {error}") from error
    _load(encoder, state, "encoder")
    return encoder.eval()


def _load(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    wanted = module.state_dict()
    wrong = [f"{key} is missing" for key in wanted if key not in state]
    wrong += [f"{key} has no place" for key in state if key not in wanted]
    for key in (key for key in wanted if key in state):
        if state[key].shape != wanted[key].shape:
            wrong.append(f"{key} is {tuple(state[key].shape)}, not {tuple(wanted[key].shape)}")
        elif not state[key].is_floating_point():
            wrong.append(f"{key} is of {state[key].dtype}, not floating-point")
    if wrong:
        raise CheckpointError(f"{what} does not fit: {_first(wrong)}")
    module.load_state_dict(state, strict=True)


def _first(items: Iterable[str], count: int = 3) -> str:
    items = list(items)
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return "; ".join(items[:count]) + more if items else "none at all"
