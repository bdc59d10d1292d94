"""Small models built from upstream's classes, in both of the layouts in which upstream is found."""

import contextlib
import importlib.util
import re
import sys
import tempfile
import types
from pathlib import Path

import parity
import torch
import upstream
from draws import seed_all, set_batch_count
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
    encoder_class = zipformer.Zipformer2 if hasattr(zipformer, "Zipformer2") else zipformer.Zipformer
    model = Model(subsampling.Conv2dSubsampling, encoder_class, **config).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    set_batch_count(model, 3000.0)
    return model


def batch(dtype=torch.float64):
    return [torch.randn(2, 51, BINS, dtype=dtype), torch.tensor([51, 40])]


def assert_same_run(ours, theirs, args, *, recipe=None, **kwargs):
    """Also where modules of upstream's, or of a recipe's, are left on our side."""
    with upstream.wide(recipe and recipe.scaling) if args[0].dtype == torch.float64 else contextlib.nullcontext():
        parity.assert_same_run(ours, theirs, args, **kwargs)


def is_upstream(module):
    return type(module).__module__.split(".")[0] not in ("torch", "zipformer_kernels", __name__)


def snapshot(model):
    """Every module's class and everything it holds."""
    holds = ("_parameters", "_buffers", "_modules")
    return {
        path: (type(m), dict(vars(m)), [dict(getattr(m, name)) for name in holds]) for path, m in model.named_modules()
    }


ENCODER_INTERFACE = """
from torch import nn
class EncoderInterface(nn.Module):
    def forward(self, x, x_lens):
        raise NotImplementedError
"""
FILES = ("encoder_interface", "scaling", "subsampling", "zipformer")


@contextlib.contextmanager
def icefall(*edits, with_source=True):
    """Within the block upstream's sources are as icefall has them: top-level modules, icefall's names, a base class.

    Args:
        edits: (old, new) pieces of text, each to be found in one of the files.
        with_source: False for modules whose source cannot be had.
    """
    texts = {name: Path(getattr(upstream, name).__file__).read_text() for name in FILES[1:]} | {
        FILES[0]: ENCODER_INTERFACE
    }
    texts["zipformer"] = re.sub(r"Zipformer(?=Encoder|[(,])", "Zipformer2", texts["zipformer"]).replace(
        "class Zipformer2(torch.nn.Module):",
        "from encoder_interface import EncoderInterface\nclass Zipformer2(EncoderInterface):",
    )
    for old, new in [("zipformer.modules.", ""), ("zipformer.utils", "icefall.utils"), *edits]:
        assert any(old in text for text in texts.values()), f"not found: {old}"
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    names = [*FILES, "icefall", "icefall.utils"]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules["icefall"] = types.ModuleType("icefall")
    sys.modules["icefall.utils"] = sys.modules["zipformer.utils"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in FILES:
                path = Path(folder) / f"{name}.py"
                path.write_text(texts[name])
                spec = importlib.util.spec_from_file_location(name, path)
                sys.modules[name] = importlib.util.module_from_spec(spec)
                if with_source:
                    spec.loader.exec_module(sys.modules[name])
                else:
                    exec(compile(texts[name], "<nowhere>", "exec"), vars(sys.modules[name]))
            yield types.SimpleNamespace(**{name: sys.modules[name] for name in FILES})
        finally:
            for name in names:
                sys.modules.pop(name, None)
            sys.modules.update(before)
