"""Streams a recording through a causal model, chunk by chunk, as a server does while somebody speaks.

The joined result is compared with that of the whole recording encoded at once. Weights are random.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from zipformer_kernels import Conv2dSubsampling, Zipformer
from zipformer_kernels.commands.audio import FRAMES_PER_SECOND, features_of
from zipformer_kernels.presets import PRESETS

RECORDING = Path(__file__).parent.parent / "demo" / "recordings" / "vm-newuser.wav"
CONTEXT = 13  # frames of features that the conv embed reads beyond those of its chunk


def stream(embed: Conv2dSubsampling, encoder: Zipformer, features: Tensor) -> Iterator[Tensor]:
    """The embeddings of each chunk of `features`, (T, bins). What is left at the end, less than a chunk, is dropped."""
    (chunk,), (left,) = encoder.chunk_size, encoder.left_context_frames
    step = 2 * chunk  # the conv embed halves the frame rate
    pad, states = embed.get_init_states(1), encoder.get_init_states(1)
    seen = 0
    for start in range(0, len(features) - step - CONTEXT + 1, step):
        x = features[None, start : start + step + CONTEXT]
        x, lengths, pad = embed.streaming_forward(x, torch.tensor([x.shape[1]]), pad)
        missing = torch.arange(left + chunk)[None] < left - seen  # left context from before the recording
        y, _, states = encoder.streaming_forward(x.transpose(0, 1), lengths, states, missing)
        seen += chunk
        yield y[:, 0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", nargs="?", type=Path, default=RECORDING, help="a recording; by default the demo's")
    parser.add_argument("--size", choices=PRESETS, default="S", help="of the model")
    parser.add_argument("--chunk", type=int, choices=(16, 32, 64), default=16, help="frames of 20 ms in a chunk")
    parser.add_argument("--left", type=int, default=128, help="frames of left context")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    embed = Conv2dSubsampling.from_preset(options.size).eval()
    context = {"chunk_size": (options.chunk,), "left_context_frames": (options.left,)}
    encoder = Zipformer.from_preset(options.size, causal=True, **context).eval()
    features = features_of(options.audio)

    with torch.inference_mode():
        chunks, times = [], []
        start = time.perf_counter()
        for embeddings in stream(embed, encoder, features):
            times.append(time.perf_counter() - start)
            chunks.append(embeddings)
            start = time.perf_counter()
        if not chunks:
            parser.error(f"{options.audio}: shorter than one chunk")
        streamed = torch.cat(chunks)
        x, lengths = embed(features[None], torch.tensor([len(features)]))
        whole, _ = encoder(x.transpose(0, 1), lengths)

    milliseconds = 1000 * 2 * options.chunk / FRAMES_PER_SECOND
    whole = whole[: len(streamed), 0]
    error = (streamed - whole).abs().max() / whole.square().mean().sqrt()
    print(f"{len(chunks)} chunks of {milliseconds:.0f} ms: {len(streamed)} embeddings")
    print(f"a chunk takes {1000 * statistics.median(times):.1f} ms, the slowest {1000 * max(times):.1f} ms")
    print(f"the same recording encoded at once differs by {error:.0e} of its RMS")


if __name__ == "__main__":
    main()
