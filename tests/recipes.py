"""icefall's and ZipVoice's own model files, unaltered; only what they import and no encoder needs is stubbed.

Checkouts are named by the environment variables ``ICEFALL`` and ``ZIPVOICE``. k2 is stubbed by the five functions that
encoders call; packages that are not installed by empty modules.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import inspect
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from draws import seed_all, set_batch_count
from torch import nn

from zipformer_kernels.presets import CAUSAL, PRESETS

BINS = 80
FILES = ("zipformer.py", "scaling.py", "subsampling.py", "encoder_interface.py")
NAMES = ("zipformer", "scaling", "subsampling", "encoder_interface", "optim", "model", "icefall", "zipvoice", "profile")
ABSENT = (
    *("k2", "lhotse", "kaldialign", "kaldifeat", "kaldifst", "kaldi_decoder", "kaldilm", "sentencepiece", "pypinyin"),
    *("torchaudio", "graphviz", "piper_phonemize", "cn2an", "inflect", "jieba", "vocos", "safetensors"),
)
TINY = {
    "downsampling_factor": (1, 2, 4, 2),
    "encoder_dim": (16, 24, 32, 24),
    "num_encoder_layers": (1, 2, 1, 1),
    "encoder_unmasked_dim": (16, 16, 24, 16),
    "query_head_dim": 8,
    "pos_head_dim": 4,
    "value_head_dim": 4,
    "num_heads": 2,
    "feedforward_dim": (32, 48, 64, 48),
    "cnn_module_kernel": (7, 7, 5, 7),
    "pos_dim": 12,
}
SIZES = {"tiny": TINY, **PRESETS}
OWN_SIZE = "own"
"""The size that a model of another kind is published with: Zipformer v1, ZipVoice."""

FIRST_SIZES = {
    OWN_SIZE: {
        "encoder_dims": (384,) * 5,
        "attention_dim": (192,) * 5,
        "encoder_unmasked_dims": (256,) * 5,
        "zipformer_downsampling_factors": (1, 2, 4, 8, 2),
        "nhead": (8,) * 5,
        "feedforward_dim": (1024, 1024, 2048, 2048, 1024),
        "num_encoder_layers": (2, 4, 3, 2, 4),
        "cnn_module_kernels": (31,) * 5,
    },
    "tiny": {
        "encoder_dims": (32, 32),
        "attention_dim": (16, 16),
        "encoder_unmasked_dims": (24, 24),
        "zipformer_downsampling_factors": (1, 2),
        "nhead": (2, 2),
        "feedforward_dim": (32, 48),
        "num_encoder_layers": (1, 2),
        "cnn_module_kernels": (7, 7),
    },
}

# What a recipe's encoder takes besides, when it does what the recipe is for.
EXTRAS = {
    "lora_r": 4,
    "use_adapters": True,
    "adapter_dim": 8,
    "memory_dim": 20,
    "st_output_layer": 2,
}


class _Stub(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__ = ()
    __version__ = "99"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {"__module__": self.__name__})
        setattr(self, name, value)
        return value


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stubs for packages that nothing else finds."""

    def find_spec(self, name, path=None, target=None):
        wanted = name.split(".")[0] in ABSENT
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


def plain_swoosh(shift, constant):
    """Swoosh, and Swoosh with its derivative, in plain PyTorch."""

    def forward(x):
        return F.softplus(x - shift, threshold=50.0) - 0.08 * x - constant  # beyond 50 it is x to the last digit

    def forward_and_derivative(x):
        return forward(x), torch.sigmoid(x - shift) - 0.08

    return forward, forward_and_derivative


def k2(fused=False):
    """A stand-in for k2: its Swoosh functions, without the draws by which it rounds derivatives to a byte.

    Args:
        fused: with our kernels, so that upstream has in its timings what k2's are for.
    """
    module = _Stub("k2")
    for name, shift, constant in (("l", 4.0, 0.035), ("r", 1.0, 0.313261687)):
        forward, with_derivative = plain_swoosh(shift, constant)
        if fused:
            from zipformer_kernels.ops import swoosh

            forward = getattr(swoosh, f"swoosh_{name}")
        setattr(module, f"swoosh_{name}", forward)
        setattr(module, f"swoosh_{name}_forward", forward)
        setattr(module, f"swoosh_{name}_forward_and_deriv", with_derivative)
    return module


