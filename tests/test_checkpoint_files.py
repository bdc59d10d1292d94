"""Files that are no checkpoints, or no whole ones: each is told in one line that names the file."""

import gzip
import io
import os
import random
import struct
import zipfile

import pytest
import safetensors.torch
import torch
from tiny import tiny, weights_of

from zipformer_kernels import load_checkpoint, load_encoder
from zipformer_kernels.checkpoint import CheckpointError


def saved(write, content):
    buffer = io.BytesIO()
    write(content, buffer)
    return buffer.getvalue()


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


SMALL = {"model": {"encoder.encoders.0.x": torch.ones(3)}}
HEADER = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'

FILES = {
    "empty": (b"", "is empty"),
    "one byte": (b"\x80", "is damaged, cut short, or no checkpoint"),
    "text": (b"hello, this is no checkpoint\n", "is text, not a checkpoint: 'hello, this is no checkpoint'"),
    "json": (b'{"model": "zipformer"}', "is text, not a checkpoint"),
    "unicode": ("Gewichte für später".encode(), "is text, not a checkpoint: 'Gewichte für später'"),
    "html": (b"\n<!DOCTYPE html>\n<html>404</html>", "is an HTML or XML page, not a checkpoint"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied', "is an HTML or XML page, not a checkpoint"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a pointer of git-lfs"),
    "gzip": (gzip.compress(saved(torch.save, SMALL)), "is compressed by gzip: unpack it first"),
    "wav": (b"RIFF\x24\x00\x00\x00WAVEfmt ", "is a recording or another RIFF file"),
    "numpy": (b"\x93NUMPY\x01\x00", "is a NumPy array"),
    "zeros": (bytes(1000), "is no checkpoint: wanted what torch.save writes, or safetensors"),
    "noise": (random.Random(0).randbytes(1000), "is no checkpoint: wanted what torch.save writes, or safetensors"),
    "another zip": (zipped(**{"word/document.xml": "hello"}), "is a zip file, but not one that torch.save writes"),
    "npz": (zipped(**{"a.npy": b"\x93NUMPY"}), "is a zip file, but not one that torch.save writes"),
    "zip without weights": (
        zipped(**{"c/data.pkl": b"\x80\x02X\x02\x00\x00\x00hiq\x00."}),
        "is of type str, wanted a state_dict",
    ),
    "a call of nothing": (b"\x80\x02R.", "is damaged, cut short, or no checkpoint (IndexError"),
    "an unknown instruction": (b"\x80\x02e\x01\x02\xff.", "is damaged, cut short, or no checkpoint"),
    "a list": (saved(torch.save, [1, 2]), "is of type list, wanted a state_dict"),
    "a tensor": (saved(torch.save, torch.ones(2)), "is a tensor (2,), wanted a state_dict"),
    "torchscript": (saved(torch.jit.save, torch.jit.script(torch.nn.Identity())), "is a TorchScript program"),
    "other weights": (
        saved(torch.save, torch.nn.Linear(2, 2).state_dict()),
        "no weights of encoder.encoders.*, but weight",
    ),
    "no weights": (saved(torch.save, {}), "no weights of encoder.encoders.*, but none at all"),
    "safetensors with other weights": (
        safetensors.torch.save({"weight": torch.ones(2)}),
        "no weights of encoder.encoders.*, but weight",
    ),
    "safetensors cut in its header": (struct.pack("<Q", 60) + HEADER[:20], "is damaged, cut short, or no checkpoint"),
    "safetensors without its data": (
        struct.pack("<Q", len(HEADER)) + HEADER,
        "is damaged, cut short, or no checkpoint",
    ),
    "safetensors with a wrong header": (struct.pack("<Q", 3) + b"{x}", "is damaged, cut short, or no checkpoint"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_checkpoint_is_told(tmp_path, name):
    content, message = FILES[name]
    for suffix in ("pt", "safetensors"):
        path = tmp_path / f"c.{suffix}"
        path.write_bytes(content)
        for load in (load_checkpoint, load_encoder):
            with pytest.raises(CheckpointError) as error:
                load(path)
            assert str(error.value).startswith(f"{path}: {message}")
            assert "\n" not in str(error.value)


def test_what_is_no_file_is_told(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path, "is a folder, wanted a file"),
        (tmp_path / "absent.pt", "no such file"),
        (tmp_path / "absent" / "c.pt", "no such file"),
        (tmp_path / "pipe", "is no regular file"),
    ):
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path)
        assert str(error.value) == f"{path}: {message}"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read anything")
def test_an_unreadable_file_is_told(tmp_path):
    path = tmp_path / "c.pt"
    path.write_bytes(b"")
    path.chmod(0)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        load_checkpoint(path)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_file_that_is_cut_or_damaged_is_refused(tmp_path, form):
    """At any place: there is an error, or the weights are those that were saved."""
    path, weights = tmp_path / "c.pt", weights_of(*tiny())
    if form == "safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save({"model": weights}, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    chance = random.Random(0)
    for _ in range(25):
        path.write_bytes(whole[: chance.randrange(len(whole))])
        with pytest.raises(CheckpointError, match=r"c.pt: "):
            load_checkpoint(path)
    header = len(whole) - sum(value.numel() * 4 for value in weights.values()) if form != "zip" else len(whole)
    for _ in range(10):
        damaged = bytearray(whole)
        damaged[chance.randrange(header)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
        except CheckpointError:
            continue
        for part, wanted in zip(found, tiny(), strict=True):
            assert all(
                torch.equal(*pair)
                for pair in zip(part.state_dict().values(), wanted.state_dict().values(), strict=True)
            )
