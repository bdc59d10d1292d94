"""``zipformer-kernels encode``: embeddings of recordings."""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from zipformer_kernels.checkpoint import load_checkpoint
from zipformer_kernels.cli import tell
from zipformer_kernels.commands.audio import FRAMES_PER_SECOND, AudioError, features_of
from zipformer_kernels.commands.batching import encode as encode_batch
from zipformer_kernels.commands.batching import encode_all
from zipformer_kernels.core.backend import check_request, use_backend
from zipformer_kernels.modules.encoder import Zipformer
from zipformer_kernels.modules.subsampling import MIN_FRAMES, Conv2dSubsampling
from zipformer_kernels.presets import FBANK_BINS, PRESETS

# A causal model picks its chunks at random; here, as in icefall's decoding, it has one choice of each.
CHUNK_SIZE = 32
LEFT_CONTEXT_FRAMES = 256

MIN_BATCH_SECONDS = 0.1


class ArgumentError(ValueError):
    """An argument cannot be served."""


def encode(
    audio: Annotated[list[Path], typer.Argument(help="Recordings: WAV, FLAC, ...; any rate, any channels.")],
    preset: Annotated[
        str | None, typer.Option(help=f"{', '.join(PRESETS)}: by default what the checkpoint holds, else S.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights: icefall's .pt, a state_dict, or .safetensors; without, random ones.")
    ] = None,
    num_heads: Annotated[
        str | None,
        typer.Option(
            help="Attention heads, if the checkpoint does not tell: a number, or one for each stack, 4,4,8,4."
        ),
    ] = None,
    model_avg: Annotated[bool, typer.Option("--model-avg", help="Take the average weights of icefall's file.")] = False,
    prefix: Annotated[
        str | None, typer.Option(help="What stands before encoder. in the names of the weights, if there are several.")
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
        str, typer.Option(metavar="SECONDS", help="Seconds of audio in a batch, padding included.")
    ] = "120",
) -> None:
    """Encode recordings: filterbank features, conv embed, encoder; 25 embeddings a second.

    A recording that cannot be read is named, and the others are encoded; the exit code is then 2.
    """
    if preset is not None and preset not in PRESETS:
        raise ArgumentError(f"--preset: wanted one of {', '.join(PRESETS)}, got {preset!r}")
    max_frames = frames_in(batch_seconds)
    try:
        check_request(backend)
    except ValueError as error:
        raise ArgumentError(f"--backend: {error}") from error
    if checkpoint is None and (num_heads is not None or model_avg or prefix is not None):
        raise ArgumentError("--num-heads, --model-avg, --prefix: say how to read a --checkpoint, and there is none")
    check_output(output, audio, checkpoint)
    device = "cuda" if torch.cuda.is_available() and backend.split(",")[0] != "cpu" else "cpu"
    how = {"num_heads": num_heads, "model_avg": model_avg, "prefix": prefix}
    embed, encoder = (model.to(device) for model in make_model(preset, checkpoint, causal, how))

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        features, failures = read_all(progress.track(audio, description="reading"))
        read = list(features)
        embeddings: dict[Path, Tensor] = {}
        task = progress.add_task("encoding", total=len(read))
        with use_backend(backend):
            start = time.perf_counter()
            batches = encode_all(embed, encoder, list(features.values()), max_frames)
            for i, result in batches:
                embeddings[read[i]] = result
                progress.advance(task)
            seconds = time.perf_counter() - start
    if read:
        if output is not None:
            names = recording_names(audio)
            write(output, {name: embeddings[path] for path, name in zip(audio, names, strict=True) if path in features})
        report(features, embeddings, seconds, device)
        if checkpoint is None:
            print("the weights are random, for there was no --checkpoint: the embeddings mean nothing")
        print("not saved, for there was no --output" if output is None else f"saved to {output}")
    for failure in failures:
        tell(str(failure))
    raise typer.Exit(2 if failures else 0)


