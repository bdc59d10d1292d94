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
from recordings import RECORDINGS, tone
from tiny import TINY, tiny, weights_of

from zipformer_kernels import Conv2dSubsampling, Zipformer, cli, ops
from zipformer_kernels.commands import batching
from zipformer_kernels.commands.audio import SAMPLE_RATE, features_of
from zipformer_kernels.commands.encode import recording_names
from zipformer_kernels.core import backend, tuning


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


def cut(path, bytes_off):
    path.write_bytes(path.read_bytes()[:-bytes_off])


def make_bad_audio(folder):
    soundfile.write(folder / "empty.wav", np.zeros(0), SAMPLE_RATE)
    (folder / "garbage.wav").write_bytes(b"RIFF" + bytes(range(200)))
    (folder / "zero.flac").write_bytes(b"")
    (folder / "page.wav").write_text("<!DOCTYPE html><html>not found</html>")
    tone(folder / "short.wav", seconds=0.05)
    soundfile.write(folder / "nan.wav", np.array([0.0, np.nan] * 8000), SAMPLE_RATE, subtype="FLOAT")
    cut(tone(folder / "cut.wav"), 20000)
    (folder / "folder.wav").mkdir()
    tone(folder / "fine.wav")


BAD_AUDIO = {
    "absent.wav": "no such file",
    "folder.wav": "is a folder, wanted a recording",
    "empty.wav": "holds no samples",
    "garbage.wav": "cannot be read as audio",
    "zero.flac": "cannot be read as audio",
    "page.wav": "cannot be read as audio",
    "short.wav": "too short: 0.05 s, at least 0.09 s are needed",
    "nan.wav": "holds samples that are NaN or infinite",
    "cut.wav": "is cut short: 0.38 s are there, its header tells of more",
}


def test_bad_recordings_are_told_and_the_others_encoded(command, tmp_path, checkpoint):
    make_bad_audio(tmp_path)
    other = tone(tmp_path / "other.flac", seconds=0.5, rate=8000, channels=2)
    paths = [tmp_path / "fine.wav", *(tmp_path / name for name in BAD_AUDIO), other]
    output = tmp_path / "e.safetensors"
    code, out, err = command("encode", *paths, "--checkpoint", checkpoint, "--output", output)
    assert (code, len(err)) == (2, len(BAD_AUDIO))
    for line, (name, message) in zip(err, BAD_AUDIO.items(), strict=True):
        assert line.startswith(f"zipformer-kernels: {tmp_path / name}: {message}")
    assert "from 1.50 s of audio" in out
    tensors = safetensors.torch.load_file(output)
    assert set(tensors) == {"fine", "other"}
    expected = expected_embedding(*tiny(), tmp_path / "fine.wav")
    np.testing.assert_allclose(tensors["fine"].numpy()[:-3], expected[:-3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["absent.wav", "cut.wav"])
def test_without_a_good_recording_nothing_is_written(command, tmp_path, checkpoint, name):
    make_bad_audio(tmp_path)
    before = set(os.listdir(tmp_path))
    code, out, err = command("encode", tmp_path / name, "--checkpoint", checkpoint, "--output", tmp_path / "e.npy")
    assert (code, out) == (2, "")
    assert err == [f"zipformer-kernels: {tmp_path / name}: {BAD_AUDIO[name]}"]
    assert set(os.listdir(tmp_path)) == before


def test_no_two_recordings_share_a_name():
    paths = [pathlib.Path(name) for name in ("a.wav", "b/a.wav", "a.wav.flac", "c.wav", "d/__metadata__.wav")]
    names = recording_names(paths)
    assert len(set(names)) == len(names)
    assert "__metadata__" not in names
    assert recording_names(paths[2:]) == ["a.wav", "c", "d/__metadata__.wav"]


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
        (["--backend", ""], "--backend: backend must be one of eager, cpu, triton, cuda, auto, got ''"),
        (["--checkpoint", "absent.pt"], "absent.pt: no such file"),
        (["--checkpoint", "."], ".: is a folder, wanted a file"),
        (["--num-heads", "4"], "--num-heads, --model-avg, --prefix: say how to read a --checkpoint, and there is none"),
        (["--output", "e.txt"], "e.txt: the output must end in .npy or .safetensors"),
        *(
            (["--batch-seconds", value], f"--batch-seconds: wanted a number of at least 0.1, got {value!r}")
            for value in ("inf", "nan", "-1", "0", "0.09", "many", "", "1e999")
        ),
        (["--batch-seconds"], "Option '--batch-seconds' requires an argument. (--help tells more)"),
        (["--xyz", "2"], "No such option: --xyz (--help tells more)"),
    ],
)
def test_bad_options_are_told_in_one_line(command, arguments, message):
    code, out, err = command("encode", RECORDINGS[0], *arguments)
    assert (code, out, err) == (2, "", [f"zipformer-kernels: {message}"])


