"""Small models built from upstream's classes, in both of the layouts in which upstream is found."""

import contextlib
import importlib.util
import sys
import types

import parity
import torch
import upstream
from parity import seed_all, set_batch_count
from test_encoder_upstream import CONFIG
from torch import nn

BINS = 20
CAUSAL = {"causal": True, "chunk_size": (8, 16, -1), "left_context_frames": (32, 64, -1)}


class Model(nn.Module):
    """A conv embed, an encoder and a projection, as in a recipe's model."""

    def __init__(self, embed_class, encoder_class, **config):
        super().__init__()
        self.encoder_embed = embed_class(BINS, CONFIG["encoder_dim"][0], 4, 8, 6)
        self.encoder = encoder_class(**CONFIG, **config)
        self.proj = nn.Linear(max(CONFIG["encoder_dim"]), 5)

    def forward(self, x, x_lens):
        x, x_lens = self.encoder_embed(x, x_lens)
        mask = torch.arange(x.shape[1]) >= x_lens[:, None]
        x, x_lens = self.encoder(x.transpose(0, 1), x_lens, mask)
        return self.proj(x), x_lens


def build(subsampling=upstream.subsampling, zipformer=upstream.zipformer, dtype=torch.float64, **config):
    """A model of upstream's, somewhere in training: weights perturbed, batch counts and names set."""
    seed_all(0)
    encoder_class = getattr(zipformer, "Zipformer2", zipformer.Zipformer)
    model = Model(subsampling.Conv2dSubsampling, encoder_class, **config).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    set_batch_count(model, 3000.0)
    return model


def batch(dtype=torch.float64):
    return [torch.randn(2, 51, BINS, dtype=dtype), torch.tensor([51, 40])]


def assert_same_run(ours, theirs, args, **kwargs):
    """Also where modules of upstream's are left on our side."""
    with upstream.wide() if args[0].dtype == torch.float64 else contextlib.nullcontext():
        parity.assert_same_run(ours, theirs, args, **kwargs)


def is_upstream(module):
    return type(module).__module__.split(".")[0] not in ("torch", "zipformer_kernels", __name__)


def snapshot(model):
    """Every module's class and everything it holds."""
    holds = ("_parameters", "_buffers", "_modules")
    return {
        path: (type(m), dict(vars(m)), [dict(getattr(m, name)) for name in holds]) for path, m in model.named_modules()
    }


@contextlib.contextmanager
def icefall():
    """Upstream's sources as icefall has them: top-level modules, an abstract base, and activations by k2."""

    class EncoderInterface(nn.Module):
        def forward(self, x, x_lens):
            raise NotImplementedError

    names = ("scaling", "subsampling", "zipformer")
    kept = {name: sys.modules[name] for name in sys.modules if name.split(".")[0] in names}
    loaded = []
    try:
        for name in names:
            spec = importlib.util.spec_from_file_location(name, getattr(upstream, name).__file__)
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module if name != "zipformer" else sys.modules[name]
            spec.loader.exec_module(module)
            sys.modules[f"zipformer.modules.{name}"] = module
            loaded.append(module)
        scaling, subsampling, zipformer = loaded
        bodies = {key: value for key, value in vars(zipformer.Zipformer).items() if key != "__dict__"}
        bodies.pop("__weakref__", None)
        zipformer.Zipformer = zipformer.Zipformer2 = type("Zipformer2", (EncoderInterface,), bodies)
        yield types.SimpleNamespace(scaling=scaling, subsampling=subsampling, zipformer=zipformer)
    finally:
        for name in [*names, *(f"zipformer.modules.{name}" for name in names)]:
            sys.modules.pop(name, None)
        sys.modules.update(kept)
