"""``zipformer-kernels encode``: embeddings of recordings."""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from safetensors.torch import save
from torch import Tensor

from zipformer_kernels.audio import FRAMES_PER_SECOND, features_of
from zipformer_kernels.backend import check_request, use_backend
from zipformer_kernels.batching import encode_all
from zipformer_kernels.checkpoint import load_checkpoint
from zipformer_kernels.encoder import Zipformer
from zipformer_kernels.modules.subsampling import Conv2dSubsampling
from zipformer_kernels.presets import PRESETS

# A causal model picks its chunks at random; here, as in icefall's decoding, it has one choice of each.
CHUNK_SIZE = 32
LEFT_CONTEXT_FRAMES = 256


class ArgumentError(ValueError):
    """An argument cannot be served."""


def encode(
    audio: Annotated[list[Path], typer.Argument(help="Recordings: WAV, FLAC, ...; any rate, any channels.")],
    preset: Annotated[
        str | None, typer.Option(help="S, M, L or XL; by default what the checkpoint holds, else S.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights: icefall's .pt, a state_dict, or .safetensors.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="auto, or eager, cpu, triton, cuda: one, or several by preference with commas.")
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(help=".npy for one recording, .safetensors for any number: a tensor for each by name."),
    ] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Use or require a causal model.")] = False,
    batch_seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds of audio in a batch, padding included.")
    ] = 120.0,
) -> None:
    """Encode recordings: filterbank features, conv embed, encoder; 25 embeddings a second."""
    if preset is not None and preset not in PRESETS:
        raise ArgumentError(f"--preset: wanted one of {', '.join(PRESETS)}, got {preset!r}")
    try:
        check_request(backend)
    except ValueError as error:
        raise ArgumentError(f"--backend: {error}") from error
    check_output(output, audio)
    device = "cuda" if torch.cuda.is_available() and backend.split(",")[0] != "cpu" else "cpu"
    embed, encoder = (model.to(device) for model in make_model(preset, checkpoint, causal))

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        features = [features_of(path) for path in progress.track(audio, description="reading")]
        embeddings: list[Tensor] = [torch.empty(0)] * len(audio)
        task = progress.add_task("encoding", total=len(audio))
        with use_backend(backend):
            start = time.perf_counter()
            for i, result in encode_all(embed, encoder, features, int(batch_seconds * FRAMES_PER_SECOND)):
                embeddings[i] = result
                progress.advance(task)
            seconds = time.perf_counter() - start
    if output is not None:
        write(output, recording_names(audio), embeddings)
    report(audio, features, embeddings, seconds, device)
    if checkpoint is None:
        print("the weights are random, for there was no --checkpoint: the embeddings mean nothing")
    print("not saved, for there was no --output" if output is None else f"saved to {output}")


def make_model(preset: str | None, checkpoint: Path | None, causal: bool) -> tuple[Conv2dSubsampling, Zipformer]:
    """The conv embed and the encoder in eval mode, from a checkpoint or with random weights from one seed."""
    if checkpoint is not None:
        embed, encoder = load_checkpoint(checkpoint, preset, True if causal else None)
    else:
        random.seed(0)
        torch.manual_seed(0)
        embed = Conv2dSubsampling.from_preset(preset or "S").eval()
        encoder = Zipformer.from_preset(preset or "S", causal=causal).eval()
    if encoder.causal:
        encoder.chunk_size = (CHUNK_SIZE,)
        encoder.left_context_frames = (LEFT_CONTEXT_FRAMES,)
    return embed, encoder


def report(audio: list[Path], features: list[Tensor], embeddings: list[Tensor], seconds: float, device: str) -> None:
    """Prints frames and seconds of each recording, the real-time factor, and the peak of memory."""
    table = Table("recording", "seconds", "frames", "channels")
    for column in table.columns[1:]:
        column.justify = "right"
    durations = [len(f) / FRAMES_PER_SECOND for f in features]
    for path, duration, embedding in zip(audio, durations, embeddings, strict=True):
        table.add_row(Text(str(path)), f"{duration:.2f}", *map(str, embedding.shape))
    console = Console()
    console.print(table)
    total, frames = sum(durations), sum(len(e) for e in embeddings)
    console.print(
        f"{frames} frames from {total:.2f} s of audio in {seconds:.2f} s on {device}: "
        f"real-time factor {seconds / total:.4f}, peak memory {peak_memory(device)}",
        soft_wrap=True,
    )


def peak_memory(device: str) -> str:
    """The most memory that tensors took on a GPU, or the whole process on a CPU."""
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    elif sys.platform == "win32":
        return "not counted by Windows"
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 2**30:.2f} GiB"


def recording_names(audio: list[Path]) -> list[str]:
    """The names of the files without suffix; with the whole path where two share one."""
    count = Counter(path.stem for path in audio)
    return [path.stem if count[path.stem] == 1 else str(path) for path in audio]


def check_output(output: Path | None, audio: list[Path]) -> None:
    """Raises ArgumentError for an output that cannot be written: before the work, not after it."""
    if output is None:
        return
    if output.suffix not in (".npy", ".safetensors"):
        raise ArgumentError(f"{output}: the output must end in .npy or .safetensors")
    if output.suffix == ".npy" and len(audio) > 1:
        raise ArgumentError(f"{output}: .npy holds one recording, got {len(audio)}: use .safetensors")
    twice = [str(path) for path, count in Counter(audio).items() if count > 1]
    if twice:
        raise ArgumentError(f"{twice[0]}: given twice, and so would be its name in {output}")
    if output.is_dir():
        raise ArgumentError(f"{output}: is a folder")
    if not output.parent.is_dir():
        raise ArgumentError(f"{output}: no folder {output.parent}")
    if not os.access(output.parent, os.W_OK):
        raise ArgumentError(f"{output}: the folder {output.parent} is not writable")


def write(output: Path, names: list[str], embeddings: list[Tensor]) -> None:
    """Writes a file beside the output and moves it there when it is whole."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with open(temporary, "xb") as file:
            if output.suffix == ".npy":
                np.save(file, embeddings[0].numpy())
            else:
                file.write(save({name: e.contiguous() for name, e in zip(names, embeddings, strict=True)}))
        os.replace(temporary, output)
    except OSError as error:
        raise ArgumentError(f"{output}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
