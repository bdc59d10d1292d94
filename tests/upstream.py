"""The real upstream, as `benchmarks.harness.upstream` finds it, with its activations called, not compiled."""

import contextlib
import os
import sys
import types
from pathlib import Path
from unittest import mock

import torch

sys.path.append(str(Path(__file__).parent.parent))  # where benchmarks/ is, for scripts that pytest does not run
from benchmarks.harness.upstream import SWITCH, load

os.environ[SWITCH] = "1"
scaling, zipformer, subsampling, optim = load("scaling", "zipformer", "subsampling", "optim")


class _WideTorch(types.ModuleType):
    """The module torch with float64 under the name float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def wide(module=None):
    """Upstream's softmax, Balancer and Whiten cast to float32 in their backward; within this block to
    float64. `module` is the module ``scaling`` that they are of, by default upstream's.

    So models in float64 can be compared to the precision of float64, every mechanism included.
    """
    with mock.patch.object(module or scaling, "torch", _WideTorch("torch")):
        yield
