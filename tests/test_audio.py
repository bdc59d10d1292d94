"""From audio files to features and batches: any format, none that is cut short."""

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from recordings import RECORDINGS, tone
from tiny import tiny

from zipformer_kernels.commands import batching
from zipformer_kernels.commands.audio import SAMPLE_RATE, AudioError, fbank, read_audio


def kaldi_fbank(samples):
    """Kaldi's filterbank from its definition, in float64."""
    frames = (len(samples) + 80) // 160
    mirrored = np.concatenate([samples[::-1], samples, samples[::-1]])
    starts = len(samples) + 160 * np.arange(frames) + 80 - 200
    windows = mirrored[starts[:, None] + np.arange(400)].astype(np.float64)
    windows -= windows.mean(axis=1, keepdims=True)
    windows -= 0.97 * np.concatenate([windows[:, :1], windows[:, :-1]], axis=1)
    windows *= (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    power = np.abs(np.fft.rfft(windows, 512)) ** 2

    def mel(hertz):
        return 1127 * np.log(1 + hertz / 700)

    edges = np.linspace(mel(20), mel(8000 - 400), 82)
    bins = mel(np.arange(256) * 16000 / 512)[:, None]
    up = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.log(np.maximum(power[:, :256] @ np.minimum(up, down).clip(0), np.finfo(np.float32).eps))


def test_features_are_kaldis_with_icefalls_settings():
    samples = read_audio(RECORDINGS[0])[:20000]
    actual, expected = fbank(samples).numpy(), kaldi_fbank(samples)
    assert actual.shape == expected.shape == (125, 80)
    # float32 spectra: a bin near the floor is a small difference of rounding errors of the loud ones
    assert np.abs(actual - expected).max() < 0.02
    assert np.abs(actual - expected).mean() < 2e-4


@pytest.mark.parametrize(("rate", "channels", "suffix"), [(8000, 1, "wav"), (44100, 2, "flac"), (48000, 6, "wav")])
def test_any_rate_and_channel_count_becomes_16_khz_mono(tmp_path, rate, channels, suffix):
    path = tone(tmp_path / f"a.{suffix}", seconds=2.0, rate=rate, channels=channels)
    samples = read_audio(path)
    assert samples.dtype == np.float32
    assert samples.shape == (2 * SAMPLE_RATE,)
    middle = samples[8000:24000].astype(np.float64)
    expected = 0.375 if channels > 1 else 0.5  # the mean of the channels' amplitudes
    assert np.abs(np.fft.rfft(middle)).argmax() == 440
    assert abs(np.sqrt(2) * middle.std() - expected) < 2e-3


@pytest.mark.parametrize("samples", [0, 79, 80, 239, 240, 16000])
def test_frames_are_samples_over_160_rounded(samples):
    assert fbank(np.zeros(samples, np.float32)).shape == ((samples + 80) // 160, 80)


# ---- batches ----


@given(lengths=st.lists(st.integers(1, 500), max_size=30), max_frames=st.integers(1, 2000))
def test_batches_hold_everyone_once_within_the_limit(lengths, max_frames):
    batches = batching.plan_batches(lengths, max_frames)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = max(lengths[i] for i in batch) * len(batch)
        assert padded <= max_frames or len(batch) == 1


def test_a_batch_masks_just_the_padding():
    embed, encoder = tiny()
    seen = []
    handle = encoder.register_forward_pre_hook(lambda module, args: seen.append(args))
    features = [torch.randn(frames, 80) for frames in (41, 90, 9)]
    embeddings = batching.encode(embed, encoder, features)
    handle.remove()
    x, lengths, mask = seen[0]
    assert x.shape[:2] == (41, 3)
    assert lengths.tolist() == [(41 - 7) // 2, 41, 1]
    assert (~mask).sum(dim=1).tolist() == lengths.tolist()
    assert [len(e) for e in embeddings] == [(n + 1) // 2 for n in lengths.tolist()]
    (alone,) = batching.encode(embed, encoder, features[1:2])
    torch.testing.assert_close(embeddings[1], alone, rtol=1e-5, atol=1e-5)  # the longest is not padded


FORMATS = [
    *[
        ("WAV", "PCM_16"),
        ("WAV", "PCM_U8"),
        ("WAV", "FLOAT"),
        ("RF64", "PCM_16"),
        ("W64", "PCM_16"),
        ("AIFF", "PCM_16"),
    ],
    *[("AU", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")],
]


@pytest.mark.parametrize(("form", "subtype"), FORMATS)
def test_a_recording_that_is_cut_short_is_refused(tmp_path, form, subtype):
    path, samples = tmp_path / "a", 0.1 * np.random.default_rng(0).standard_normal(SAMPLE_RATE)
    soundfile.write(path, samples, SAMPLE_RATE, format=form, subtype=subtype)
    whole = path.read_bytes()
    assert read_audio(path).shape == (SAMPLE_RATE,)
    for length in (len(whole) // 2, len(whole) - 300, len(whole) - 1, 60):
        path.write_bytes(whole[:length])
        with pytest.raises(AudioError, match=r"is cut short|cannot be read as audio|holds no samples"):
            read_audio(path)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFF000])
def test_a_recording_that_was_written_into_a_pipe_is_read_to_its_end(tmp_path, length):
    path = tone(tmp_path / "a.wav")
    whole = path.read_bytes()
    at = whole.index(b"data") + 4
    path.write_bytes(whole[:at] + length.to_bytes(4, "little") + whole[at + 4 :])
    assert read_audio(path).shape == (SAMPLE_RATE,)
