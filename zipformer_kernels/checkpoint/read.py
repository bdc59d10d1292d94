"""Checkpoint files: which format one has, what lies in it, and what to say of one that cannot be read."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from zipformer_kernels.checkpoint.unpickle import CALLS, Global, Placeholder, Storage, StoredTensor, Unpickler

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # begins what torch.save wrote before 1.6, and writes still if asked

NO_CHECKPOINT = {
    b"version https://git-lfs": "is a pointer of git-lfs, not the file that it stands for: run `git lfs pull`",
    b"\x1f\x8b": "is compressed by gzip: unpack it first",
    b"7z\xbc\xaf\x27\x1c": "is compressed by 7-Zip: unpack it first",
    b"BZh": "is compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "is compressed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it first",
    b"RIFF": "is a recording or another RIFF file",
    b"fLaC": "is a recording",
    b"\x93NUMPY": "is a NumPy array",
    b"\x89HDF": "is an HDF5 file",
    b"\x7fELF": "is a compiled program",
}
"""What people take for checkpoints, by how it begins."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit."""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns whatever a broken file raises into a `CheckpointError` with the name of the file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except ModuleNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # there is hardly an exception that a broken file cannot raise
        (first, *_) = str(error).splitlines() or [""]
        what = f"{type(error).__name__}: {first}" if first else type(error).__name__
        raise CheckpointError(f"{path}: is damaged, cut short, or no checkpoint ({what})") from error


def read(path: str | Path) -> Any:
    """What lies in a checkpoint file, with `StoredTensor` for tensors and `Placeholder` for other objects.

    Raises:
        CheckpointError: it cannot be read; without the name of the file, which `reading` adds.
    """
    if not os.path.exists(path):
        raise CheckpointError("no such file")
    if os.path.isdir(path):
        raise CheckpointError("is a folder, wanted a file")
    if not os.path.isfile(path):
        raise CheckpointError("is no regular file")
    with open(path, "rb") as file:
        head = file.read(4096)
        if not head:
            raise CheckpointError("is empty")
        if head.startswith(b"PK\x03\x04"):
            return _read_zip(path)
        if _is_safetensors(head, os.path.getsize(path)):
            return _read_safetensors(path)
        if head.startswith(b"\x80"):
            return _read_pickles(file)
    raise CheckpointError(_what_else(head))


def tensor_of(value: Any) -> Tensor:
    """The tensor that `read` gave. Raises CheckpointError for what is none."""
    if isinstance(value, StoredTensor):
        return value.read()
    if isinstance(value, Tensor):
        return value
    raise CheckpointError(f"is {describe(value)}, wanted a plain tensor")


def describe(value: Any) -> str:
    """What `read` gave, in words."""
    if isinstance(value, Placeholder):
        return f"an object of {value.kind}" if isinstance(value.kind, Global) else "an object"
    if isinstance(value, StoredTensor):
        return f"a tensor {value.size}"
    return f"of type {type(value).__name__}"


def mapping_of(value: Any) -> Mapping[Any, Any] | None:
    """A dict, or the items or attributes of an object in place of which stands a placeholder; else None."""
    if isinstance(value, Placeholder):
        return value.entries or next((part for part in value.arguments if isinstance(part, dict)), None)
    return value if isinstance(value, dict) else None


def _what_else(head: bytes) -> str:
    for start, what in NO_CHECKPOINT.items():
        if head.startswith(start):
            return what
    try:
        text = head.decode("utf-8", "ignore" if len(head) == 4096 else "strict").lstrip()
    except UnicodeDecodeError:
        text = "\0"
    if text[:1] == "<":
        return "is an HTML or XML page, not a checkpoint: what it was downloaded from gave a page instead"
    if all(character.isprintable() or character.isspace() for character in text):
        (line, *_) = text.splitlines() or [""]
        return f"is text, not a checkpoint: {line[:60]!r}"
    return "is no checkpoint: wanted what torch.save writes, or safetensors"


def _is_safetensors(head: bytes, size: int) -> bool:
    """Whether it begins with the length of a header in JSON, and the header."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= max(size, 100_000_000)


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file  # an optional dependency

    return load_file(path)


def _read_zip(path: str | Path) -> Any:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise CheckpointError("is cut short: the directory that ends a zip file is missing") from error
    names = archive.namelist()
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError("is a zip file, but not one that torch.save writes")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in names:
        raise CheckpointError("is a TorchScript program, wanted weights: save its state_dict()")
    if f"{root}byteorder" in names and _read_member(archive, f"{root}byteorder") != b"little":
        raise CheckpointError("was written by a big-endian machine")

    def storage(dtype: torch.dtype, key: str, count: int) -> Storage:
        if (key, dtype) not in storages:
            storages[key, dtype] = Storage(dtype, count, partial(_read_member, archive, f"{root}data/{key}"))
        return storages[key, dtype]

    storages: dict[tuple[str, torch.dtype], Storage] = {}
    return Unpickler(io.BytesIO(_read_member(archive, pickles[0])), storage).load()


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.CRC == 0:  # torch.save can leave checksums out
        info.CRC = None
    return archive.read(info)


def _read_pickles(file: BinaryIO) -> Any:
    """What `pickle.dump` wrote, or `torch.save` before 1.6."""
    file.seek(0)
    first = Unpickler(file, calls=CALLS | {Global("torch.storage", "_load_from_bytes"): _read_storage}).load()
    return _read_legacy(file) if first == LEGACY_MAGIC else first


def _read_storage(content: bytes) -> Any:
    """The storage of a tensor in `pickle.dump`'s files, itself a file as `torch.save` before 1.6 wrote it."""
    file = io.BytesIO(content)
    if Unpickler(file).load() != LEGACY_MAGIC:
        raise pickle.UnpicklingError("a storage that is none")
    return _read_legacy(file)


def _read_legacy(file: BinaryIO) -> Any:
    """Three pickles (version, machine, content), then one of the storages' keys, then each of these by length."""

    def storage(dtype: torch.dtype, key: str, count: int) -> Storage:
        return storages.setdefault(key, Storage(dtype, count, lambda: b""))

    storages: dict[str, Storage] = {}
    Unpickler(file).load()
    machine = Unpickler(file).load()
    if not machine["little_endian"]:
        raise CheckpointError("was written by a big-endian machine")
    content = Unpickler(file, storage).load()
    for key in Unpickler(file).load():
        (count,) = struct.unpack("<q", file.read(8))
        if key not in storages:  # of objects that are not read, and so of unknown length
            raise CheckpointError("holds tensors of kinds that cannot be read")
        data = file.read(count * storages[key].dtype.itemsize)
        storages[key].read = partial(bytes, data)
    return content
