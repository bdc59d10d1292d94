"""Encodes recordings in one padded batch: from audio to embeddings, 25 a second.

Without a checkpoint the weights are random, which changes the embeddings and nothing else. The extra `audio`
(``pip install '.[audio]'``) reads the files.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from zipformer_kernels import Conv2dSubsampling, Zipformer, load_checkpoint, use_backend
from zipformer_kernels.commands.audio import FRAMES_PER_SECOND, features_of
from zipformer_kernels.commands.batching import encode
from zipformer_kernels.presets import PRESETS

RECORDINGS = sorted((Path(__file__).parent.parent / "demo" / "recordings").glob("*.wav"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", nargs="*", type=Path, default=RECORDINGS, help="recordings; by default the demo's")
    parser.add_argument("--checkpoint", type=Path, help="icefall's .pt, a state_dict, or .safetensors")
    parser.add_argument("--size", choices=PRESETS, default="S", help="of the random model")
    parser.add_argument("--backend", default="auto", help="auto, eager, cpu, triton or cuda")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    if options.checkpoint is not None:
        embed, encoder = load_checkpoint(options.checkpoint)
    else:
        embed, encoder = Conv2dSubsampling.from_preset(options.size), Zipformer.from_preset(options.size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    embed, encoder = embed.eval().to(device), encoder.eval().to(device)

    features = [features_of(path) for path in options.audio]
    with torch.inference_mode(), use_backend(options.backend):
        start = time.perf_counter()
        embeddings = encode(embed, encoder, features)
        seconds = time.perf_counter() - start
    for path, x, embedding in zip(options.audio, features, embeddings, strict=True):
        frames, channels = embedding.shape
        print(f"{path.name}: {len(x) / FRAMES_PER_SECOND:.2f} s, {frames} embeddings of {channels} channels")
    total = sum(map(len, features)) / FRAMES_PER_SECOND
    print(f"{total:.1f} s of audio in {seconds:.2f} s on {device}: {total / seconds:.0f} times real time")


if __name__ == "__main__":
    main()
