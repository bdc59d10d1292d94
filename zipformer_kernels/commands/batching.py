"""Encodes many recordings of unequal length in padded batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

PADDING = math.log(1e-10)
"""What icefall's recipes pad filterbank features with: the energy of silence."""


def plan_batches(lengths: Sequence[int], max_frames: int) -> list[list[int]]:
    """Groups recordings of similar length.

    Args:
        lengths: frames of each recording.
        max_frames: frames of a batch at most, padding included; a longer recording is a batch of its own.
    Returns:
        Indices into `lengths`, by batch; the longest recordings first.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_frames:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def encode(embed: nn.Module, encoder: nn.Module, features: Sequence[Tensor]) -> list[Tensor]:
    """Embeddings of one batch of recordings.

    Padding is masked in the encoder. As in icefall's recipes the conv embed sees it, so that the last frames
    of a recording depend a little on whether it was padded.

    Args:
        embed, encoder: `Conv2dSubsampling` and `Zipformer`, on one device.
        features: for each recording, filterbank features (frames, bins).
    Returns:
        For each recording (embeddings, channels), on the device of the model.
    """
    device = next(encoder.parameters()).device
    lengths = torch.tensor([len(f) for f in features])
    x = nn.utils.rnn.pad_sequence(list(features), batch_first=True, padding_value=PADDING).to(device)
    x, lengths = embed(x, lengths.to(device))
    mask = torch.arange(x.shape[1], device=device) >= lengths.unsqueeze(1)
    x, lengths = encoder(x.transpose(0, 1), lengths, mask)
    return [x[:length, i] for i, length in enumerate(lengths.tolist())]


@torch.inference_mode()
def encode_all(
    embed: nn.Module, encoder: nn.Module, features: Sequence[Tensor], max_frames: int
) -> Iterator[tuple[int, Tensor]]:
    """Encodes recordings in batches of at most `max_frames` frames.

    Yields:
        Index of a recording and its embeddings on the CPU, in the order of `plan_batches`.
    """
    for batch in plan_batches([len(f) for f in features], max_frames):
        yield from zip(batch, (e.cpu() for e in encode(embed, encoder, [features[i] for i in batch])), strict=True)
