"""Recorded speech, and tones that are written where a test wants them."""

import pathlib

import numpy as np
import soundfile

from zipformer_kernels.commands.audio import SAMPLE_RATE

RECORDINGS = sorted((pathlib.Path(__file__).parent.parent / "demo" / "recordings").glob("*.wav"))


def tone(path, seconds=1.0, rate=SAMPLE_RATE, channels=1, hertz=440.0):
    t = np.arange(int(seconds * rate)) / rate
    samples = 0.5 * np.sin(2 * np.pi * hertz * t)[:, None] * np.linspace(1, 0.5, channels)
    soundfile.write(path, samples, rate)
    return path
