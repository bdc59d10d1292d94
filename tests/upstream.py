"""The real upstream, from the package `zipformer` on PyPI, without the heavy packages its `__init__` imports.

`scaling`, `zipformer`, `subsampling` and `optim` are upstream's modules, unchanged.
"""

import contextlib
import importlib
import importlib.util
import os
import random
import sys
import types
from unittest import mock

import torch

# Upstream then calls its activations instead of handing them to torch.compile; it looks at this nowhere else.
os.environ["K2_ONNX_EXPORT"] = "1"


def _fix_random_seed(seed):
    random.seed(seed)
    torch.manual_seed(seed)


def _register():
    spec = importlib.util.find_spec("zipformer")
    if spec is None:
        raise ImportError("the tests compare with upstream: pip install --no-deps zipformer==0.1.3")
    package = types.ModuleType("zipformer")
    package.__path__ = list(spec.submodule_search_locations)
    utils = types.ModuleType("zipformer.utils")
    utils.torch_autocast = lambda device_type="cuda", **kwargs: torch.amp.autocast(device_type, **kwargs)
    utils.fix_random_seed = _fix_random_seed
    sys.modules["zipformer"] = package
    sys.modules["zipformer.utils"] = utils


_register()
scaling = importlib.import_module("zipformer.modules.scaling")
zipformer = importlib.import_module("zipformer.modules.zipformer")
subsampling = importlib.import_module("zipformer.modules.subsampling")
optim = importlib.import_module("zipformer.modules.optim")


class _WideTorch(types.ModuleType):
    """The module torch with float64 under the name float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def wide():
    """Upstream's softmax, Balancer and Whiten cast to float32 in their backward; within this block to
    float64.

    So models in float64 can be compared to the precision of float64, every mechanism included.
    """
    with mock.patch.object(scaling, "torch", _WideTorch("torch")):
        yield
