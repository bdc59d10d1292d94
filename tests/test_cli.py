"""The command line: what it computes from files, and how it says no."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny, weights_of

from zipformer_kernels import backend, batching, cli, ops
from zipformer_kernels.audio import SAMPLE_RATE, fbank, features_of, read_audio

RECORDINGS = sorted((pathlib.Path(__file__).parent.parent / "demo" / "recordings").glob("*.wav"))


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line in this process: exit code, standard output, lines on standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["zipformer-kernels", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err.splitlines()

    return run


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "tiny.pt"
    torch.save({"model": weights_of(*tiny())}, path)
    return path


def tone(path, seconds=1.0, rate=SAMPLE_RATE, channels=1, hertz=440.0):
    t = np.arange(int(seconds * rate)) / rate
    samples = 0.5 * np.sin(2 * np.pi * hertz * t)[:, None] * np.linspace(1, 0.5, channels)
    soundfile.write(path, samples, rate)
    return path


# ---- audio ----


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


# ---- encode ----


def expected_embedding(embed, encoder, path):
    with torch.inference_mode():
        return batching.encode(embed, encoder, [features_of(path)])[0].numpy()


@pytest.mark.parametrize("causal", [False, True])
def test_one_recording_into_npy(command, tmp_path, causal):
    torch.save({"model": weights_of(*tiny(causal))}, tmp_path / "c.pt")
    output = tmp_path / "e.npy"
    options = ["--causal"] if causal else []
    arguments = ["encode", RECORDINGS[0], "--checkpoint", tmp_path / "c.pt", "--output", output, *options]
    code, out, err = command(*arguments)
    assert (code, err) == (0, [])
    np.testing.assert_array_equal(np.load(output), expected_embedding(*tiny(causal), RECORDINGS[0]))
    assert "378 frames from 15.18 s of audio in" in out
    assert "real-time factor" in out
    assert "peak memory" in out
    assert "random" not in out
    assert set(os.listdir(tmp_path)) == {"c.pt", "e.npy"}


def test_several_recordings_into_safetensors_by_name(command, tmp_path, checkpoint):
    output = tmp_path / "e.safetensors"
    other = tone(tmp_path / RECORDINGS[1].name)
    paths = [*RECORDINGS[:3], other]
    arguments = ["--checkpoint", checkpoint, "--output", output, "--batch-seconds", 0.1]
    assert command("encode", *paths, *arguments)[0] == 0
    tensors = safetensors.torch.load_file(output)
    stems = [path.stem for path in RECORDINGS[:3]]
    assert set(tensors) == {stems[0], str(RECORDINGS[1]), stems[2], str(other)}
    for path in paths:
        key = path.stem if path.stem in tensors else str(path)
        np.testing.assert_array_equal(tensors[key].numpy(), expected_embedding(*tiny(), path))


def test_random_weights_are_announced_and_repeat(command, tmp_path):
    embeddings = []
    for name in ("a.npy", "b.npy"):
        code, out, _ = command("encode", tone(tmp_path / "tone.wav"), "--output", tmp_path / name)
        assert code == 0
        assert "the weights are random" in out
        embeddings.append(np.load(tmp_path / name))
    np.testing.assert_array_equal(*embeddings)
    assert embeddings[0].shape == (23, 256)


def test_without_an_output_nothing_is_saved_and_that_is_said(command, tmp_path, checkpoint, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, out, _ = command("encode", RECORDINGS[3], "--checkpoint", checkpoint, "--backend", "eager")
    assert code == 0
    assert "not saved" in out
    assert os.listdir() == []


# ---- saying no ----


def make_bad_audio(folder):
    soundfile.write(folder / "empty.wav", np.zeros(0), SAMPLE_RATE)
    (folder / "garbage.wav").write_bytes(b"RIFF" + bytes(range(200)))
    (folder / "zero.flac").write_bytes(b"")
    tone(folder / "short.wav", seconds=0.05)
    soundfile.write(folder / "nan.wav", np.array([0.0, np.nan] * 8000), SAMPLE_RATE, subtype="FLOAT")
    (folder / "folder.wav").mkdir()
    tone(folder / "fine.wav")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.wav", "no such file"),
        ("folder.wav", "no such file"),
        ("empty.wav", "holds no samples"),
        ("garbage.wav", "cannot be read as audio"),
        ("zero.flac", "cannot be read as audio"),
        ("short.wav", "too short: 0.05 s, at least 0.09 s are needed"),
        ("nan.wav", "holds samples that are NaN or infinite"),
    ],
)
def test_bad_audio_is_told_in_one_line(command, tmp_path, checkpoint, name, message):
    make_bad_audio(tmp_path)
    before = set(os.listdir(tmp_path))
    paths = tmp_path / "fine.wav", tmp_path / name
    code, out, err = command("encode", *paths, "--checkpoint", checkpoint, "--output", tmp_path / "e.safetensors")
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"zipformer-kernels: {tmp_path / name}: {message}")
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("e.txt", "the output must end in .npy or .safetensors"),
        ("e.npy", ".npy holds one recording, got 2: use .safetensors"),
        ("absent/e.safetensors", "no folder"),
        ("folder.safetensors", "is a folder"),
    ],
)
def test_an_impossible_output_is_told_before_any_work(command, tmp_path, output, message):
    (tmp_path / "folder.safetensors").mkdir()
    code, out, err = command("encode", "a.wav", "b.wav", "--output", tmp_path / output)
    assert (code, out, len(err)) == (2, "", 1)
    assert message in err[0]


def test_a_write_that_fails_leaves_nothing_and_keeps_what_was_there(command, tmp_path, checkpoint, monkeypatch):
    output = tmp_path / "e.npy"
    output.write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    code, out, err = command("encode", RECORDINGS[3], "--checkpoint", checkpoint, "--output", output)
    assert (code, out, err) == (
        2,
        "",
        [f"zipformer-kernels: {output}: cannot be written: No space left on device"],
    )
    assert output.read_text() == "before"
    assert set(os.listdir(tmp_path)) == {"e.npy", "tiny.pt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "XS"], "--preset: wanted one of S, M, L, XL, got 'XS'"),
        (["--backend", "gpu"], "--backend: backend must be one of eager, cpu, triton, cuda, auto, got 'gpu'"),
        (["--checkpoint", "absent.pt"], "absent.pt: no such file"),
    ],
)
def test_bad_options_are_told_in_one_line(command, arguments, message):
    code, out, err = command("encode", RECORDINGS[0], *arguments)
    assert (code, out, err) == (2, "", [f"zipformer-kernels: {message}"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the backend is not missing")
def test_a_backend_that_cannot_serve_is_told_in_one_line(command, checkpoint):
    code, out, err = command("encode", RECORDINGS[0], "--checkpoint", checkpoint, "--backend", "cuda")
    assert (code, out, len(err)) == (2, "", 1)
    assert "backend 'cuda' cannot serve this call" in err[0]


@pytest.mark.parametrize("module", cli.EXTRA)
def test_a_missing_extra_is_named(module):
    code = f"import sys; sys.modules[{module!r}] = None; from zipformer_kernels.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    wanted = f"zipformer-kernels: {module} is not installed: pip install 'zipformer-kernels[cli]'\n"
    assert result.stderr == wanted


class Harmful:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.write_text, (self.path, "harm")


def test_code_in_a_checkpoint_is_never_run(tmp_path, command):
    torch.save({"model": weights_of(*tiny()), "more": Harmful(tmp_path / "harm")}, tmp_path / "c.pt")
    code, _, err = command("encode", RECORDINGS[0], "--checkpoint", tmp_path / "c.pt")
    assert (code, err) == (0, [])
    assert not (tmp_path / "harm").exists()


# ---- info ----


def test_info_tells_versions_build_and_every_op(command):
    code, out, err = command("info")
    assert (code, err) == (0, [])
    assert torch.__version__ in out
    assert "ZIPFORMER_KERNELS_BUILD" in out
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith("│")}
    assert set(ops.names()) <= set(rows)
    assert rows["swoosh"].count("auto") == 1
    for name, reason in backend.missing.items():
        if reason is not None:
            assert f"no {name}: {reason[:20]}" in out
