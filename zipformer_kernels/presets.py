"""The published sizes of Zipformer: S, M and L of table 1 in the paper, arXiv:2310.11230, and icefall's XL."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "output_downsampling_factor": 2,
    "downsampling_factor": (1, 2, 4, 8, 4, 2),
    "query_head_dim": 32,
    "pos_head_dim": 4,
    "value_head_dim": 12,
    "num_heads": (4, 4, 4, 8, 4, 4),
    "cnn_module_kernel": (31, 31, 15, 15, 15, 31),
    "pos_dim": 48,
}

# Arguments of `Zipformer`.
PRESETS: dict[str, dict[str, Any]] = {
    "S": _COMMON
    | {
        "num_encoder_layers": (2, 2, 2, 2, 2, 2),
        "encoder_dim": (192, 256, 256, 256, 256, 256),
        "feedforward_dim": (512, 768, 768, 768, 768, 768),
        "encoder_unmasked_dim": (192, 192, 192, 192, 192, 192),
    },
    "M": _COMMON
    | {
        "num_encoder_layers": (2, 2, 3, 4, 3, 2),
        "encoder_dim": (192, 256, 384, 512, 384, 256),
        "feedforward_dim": (512, 768, 1024, 1536, 1024, 768),
        "encoder_unmasked_dim": (192, 192, 256, 256, 256, 192),
    },
    "L": _COMMON
    | {
        "num_encoder_layers": (2, 2, 4, 5, 4, 2),
        "encoder_dim": (192, 256, 512, 768, 512, 256),
        "feedforward_dim": (512, 768, 1536, 2048, 1536, 768),
        "encoder_unmasked_dim": (192, 192, 256, 320, 256, 192),
    },
    "XL": _COMMON
    | {
        "num_encoder_layers": (2, 2, 4, 5, 4, 2),
        "encoder_dim": (192, 384, 768, 1024, 768, 384),
        "feedforward_dim": (512, 1024, 2048, 3072, 2048, 1024),
        "encoder_unmasked_dim": (192, 256, 320, 512, 320, 256),
    },
}

# What the recipe trains a causal model with, at the encoder's input frame rate; -1 for all.
CAUSAL: dict[str, Any] = {"chunk_size": (16, 32, 64, -1), "left_context_frames": (64, 128, 256, -1)}

FBANK_BINS = 80


def preset(name: str) -> dict[str, Any]:
    """The arguments of `Zipformer` for preset "S", "M", "L" or "XL".

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: wanted one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
