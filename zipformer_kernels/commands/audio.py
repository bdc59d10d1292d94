"""From audio files to the filterbank features that icefall's recipes train on.

What reads audio is imported where it is used: the commands that read none run without it.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zipformer_kernels.modules.subsampling import MIN_FRAMES
from zipformer_kernels.presets import FBANK_BINS

SAMPLE_RATE = 16000
FRAMES_PER_SECOND = 100


# What libsndfile writes into its log of a file that ends before its header says; it reads such a file without an error.
CUT_SHORT = re.compile(
    r"^\s*(?:data|SSND|Data Size|riff)\s*: (?P<declared>\d+) \(should be (?P<there>\d+)\)"
    r"|Calculated frame count \d+ does not match value from 'ds64'"
    r"|Last page lacks an end-of-stream bit|Junk after the last page"
    r"|Seems to be a truncated file",
    re.MULTILINE,
)

UNKNOWN_LENGTH = 0x7F000000  # programs that write into a pipe put this or more for the length that they do not know


class AudioError(ValueError):
    """A recording cannot be read or encoded."""


def read_audio(path: str | Path) -> np.ndarray:
    """The samples of an audio file, as the mean of its channels, at 16 kHz.

    Args:
        path: any format that libsndfile reads (WAV, FLAC, Ogg, MP3 ...), any sampling rate and number of
            channels.
    Returns:
        float32 (samples,), between -1 and 1.
    Raises:
        AudioError: the file is missing, broken, cut short or empty, or holds NaN or infinite samples.
    """
    import soundfile
    import soxr

    if Path(path).is_dir():
        raise AudioError(f"{path}: is a folder, wanted a recording")
    if not Path(path).exists():
        raise AudioError(f"{path}: no such file")
    try:
        with open(path, "rb") as file, soundfile.SoundFile(file) as recording:
            samples = recording.read(dtype="float32", always_2d=True)
            rate, frames, log = recording.samplerate, recording.frames, recording.extra_info
    except OSError as error:
        raise AudioError(f"{path}: cannot be read: {error.strerror or error}") from error
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: cannot be read as audio: {error.error_string}") from error
    if frames == 0:
        raise AudioError(f"{path}: holds no samples")
    if len(samples) < frames or _is_cut_short(log):
        raise AudioError(f"{path}: is cut short: {len(samples) / rate:.2f} s are there, its header tells of more")
    if not np.isfinite(samples).all():
        raise AudioError(f"{path}: holds samples that are NaN or infinite")
    samples = samples.mean(axis=1)
    return samples if rate == SAMPLE_RATE else soxr.resample(samples, rate, SAMPLE_RATE)


def _is_cut_short(log: str) -> bool:
    """Whether libsndfile's log of a file tells of less than the file's header."""
    found = CUT_SHORT.search(log)
    if found is None or found["declared"] is None:
        return found is not None
    return int(found["there"]) < int(found["declared"]) < UNKNOWN_LENGTH


def fbank(samples: np.ndarray) -> Tensor:
    """Log mel filterbank energies with the settings of lhotse's `Fbank`, which icefall's recipes use.

    Kaldi's features with 80 bins from 20 Hz to 400 Hz below the Nyquist frequency, windows of 25 ms (povey)
    every 10 ms, no dither, and frames centred in their 10 ms up to both ends (``snip_edges=False``).

    Args:
        samples: float32 (samples,) at 16 kHz, between -1 and 1.
    Returns:
        float32 (frames, 80); frames = samples / 160, rounded.
    """
    import kaldi_native_fbank

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = SAMPLE_RATE
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = FBANK_BINS
    options.mel_opts.high_freq = -400.0
    extractor = kaldi_native_fbank.OnlineFbank(options)
    extractor.accept_waveform(SAMPLE_RATE, samples.tolist())
    extractor.input_finished()
    frames = [extractor.get_frame(i) for i in range(extractor.num_frames_ready)]
    return torch.from_numpy(np.stack(frames)) if frames else torch.empty(0, FBANK_BINS)


def features_of(path: str | Path) -> Tensor:
    """The filterbank features of an audio file, (frames, 80), long enough for the conv embed.

    Raises:
        AudioError: as `read_audio`, or the recording is too short.
    """
    features = fbank(read_audio(path))
    if len(features) < MIN_FRAMES:
        raise AudioError(
            f"{path}: too short: {len(features) / FRAMES_PER_SECOND:.2f} s, at least "
            f"{MIN_FRAMES / FRAMES_PER_SECOND:.2f} s are needed"
        )
    return features