@contextlib.contextmanager
def importing(*folders, fused=False):
    """Within the block, modules are imported from these folders first, with stubs for what is not installed."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in (*NAMES, "k2")}
    path, finder = list(sys.path), _Stubs()
    for name in before:
        del sys.modules[name]
    sys.path[:0] = map(str, folders)
    sys.meta_path.append(finder)
    sys.modules["k2"] = k2(fused)
    sys.modules.setdefault("torch.utils.tensorboard", _Stub("torch.utils.tensorboard"))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in (*NAMES, "k2")]:
            del sys.modules[name]
        # The recipe's scripts keep what they imported: who comes next must import them anew.
        for name in [name for name, module in sys.modules.items() if _lies_in(module, folders)]:
            del sys.modules[name]
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Stub)]:
            del sys.modules[name]
        sys.modules.update(before)


def _lies_in(module, folders):
    """Whether a module was loaded from a file somewhere in these folders."""
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and any(Path(file).is_relative_to(folder) for folder in folders)


@contextlib.contextmanager
def wide(scaling):
    """Within the block this module ``scaling`` casts to float64 in place of float32; see `upstream.wide`."""
    import upstream

    with mock.patch.object(scaling, "torch", upstream._WideTorch("torch")):
        yield


def commit(checkout):
    """The commit of a checkout, or None where git does not know it."""
    if not (checkout / ".git").exists():
        return None
    run = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else None


def checkout(name):
    """The folder that an environment variable names, or None."""
    folder = os.environ.get(name)
    return Path(folder).resolve() if folder else None


@dataclass(frozen=True)
class Recipe:
    """One version of a model's files.

    Attributes:
        name: the folder in which it is found, in the checkout.
        folder: the same, where it is.
        others: other folders with the same files.
    """

    name: str
    folder: Path
    others: tuple[str, ...] = ()

    @property
    def checkout(self):
        return Path(str(self.folder).removesuffix(self.name))

    @contextlib.contextmanager
    def loaded(self, fused=False):
        """Within the block the recipe's modules are imported: its module ``zipformer`` and ``scaling``."""
        elsewhere = self.checkout / "egs/librispeech/ASR/zipformer"  # one recipe has no encoder_interface of its own
        with importing(self.folder, self.checkout, *([] if self.is_zipvoice else [elsewhere]), fused=fused):
            package = "zipvoice.models.modules." if self.is_zipvoice else ""
            names = [name for name in ("zipformer", "scaling", "subsampling") if (self.folder / f"{name}.py").exists()]
            yield types.SimpleNamespace(**{name: importlib.import_module(package + name) for name in names})

    @property
    def is_zipvoice(self):
        return self.name.startswith("zipvoice/")

    @property
    def is_first(self):
        """Whether this is Zipformer v1, which shares names with the current one."""
        return "\nclass Zipformer(" in (self.folder / "zipformer.py").read_text()

    def sizes(self):
        """The sizes that the model can be built in, as `build` takes them."""
        return ("tiny", OWN_SIZE) if self.is_zipvoice or self.is_first else tuple(SIZES)

    def streams(self):
        """Whether there are causal models."""
        return not self.is_zipvoice and not self.is_first

    def build(self, modules, size, causal=False, dtype=torch.float32):
        """A model in the middle of its training: weights perturbed, batch counts and names set."""
        seed_all(0)
        if self.is_zipvoice:
            model = _zipvoice(modules, size)
        elif self.is_first:
            model = FirstClient(modules, size)
        else:
            model = Client(modules, size, causal)
        model = model.to(dtype)
        for parameter in model.parameters():
            parameter.data += (0.1 * parameter.data.abs().mean() + 0.01) * torch.randn_like(parameter)
        set_batch_count(model, 3000.0)
        return model


def recipes():
    """Every version of a model's files in the checkouts, icefall's own recipe first."""
    found = []
    icefall, zipvoice = checkout("ICEFALL"), checkout("ZIPVOICE")
    if icefall:
        groups = {}
        for path in sorted(icefall.glob("egs/*/*/*/zipformer.py")):
            groups.setdefault(_digest(path.parent), []).append(path.parent)
        for folders in groups.values():
            folders.sort(key=lambda folder: (folder.parts[-3] != "librispeech", folder))
            first, *others = (str(folder.relative_to(icefall)) for folder in folders)
            found.append(Recipe(first, icefall / first, tuple(others)))
    if zipvoice:
        name = "zipvoice/models/modules"
        found.append(Recipe(name, zipvoice / name))
    return sorted(found, key=lambda recipe: (recipe.name != "egs/librispeech/ASR/zipformer", recipe.name))


def _digest(folder):
    texts = [(folder / name).read_bytes() for name in FILES[:2] if (folder / name).exists()]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


def accepted(function, arguments):
    """Those arguments that a function takes."""
    return {name: value for name, value in arguments.items() if name in inspect.signature(function).parameters}