def frames_in(batch_seconds: str) -> int:
    """The frames in --batch-seconds. Raises ArgumentError for what is no number of seconds."""
    try:
        seconds = float(batch_seconds)
    except ValueError:
        seconds = math.nan
    if not MIN_BATCH_SECONDS <= seconds < math.inf:
        raise ArgumentError(f"--batch-seconds: wanted a number of at least {MIN_BATCH_SECONDS}, got {batch_seconds!r}")
    return int(seconds * FRAMES_PER_SECOND)


def read_all(audio: Iterable[Path]) -> tuple[dict[Path, Tensor], list[AudioError]]:
    """The features of the recordings that can be read, and what is wrong with the others."""
    features, failures = {}, []
    for path in audio:
        try:
            features[path] = features_of(path)
        except AudioError as error:
            failures.append(error)
    return features, failures


def make_model(
    preset: str | None, checkpoint: Path | None, causal: bool, how: dict[str, Any]
) -> tuple[Conv2dSubsampling, Zipformer]:
    """The conv embed and the encoder in eval mode, from a checkpoint or with random weights from one seed.

    Args:
        preset, checkpoint, causal: as the command has them.
        how: arguments of `load_checkpoint` that say how to read the checkpoint.
    Raises:
        ArgumentError: the model cannot take what this command gives it.
    """
    if checkpoint is not None:
        embed, encoder = load_checkpoint(checkpoint, preset, True if causal else None, **how)
    else:
        random.seed(0)
        torch.manual_seed(0)
        embed = Conv2dSubsampling.from_preset(preset or "S").eval()
        encoder = Zipformer.from_preset(preset or "S", causal=causal).eval()
    if encoder.causal:
        encoder.chunk_size = (CHUNK_SIZE,)
        encoder.left_context_frames = (LEFT_CONTEXT_FRAMES,)
    try:  # a model of other bins, or one that cannot run in these chunks, says so
        with torch.inference_mode():
            encode_batch(embed, encoder, [torch.zeros(MIN_FRAMES, FBANK_BINS)])
    except ValueError as error:
        raise ArgumentError(f"{checkpoint}: cannot encode recordings: {error}") from error
    return embed, encoder


def report(features: Mapping[Path, Tensor], embeddings: Mapping[Path, Tensor], seconds: float, device: str) -> None:
    """Prints frames and seconds of each recording, the real-time factor, and the peak of memory."""
    table = Table("recording", "seconds", "frames", "channels")
    for column in table.columns[1:]:
        column.justify = "right"
    for path, one in features.items():
        table.add_row(Text(str(path)), f"{len(one) / FRAMES_PER_SECOND:.2f}", *map(str, embeddings[path].shape))
    console = Console()
    console.print(table)
    total = sum(map(len, features.values())) / FRAMES_PER_SECOND
    frames = sum(map(len, embeddings.values()))
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
    """The names of the files without suffix; with the whole path where two share one.

    All with the whole path if such a path were another's name. No tensor may be named like the header of a file.
    """
    count = Counter(["__metadata__", *(path.stem for path in audio)])
    names = [path.stem if count[path.stem] == 1 else str(path) for path in audio]
    return names if len(set(names)) == len(names) else [str(path) for path in audio]


def check_output(output: Path | None, audio: list[Path], checkpoint: Path | None) -> None:
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
    if checkpoint is not None and output.exists() and checkpoint.exists() and output.samefile(checkpoint):
        raise ArgumentError(f"{output}: is the checkpoint")
    if not output.parent.is_dir():
        raise ArgumentError(f"{output}: no folder {output.parent}")
    if not os.access(output.parent, os.W_OK):
        raise ArgumentError(f"{output}: the folder {output.parent} is not writable")


def write(output: Path, embeddings: Mapping[str, Tensor]) -> None:
    """Writes a file beside the output and moves it there when it is whole."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with open(temporary, "xb") as file:
            if output.suffix == ".npy":
                (embedding,) = embeddings.values()
                np.save(file, embedding.numpy())
            else:
                file.write(save({name: embedding.contiguous() for name, embedding in embeddings.items()}))
        os.replace(temporary, output)
    except OSError as error:
        raise ArgumentError(f"{output}: cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ArgumentError(f"{output}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