MOVED = "bench: the benchmarks left the package: run python -m benchmarks.harness in a checkout"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode"], "Missing argument"),
        (["play"], "No such command 'play'"),
        (["info", "more"], "Got unexpected extra argument"),
        (["bench"], MOVED),
        (["bench", "--help"], MOVED),
        (["bench", "swoosh", "--compare", "a", "b"], MOVED),
    ],
)
def test_bad_commands_are_told_in_one_line(command, arguments, message):
    code, out, err = command(*arguments)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"zipformer-kernels: {message}")


def test_without_arguments_there_is_help(command):
    code, out, err = command()
    assert (code, err) == (0, [])
    for name in ("info", "encode", "bench"):
        assert name in out


def test_a_checkpoint_says_how_to_read_it_or_is_told(command, tmp_path):
    torch.manual_seed(0)
    embed, encoder = tiny()
    eight = Zipformer(**{**TINY, "pos_head_dim": 8, "num_heads": (2, 4)}).eval()
    path, output = tmp_path / "c.pt", tmp_path / "e.npy"
    torch.save({"model": weights_of(embed, encoder), "model_avg": weights_of(embed, eight, "net.")}, path)
    arguments = ["encode", RECORDINGS[3], "--checkpoint", path, "--output", output, "--model-avg"]
    code, out, err = command(*arguments)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"zipformer-kernels: {path}: num_heads: the weights of stack 0 fit ")
    assert command(*arguments, "--num-heads", "2,4", "--prefix", "net")[0] == 0
    np.testing.assert_array_equal(np.load(output), expected_embedding(embed, eight, RECORDINGS[3]))
    code, _, err = command(*arguments[:3], path, "--num-heads", "x")
    assert (code, err) == (2, [f"zipformer-kernels: {path}: num_heads: wanted a whole number or several, got 'x'"])


def test_models_that_cannot_take_recordings_are_told(command, tmp_path):
    path = tmp_path / "c.pt"
    torch.save(weights_of(Conv2dSubsampling(90, 16), tiny()[1]), path)
    code, out, err = command("encode", RECORDINGS[3], "--checkpoint", path)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"zipformer-kernels: {path}: cannot encode recordings: x: wanted (batch, frames, 87 to 90")
    odd = Zipformer(**{**TINY, "downsampling_factor": (1, 3)}, causal=True)
    torch.save(weights_of(tiny()[0], odd), path)
    code, out, err = command("encode", RECORDINGS[3], "--checkpoint", path)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"zipformer-kernels: {path}: cannot encode recordings: chunk_size: wanted a multiple")


def test_the_checkpoint_is_not_overwritten(command, tmp_path):
    path = tmp_path / "c.safetensors"
    safetensors.torch.save_file(weights_of(*tiny()), path)
    before = path.read_bytes()
    code, _, err = command("encode", RECORDINGS[3], "--checkpoint", path, "--output", path)
    assert (code, err) == (2, [f"zipformer-kernels: {path}: is the checkpoint"])
    assert path.read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the backend is not missing")
def test_a_backend_that_cannot_serve_is_told_in_one_line(command, checkpoint):
    code, out, err = command("encode", RECORDINGS[0], "--checkpoint", checkpoint, "--backend", "cuda")
    assert (code, out, len(err)) == (2, "", 1)
    assert "backend 'cuda' cannot serve this call" in err[0]


EACH_MISSING = """
import os, sys
from zipformer_kernels import cli
sys.argv = ["zipformer-kernels", *sys.argv[1:]]
for module in cli.EXTRA:
    if os.fork() == 0:
        sys.modules[module] = None
        cli.main()
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_missing_extra_is_named():
    """By the first command that needs it: those of audio by `encode` alone."""
    command = [sys.executable, "-c", EACH_MISSING]
    result = subprocess.run([*command, "info"], capture_output=True, text=True, check=False)
    codes = [int(line) for line in result.stdout.splitlines() if len(line) == 1]
    assert dict(zip(cli.EXTRA, codes, strict=True)) == {
        name: 0 if name in ("soundfile", "soxr", "kaldi_native_fbank") else 2 for name in cli.EXTRA
    }
    command = [*command, "encode", str(RECORDINGS[0])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["2"] * len(cli.EXTRA)
    wanted = "zipformer-kernels: {} is not installed: pip install 'zipformer-kernels[cli]'"
    assert result.stderr.splitlines() == [wanted.format(module) for module in cli.EXTRA]


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


def test_info_tells_what_is_tuned(command):
    with tuning.override(**{"attention.stored_bytes": 7}):
        code, out, err = command("info", "--tuning")
    assert (code, err) == (0, [])
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[::3]] == [one.name for one in tuning.entries()]
    assert [line for line in lines if "overridden" in line] == [
        "attention.stored_bytes = 7 bytes  overridden, not 33554432"
    ]
    assert "attention.triton_score_2_bytes = 64x32x4x64x1 targets, sources, warps, channels, stages" in lines


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