class Client(nn.Module):
    """A conv embed, where the recipe has one, and an encoder, as the recipe's model joins them."""

    def __init__(self, modules, size, causal):
        super().__init__()
        encoder = modules.zipformer.Zipformer2
        config = {**SIZES[size], "causal": causal, **(CAUSAL if causal else {}), **EXTRAS}
        self.encoder_embed = None
        if hasattr(modules, "subsampling"):
            dropout = modules.scaling.ScheduledFloat((0.0, 0.3), (20000.0, 0.1))
            dim = config["encoder_dim"][0]
            self.encoder_embed = modules.subsampling.Conv2dSubsampling(BINS, dim, dropout=dropout)
        self.encoder = encoder(**accepted(encoder.__init__, config))
        self.takes_memory = "memory" in inspect.signature(encoder.forward).parameters

    def inputs(self, batch, frames, dtype=torch.float32):
        channels = BINS if self.encoder_embed is not None else self.encoder.encoder_dim[0]
        lengths = torch.tensor([frames - 10 * i for i in range(batch)])
        return [torch.randn(batch, frames, channels, dtype=dtype), lengths]

    def forward(self, x, x_lens):
        if self.encoder_embed is not None:
            x, x_lens = self.encoder_embed(x, x_lens)
        mask = torch.arange(x.shape[1]) >= x_lens[:, None]
        memory = {}
        if self.takes_memory:
            batch = x.shape[0]
            text = torch.sin(torch.arange(7 * batch * EXTRAS["memory_dim"], dtype=x.dtype))
            memory["memory"] = text.reshape(7, batch, -1)
            memory["memory_key_padding_mask"] = torch.arange(7).expand(batch, 7) >= 5
        return self.encoder(x.transpose(0, 1), x_lens, mask, **memory)


class FirstClient(nn.Module):
    """Zipformer v1, with its conv embed inside."""

    def __init__(self, modules, size):
        super().__init__()
        self.encoder = modules.zipformer.Zipformer(num_features=BINS, **FIRST_SIZES[size])

    inputs = Client.inputs

    @property
    def encoder_embed(self):
        return self.encoder.encoder_embed

    def forward(self, x, x_lens):
        return self.encoder(x, x_lens)


class TtsClient(nn.Module):
    """ZipVoice's two encoders: of text, and the decoder of flow matching with a time embedding."""

    def __init__(self, text_encoder, decoder):
        super().__init__()
        self.text_encoder, self.fm_decoder = text_encoder, decoder
        # The decoder makes this embedding in float32, whatever its weights are.
        decoder.time_embed.register_forward_pre_hook(lambda linear, args: args[0].to(linear[0].weight.dtype))

    def inputs(self, batch, frames, dtype=torch.float32):
        channels = self.fm_decoder.in_proj.in_features - self.text_encoder.out_proj.out_features
        lengths = torch.tensor([frames - 10 * i for i in range(batch)])
        text = torch.randn(batch, frames, self.text_encoder.in_proj.in_features, dtype=dtype)
        return [torch.randn(batch, frames, channels, dtype=dtype), text, torch.rand(batch, dtype=dtype), lengths]

    def forward(self, x, text, t, lengths):
        mask = torch.arange(x.shape[1]) >= lengths[:, None]
        text = self.text_encoder(text, None, mask)
        return self.fm_decoder(torch.cat([x, text], dim=2), t, mask)


def _zipvoice(modules, size):
    """The sizes that ZipVoice is published with, or very small ones."""
    encoder = modules.zipformer.TTSZipformer
    common = {"query_head_dim": 32, "pos_head_dim": 4, "value_head_dim": 12, "num_heads": 4, "pos_dim": 48}
    decoder = {"downsampling_factor": (1, 2, 4, 2, 1), "cnn_module_kernel": (31, 15, 7, 15, 31), "use_time_embed": True}
    if size == "tiny":
        text = {"num_encoder_layers": 1, "feedforward_dim": 32, "encoder_dim": 16, "cnn_module_kernel": 5}
        decoder |= {"num_encoder_layers": (1, 1, 2, 1, 1), "feedforward_dim": 48, "encoder_dim": 24}
        widths = 12, 10
    else:
        text = {"num_encoder_layers": 4, "feedforward_dim": 512, "encoder_dim": 192, "cnn_module_kernel": 9}
        decoder |= {"num_encoder_layers": (2, 2, 4, 4, 4), "feedforward_dim": 1536, "encoder_dim": 512}
        widths = 192, 100
    embedded, features = widths
    return TtsClient(
        encoder(embedded, features, downsampling_factor=1, use_time_embed=False, **text, **common),
        encoder(3 * features, features, **decoder, **common),
    )


@functools.cache
def by_name(name):
    """The recipe of a name, as `recipes` has it. Raises KeyError."""
    return {recipe.name: recipe for recipe in recipes()}[name]
