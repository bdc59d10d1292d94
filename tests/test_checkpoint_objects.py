"""Other objects in a checkpoint: they are passed over, nothing that they name is imported, and nothing is called."""

import argparse
import collections
import datetime
import decimal
import functools
import io
import os
import pathlib
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from test_checkpoint import assert_same
from tiny import tiny, weights_of

from zipformer_kernels import load_checkpoint, load_encoder
from zipformer_kernels.checkpoint import CheckpointError
from zipformer_kernels.checkpoint.read import read, reading
from zipformer_kernels.checkpoint.unpickle import Global, Placeholder, Storage, StoredTensor, Unpickler


@pytest.fixture
def path(tmp_path):
    return tmp_path / "c.pt"


RECIPE = """
import collections, dataclasses, enum, random

class AttributeDict(dict):
    __getattr__ = dict.__getitem__

class Sampler:
    def __init__(self):
        self.__dict__.update(epoch=3, rng=random.Random(1), rows=[{1, 2}, frozenset("ab")])

class Slots:
    __slots__ = ("a",)

    def __init__(self):
        self.a = 1

class Words(list):
    pass

class Stateful:
    def __getstate__(self):
        return "bytes of a model"

    def __setstate__(self, state):
        raise AssertionError("never called")

class Reduced:
    def __reduce__(self):
        return function, (1, 2), {"state": 3}, iter([4, 5]), iter([("six", 7)])

class Keywords:
    def __new__(cls, *, a):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (), {"a": 1}

def function(*_):
    raise AssertionError("never called")

Mode = enum.Enum("Mode", "TRAIN TEST")
Pair = collections.namedtuple("Pair", "a b")

@dataclasses.dataclass
class Config:
    num_heads: object
"""


@pytest.fixture
def recipe(monkeypatch):
    """A module with classes of a recipe, which can be imported when a checkpoint is written."""
    module = types.ModuleType("recipe")
    monkeypatch.setitem(sys.modules, "recipe", module)
    exec(RECIPE, module.__dict__)
    return module


def objects(recipe):
    return {
        "numpy scalar": np.float64(1.5),
        "numpy array": np.arange(3),
        "attributes": recipe.AttributeDict(a=1, b={"c": recipe.AttributeDict()}),
        "sampler": recipe.Sampler(),
        "slots": recipe.Slots(),
        "words": recipe.Words(["a", "b"]),
        "stateful": recipe.Stateful(),
        "reduced": recipe.Reduced(),
        "keywords": recipe.Keywords(a=1),
        "class": recipe.Sampler,
        "function": recipe.function,
        "builtin": os.system,
        "partial": functools.partial(recipe.function, 1),
        "enum": recipe.Mode.TEST,
        "enum as key": {recipe.Mode.TRAIN: 1},
        "pair": recipe.Pair(1, 2),
        "dataclass": recipe.Config(recipe.Config(4)),
        "namespace": argparse.Namespace(lr=0.1),
        "path": pathlib.Path("exp"),
        "time": datetime.datetime(2024, 9, 1, tzinfo=datetime.timezone.utc),
        "span": datetime.timedelta(seconds=3),
        "decimal": decimal.Decimal("1.5"),
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, a=[1]),
        "deque": collections.deque([1, 2]),
        "set": {1, 2},
        "complex": 1 + 2j,
        "bytes": (b"abc", bytearray(b"abc")),
        "big": 2**100,
        "device": torch.device("cpu"),
        "dtype": (torch.float16, torch.Size([1, 2])),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "sparse": torch.eye(2).to_sparse(),
        "complex tensor": torch.ones(2, dtype=torch.complex64).conj(),
        "generator": torch.get_rng_state(),
        "module": torch.nn.Linear(2, 2),
        "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict(),
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_weights_load_beside_any_objects(path, recipe, monkeypatch, form, protocol):
    embed, encoder = tiny()
    content = recipe.AttributeDict(objects(recipe), model=weights_of(embed, encoder), best=objects(recipe))
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    monkeypatch.delitem(sys.modules, "recipe")
    imported = []
    with monkeypatch.context() as patch:
        patch.setattr(sys, "meta_path", [types.SimpleNamespace(find_spec=lambda *a: imported.append(a[0]))])
        found = read(path).entries
    assert imported == []
    for ours, theirs in zip(load_checkpoint(path), (embed, encoder), strict=True):
        assert_same(ours, theirs)
    assert "recipe" not in sys.modules
    assert type(found["best"]) is dict
    assert found["big"] == 2**100
    assert found["reduced"].arguments == (1, 2)
    assert (found["reduced"].entries, found["reduced"].elements) == ({"state": 3, "six": 7}, [4, 5])
    assert found["slots"].entries == {"a": 1}
    assert found["class"] == Global("recipe", "Sampler")
    assert found["builtin"].name == "system"


