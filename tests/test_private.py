"""Torch's private names: only `core/private.py` has them, and the package runs where torch has none of them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zipformer_kernels
from zipformer_kernels.core import private

PACKAGE = Path(zipformer_kernels.__file__).parent
APART = {PACKAGE / "core" / "private.py"}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path not in APART and path.parent.name != "bench"]

NAMES = (
    *("torch._C._is_tracing", "torch._C._are_functorch_transforms_active"),
    *("torch._C._len_torch_dispatch_stack", "torch._C._len_torch_function_stack", "torch._C._get_function_stack_at"),
    *("torch._C._will_engine_execute_node", "torch._C._current_graph_task_id"),
    *("torch.utils._device.DeviceContext", "torch._subclasses.fake_tensor.FakeTensor", "torch._disable_dynamo"),
    *("torch._C._autograd._top_saved_tensors_default_hooks",),
    *("torch.utils._python_dispatch._get_current_dispatch_mode_stack",),
)
"""What `private` looks up by name."""

OF_CUDA = "torch._C._cuda_getDevice", "torch._C._cuda_getCurrentRawStream"
"""What of it only a torch with CUDA has."""


def is_private(name: str) -> bool:
    """Whether a dotted name has a part with an underscore that torch does not mean for everyone."""
    return any(part.startswith("_") and not part.startswith(("__", "_foreach_")) for part in name.split("."))


def private_names(tree: ast.AST) -> list[str]:
    """Dotted private names of torch that a file imports or names."""
    of_torch, found = {"torch": "torch"}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    of_torch[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    found.append(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                found.append(f"{node.module}.{alias.name}")
                if alias.name[0].islower():  # a module; attributes of classes are those of objects here
                    of_torch[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id in of_torch:
                found.append(".".join([of_torch[inner.id], *reversed(parts)]))
    return [name for name in found if is_private(name)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_names_what_is_private_in_torch(path):
    assert private_names(ast.parse(path.read_text())) == []


def test_private_names_are_found():
    code = """
import torch, torch._dynamo
from torch.nn.modules import module as m
from torch.utils._device import DeviceContext
torch._C._is_tracing(), m._global_forward_hooks, torch._foreach_mul, torch.nn.Module.__init__, self._modules
"""
    assert set(private_names(ast.parse(code))) == {
        "torch._dynamo",
        "torch.utils._device.DeviceContext",
        *("torch._C._is_tracing", "torch.nn.modules.module._global_forward_hooks", "torch._C"),
    }


@pytest.mark.parametrize("name", NAMES + (OF_CUDA if torch.backends.cuda.is_built() else ()))
def test_this_torch_has_the_names(name):
    """On the versions that are tested nothing stands in; where torch drops a name, this says so."""
    assert private.private(name, None) is not None


def test_what_stands_in():
    assert private.private("torch._C._no_such_name", 3) == 3
    assert private.private("torch.no_such_module.name", 3) == 3
    assert private.no() is False
    assert list(private.none_of()) == []
    assert not isinstance(torch.zeros(1), private.Absent)


WITHOUT = """
import importlib
import torch

HIDDEN = {names!r}
real = importlib.import_module

class Hiding:
    def __init__(self, module):
        self._module = module
    def __getattr__(self, name):
        if f"{{self._module.__name__}}.{{name}}" in HIDDEN:
            raise AttributeError(name)
        return getattr(self._module, name)

def hiding(name, package=None):
    return Hiding(real(name, package)) if name.split(".")[0] == "torch" else real(name, package)

importlib.import_module = hiding
from zipformer_kernels.core import private
importlib.import_module = real
{code}
"""

RUN = """
import zipformer_kernels as zk
from zipformer_kernels import ops
from zipformer_kernels.core.call import watcher
from zipformer_kernels.ops.attention import AttentionWeights, aggregate
from torch.utils._python_dispatch import TorchDispatchMode

assert watcher() is None
x = torch.randn(5, 3, requires_grad=True)
y = zk.swoosh_l(x)
(dx,) = torch.autograd.grad(y.sum(), x)
# nobody tells of a transform: its tensors have no memory, and take the reference
assert torch.allclose(torch.func.vmap(zk.swoosh_l)(x), y)
assert torch.allclose(torch.func.grad(lambda t: zk.swoosh_l(t).sum())(x), dx)
with torch.device("cpu"):  # held for a mode that watches
    assert torch.allclose(zk.swoosh_l(x), y)

q, k, p, e = (t.detach().requires_grad_() for t in ops.example("attention")[:4])
found = []
for backend in ("auto", "eager"):
    v = torch.ones(k.shape[0], k.shape[1], k.shape[2] * 5, requires_grad=True)
    weights = AttentionWeights(q, k, p, e, backend=backend)
    out = aggregate(weights, v)
    found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, p, e, v))])
for ours, theirs in zip(*found, strict=True):
    assert torch.allclose(ours, theirs, atol=1e-5), (ours - theirs).abs().max()

from zipformer_kernels.modules.feedforward import FeedforwardModule
module = FeedforwardModule(8, 16, 0.0).eval()
module(torch.randn(3, 1, 8))
called = []
torch.nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(type(m).__name__))
module(torch.randn(3, 1, 8))
assert "Linear" in called
print("whole")
"""


def test_the_package_runs_without():
    """In a process of its own, where torch has none of the names: numbers and hooks are as they should be."""
    text = WITHOUT.format(names={*NAMES, *OF_CUDA}, code=RUN)
    result = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert result.stdout == "whole\n", result.stderr


@pytest.mark.parametrize("answer", [True, False])
def test_without_the_tables_of_global_hooks_torch_is_asked_or_all_modules_are_called(answer, monkeypatch):
    names = [f"_global_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre")]
    monkeypatch.setattr(private.nn_module, "_has_any_global_hook", lambda: answer, raising=False)
    for name in names:
        monkeypatch.delattr(private.nn_module, name)
    assert private._asks_for_global_hooks()() is answer
    monkeypatch.delattr(private.nn_module, "_has_any_global_hook")
    assert private._asks_for_global_hooks()() is True