def test_parameters_are_read_from_objects(path, recipe):
    weights = recipe.AttributeDict(weights_of(*tiny()))
    for make in (recipe.AttributeDict, argparse.Namespace, types.SimpleNamespace, dict):
        torch.save({"model": weights, "params": make(num_heads="2,3", pos_head_dim=4)}, path)
        assert load_encoder(path).num_heads == (2, 3)
        torch.save({"model": weights, "params": make(num_heads="8", pos_head_dim=4)}, path)
        with pytest.raises(CheckpointError, match=r"num_heads 8, .* in the parameters that the checkpoint holds"):
            load_encoder(path)


# ---- nothing runs ----


class Call:
    """Pickled, it asks for a call."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def harm(path):
    """Attempts to write a file, by what is called."""
    target = str(path)
    yield Call(os.system, f"touch {target}")
    yield Call(eval, f"open({target!r}, 'w')")
    yield Call(exec, f"open({target!r}, 'w')")
    yield Call(open, target, "w")
    yield Call(pathlib.Path.write_text, pathlib.Path(target), "harm")
    yield Call(torch.save, 1, target)
    yield Call(torch.load, target)
    yield Call(torch.hub.load, "a", "b")
    yield Call(getattr, Call(__import__, "os"), "system")
    yield Call(functools.partial(os.system, f"touch {target}"))
    yield Call(np.save, target, 1)
    yield Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {target}")))
    yield Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, f"touch {target}")))
    yield Call(torch._utils._rebuild_parameter, Call(os.system, f"touch {target}"), False, None)
    yield Call(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (f"touch {target}",), {})
    yield Call(torch._tensor._rebuild_from_type_v2, Call(eval, "print"), torch.Tensor, (target,), {})
    yield Call(torch._utils._rebuild_device_tensor_from_numpy, Call(np.load, target), "f", "cpu", False)
    yield Call(collections.OrderedDict, Call(map, os.system, [f"touch {target}"]))
    yield Call(collections.OrderedDict, state={"__class__": Call(os.system, f"touch {target}")})
    yield Call(dict, {"a": Call(os.system, f"touch {target}")})
    yield Call(types.SimpleNamespace, state={"a": Call(os.system, f"touch {target}")})


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_no_code_of_a_file_runs(tmp_path, path, form, protocol):
    target = tmp_path / "harm"
    refused = 0
    for attempt in harm(target):
        content = {"model": {"encoder.encoders.0.x": torch.ones(1)}, "more": [attempt]}
        if form == "pickle":
            path.write_bytes(b"\x80\x02" + pickle.dumps(content, protocol=protocol))
        else:
            torch.save(content, path, pickle_protocol=max(protocol, 2), _use_new_zipfile_serialization=form == "zip")
        try:
            with reading(path):
                assert type(read(path)) is dict
        except CheckpointError:
            refused += 1
        assert not target.exists()
    assert refused <= 2  # where a dict or a storage is asked for, and a call is what would make it
    if form == "pickle":
        pickle.loads(pickle.dumps(Call(open, target, "w"), protocol=protocol)).close()
        assert target.exists()  # they do harm elsewhere


def test_the_weights_beside_harmful_objects_load(tmp_path, path):
    embed, encoder = tiny()
    attempts = [one for one in harm(tmp_path / "harm") if one.reduced[0] is not collections.OrderedDict]
    torch.save({"model": weights_of(embed, encoder), "more": attempts}, path)
    for ours, theirs in zip(load_checkpoint(path), (embed, encoder), strict=True):
        assert_same(ours, theirs)
    assert not (tmp_path / "harm").exists()


def short(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


def by_name(module, name):
    return short(module) + short(name) + b"\x93"


PROGRAMS = {
    "a dotted name": b"\x80\x04" + by_name("os", "path.os.system") + short("touch harm") + b"\x85R.",
    "a dotted name in torch": b"\x80\x04"
    + by_name("torch", "serialization.os.system")
    + short("touch harm")
    + b"\x85R.",
    "a name of the unpickler's module": b"\x80\x02c"
    + Unpickler.__module__.encode()
    + b"\nos.system\n(U\x0atouch harmtR.",
    "INST": b"(S'touch harm'\nios\nsystem\n.",
    "OBJ": b"(" + b"cos\nsystem\n" + b"S'touch harm'\no.",
    "NEWOBJ": b"\x80\x02cos\nsystem\nU\x0atouch harm\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04" + by_name("os", "system") + short("touch harm") + b"\x85}\x92.",
    "BUILD with __setstate__": b"\x80\x02cbuiltins\nobject\n)\x81}U\x0c__setstate__cos\nsystem\nsbU\x0atouch harmb.",
    "BUILD of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}U\x0c__defaults__)sb.",
    "BUILD of a class": b"\x80\x02ccollections\nOrderedDict\nN}U\x04keyscos\nsystem\ns\x86b.",
    "BUILD of a tensor": b"\x80\x02ctorch\nTensor\n)R(K\x01K\x02K\x03K\x04tb.",
    "APPEND to a function": b"\x80\x02cos\nsystem\nU\x0atouch harma.",
    "APPENDS to a call": b"\x80\x02cos\nsystem\n)R(U\x0atouch harme.",
    "SETITEM of a class": b"\x80\x02cos\nenviron\nU\x04HARMU\x04harms.",
    "EXT1": b"\x80\x02\x82\x01.",
    "a persistent object": b"\x80\x02cos\nsystem\nQ.",
    "a storage that is a function": b"\x80\x02(U\x07storagecos\nsystem\nU\x010U\x03cpuK\x01tQ.",
    "a call of a call": b"\x80\x02cbuiltins\ngetattr\ncos\nenviron\nU\x05clear\x86R)R.",
    "a method of what is made": b"\x80\x02cbuiltins\ngetattr\nccollections\nOrderedDict\n)RU\x05clear\x86R)R.",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_instructions_that_import_call_or_alter_make_placeholders(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    defaults, environ = torch._utils._rebuild_tensor_v2.__defaults__, dict(os.environ)
    try:
        made = Unpickler(io.BytesIO(PROGRAMS[program])).load()
    except (pickle.UnpicklingError, AttributeError, TypeError):
        pass  # nothing to be altered
    else:
        assert isinstance(made, (Placeholder, Global))
    assert os.listdir() == []
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults
    assert dict(os.environ) == environ
    assert "keys" not in vars(collections.OrderedDict) or collections.OrderedDict.keys is not os.system


def test_the_machine_holds_no_callable(path, recipe):
    """What it would need to call anything."""
    attempts = [one for one in harm(path) if one.reduced[0] is not collections.OrderedDict]
    torch.save(objects(recipe) | {"more": attempts}, path)
    seen, left = [], [read(path)]
    while left:
        value = left.pop()
        seen.append(value)
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            left += value
        elif isinstance(value, Placeholder):
            left += [value.kind, *value.arguments, value.entries, value.elements]
    assert len(seen) > 300
    assert not [value for value in seen if callable(value)]
    plain = (int, float, str, bytes, bytearray, type(None), dict, list, tuple, set, frozenset)
    assert {type(value) for value in seen} - set(plain) == {bool, Global, Placeholder, Storage, StoredTensor}


# ---- lies about tensors ----


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((10**6,), (1,), 0),
        ((4,), (1,), 10**9),
        ((4,), (10**15,), 0),
        ((4,), (-1,), 3),
        ((-4,), (1,), 0),
        ((4,), (1,), -1),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(path, size, stride, offset):
    class Lie(torch.Tensor):
        def __reduce_ex__(self, protocol):
            _, arguments = super().__reduce_ex__(protocol)[:2]
            make, _, (storage, *_), _ = arguments
            return make, (storage, offset, size, stride, False, collections.OrderedDict())

    torch.save({"encoder.encoders.0.lie": torch.ones(4).as_subclass(Lie)}, path)
    with pytest.raises(CheckpointError, match=r"c.pt: encoder.encoders.0.lie: "):
        load_encoder(path)


def test_a_storage_of_another_length_is_refused(path, tmp_path):
    torch.save({"encoder.encoders.0.x": torch.ones(4)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(path, "w") as short_:
        for name in whole.namelist():
            content = whole.read(name)
            short_.writestr(name, content[:8] if name.endswith("data/0") else content)
    with pytest.raises(CheckpointError, match=r"a storage of 8 bytes, not of 4 torch.float32"):
        load_encoder(path)


def test_negated_and_big_endian_tensors_are_not_misread(path, tmp_path):
    imaginary = torch.ones(4, dtype=torch.complex64).conj().imag
    assert imaginary.is_neg()
    torch.save({"encoder.encoders.0.x": imaginary}, path)
    with pytest.raises(CheckpointError, match="wanted a plain tensor"):
        load_encoder(path)
    torch.save({"x": torch.ones(4)}, tmp_path / "little.pt")
    with zipfile.ZipFile(tmp_path / "little.pt") as little, zipfile.ZipFile(path, "w") as big:
        for name in little.namelist():
            big.writestr(name, b"big" if name.endswith("byteorder") else little.read(name))
    with pytest.raises(CheckpointError, match="was written by a big-endian machine"):
        load_encoder(path)


def test_files_without_checksums_load_and_wrong_checksums_are_told(path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights_of(*tiny()), path)
    finally:
        torch.serialization.set_crc32_options(True)
    load_checkpoint(path)
    torch.save(weights_of(*tiny()), path)
    content = bytearray(path.read_bytes())
    bias = tiny()[1].encoders[0].layers[0].norm.bias
    at = content.index(struct.pack("<16f", *bias.tolist()))
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"c.pt: encoder.encoders.0.layers.0.norm.bias: .*CRC"):
        load_checkpoint(path)
