"""Whatever stands in a module's place is called: every submodule is altered in every way, ours beside upstream's.

The submodules come from ``named_modules()``, so a new one is covered the day it appears.
"""

import contextlib
from collections import Counter

import pytest
import torch
import upstream
from draws import seed_all, set_batch_count
from tolerances import rounding
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from zipformer_kernels import modules as ours

FRAMES, BATCH, CHANNELS, LEFT, BINS = 8, 2, 12, 8, 11
CHUNKS = {"causal": True, "chunk_size": (8,), "left_context_frames": (32,)}


# ---- what is altered: each entry makes a module from a namespace with upstream's class names ----


def _layer(namespace, causal):
    sizes = {"pos_dim": 6, "num_heads": 2, "query_head_dim": 4, "pos_head_dim": 2, "value_head_dim": 3}
    return namespace.ZipformerEncoderLayer(CHANNELS, **sizes, feedforward_dim=16, cnn_module_kernel=5, causal=causal)


def _stack(namespace, causal):
    kwargs = {"pos_dim": 6, "dropout": 0.0, "warmup_begin": 0.0, "warmup_end": 1.0}
    inner = namespace.ZipformerEncoder(_layer(namespace, causal), 1, **kwargs)
    return namespace.DownsampledZipformerEncoder(inner, CHANNELS, downsample=2, dropout=0.0, causal=causal)


def _embed(namespace, causal):
    return namespace.Conv2dSubsampling(BINS, 6, 2, 3, 4)


class _Upstream:
    """Upstream's classes, of whatever file, under one roof."""

    def __getattr__(self, name):
        return getattr(upstream.zipformer, name, None) or getattr(upstream.subsampling, name)


MAKE = {"layer": _layer, "causal layer": lambda n, _: _layer(n, True), "stack": lambda n, _: _stack(n, True)}
MAKE["conv embed"] = _embed


def pair(what):
    """Ours and upstream's with the same weights, in double precision."""
    made = []
    for namespace in (_Upstream(), ours):
        seed_all(0)
        made.append(MAKE[what](namespace, False).double())
    theirs, mine = made
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    mine.load_state_dict(theirs.state_dict())
    for module in made:
        set_batch_count(module, 500.0)
    return mine, theirs


# ---- how it is run: offline and as a stream ----


def streams(what):
    return what != "layer"  # causal ones do


def _offline(what, module, x):
    if what == "conv embed":
        return module(x, torch.tensor([x.shape[1], x.shape[1] - 3]))[:1]
    padding = torch.arange(FRAMES) >= torch.tensor([[FRAMES], [FRAMES - 2]])
    if what == "stack":
        return (module(x, chunk_size=4, src_key_padding_mask=padding[:, ::2]),)
    position = torch.sin(torch.arange((2 * FRAMES - 1) * 6.0)).view(1, -1, 6).double()
    chunk_size = 4 if what == "causal layer" else -1
    return (module(x, position, chunk_size=chunk_size, src_key_padding_mask=padding),)


def _states(left, channels=CHANNELS, batch=BATCH):
    value, conv = (left, batch, 2 * 3), (batch, channels, 2)
    shapes = (left, batch, 2 * 4), (1, batch, left, 3 * channels // 4), value, value, conv, conv
    return [torch.randn(shape, generator=torch.Generator().manual_seed(3)).double() for shape in shapes]


def _stream(what, module, x):
    if what == "conv embed":
        cache = torch.randn(BATCH, 4, 3, 2, generator=torch.Generator().manual_seed(3)).double()
        y, _, cache = module.streaming_forward(x, torch.full((BATCH,), x.shape[1]), cache)
        return y, cache
    if what == "stack":
        padding = torch.arange(LEFT // 2 + FRAMES // 2) < torch.tensor([[0], [3]])
        y, states = module.streaming_forward(x, _states(LEFT // 2), LEFT // 2, padding)
        return y, *states
    padding = torch.arange(LEFT + FRAMES) < torch.tensor([[0], [3]])
    position = torch.sin(torch.arange((LEFT + 2 * FRAMES - 1) * 6.0)).view(1, -1, 6).double()
    return module.streaming_forward(x, position, *_states(LEFT), LEFT, padding)


MODES = ("infer", "stream", "gradients", "stream with gradients")


def results(what, module, mode):
    """Outputs, and the gradient of the input where there is one; or the exception."""
    module.train(mode == "train")
    shape = (BATCH, 25, BINS) if what == "conv embed" else (FRAMES, BATCH, CHANNELS)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    graded = mode not in ("infer", "stream")
    x.requires_grad_(graded)
    seed_all(2)
    with torch.set_grad_enabled(graded), upstream.wide():
        try:
            found = list((_stream if "stream" in mode else _offline)(what, module, x))
            if graded:
                weights = torch.randn(found[0].shape, generator=torch.Generator().manual_seed(4)).double()
                found += torch.autograd.grad(found[0], x, weights)
        except Exception as error:
            return error
    return [y.detach() for y in found]


# ---- the ways to alter a module ----


def scaled(y):
    """Another output, of whatever kind."""
    return (scaled(y[0]), *y[1:]) if isinstance(y, tuple) else y * 0.9


class Wrap(nn.Module):
    """An adapter around a module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return scaled(self.inner(*args, **kwargs))


class Transparent(Wrap):
    """A wrapper that passes on attributes, as those for distributed training and adapters do."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Scaled(nn.Module):
    def forward(self, x):
        return 0.9 * x


def _place(root, name):
    parent, _, last = name.rpartition(".")
    return root.get_submodule(parent), last


# Each alters the submodule of a name, and returns what undoes that.


def wrap(root, name, wrapper=Wrap):
    parent, last = _place(root, name)
    module = parent._modules[last]
    parent._modules[last] = wrapper(module)
    return lambda: parent._modules.update({last: module})


def wrap_transparently(root, name):
    return wrap(root, name, Transparent)


def subclass(root, name):
    module = root.get_submodule(name)
    kind = type(module)
    module.__class__ = type("Sub", (kind,), {"forward": lambda self, *a, **k: scaled(kind.forward(self, *a, **k))})
    return lambda: setattr(module, "__class__", kind)


def patch(root, name):
    module = root.get_submodule(name)
    forward = module.forward
    module.forward = lambda *args, **kwargs: scaled(forward(*args, **kwargs))
    return lambda: delattr(module, "forward")


def patch_stream(root, name):
    module = root.get_submodule(name)
    forward = module.streaming_forward
    module.streaming_forward = lambda *args, **kwargs: scaled(forward(*args, **kwargs))
    return lambda: delattr(module, "streaming_forward")


def hook(root, name):
    return root.get_submodule(name).register_forward_hook(lambda module, args, y: scaled(y)).remove


def hook_before(root, name):
    def before(module, args, kwargs):
        return ((0.9 * args[0], *args[1:]), kwargs) if args else (args, kwargs)

    return root.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True).remove


def hook_globally(root, name):
    target = root.get_submodule(name)
    look = lambda module, args, y: scaled(y) if module is target else None  # noqa: E731
    return torch_module.register_module_forward_hook(look).remove


def parametrization(root, name):
    module = root.get_submodule(name)
    names = list(dict(module.named_parameters(recurse=False)))
    for parameter in names:
        parametrize.register_parametrization(module, parameter, Scaled())

    def undo():
        for parameter in names:
            parametrize.remove_parametrizations(module, parameter, leave_parametrized=False)

    return undo


def train_alone(root, name):
    """In training mode by itself, so that its dropout is on."""
    module = root.get_submodule(name)
    inside = list(module.modules())
    for part in inside:
        part.train = lambda mode=True, part=part: part
        part.training = True

    def undo():
        for part in inside:
            del part.train

    return undo


ALTERATIONS = {
    alter: MODES[:2] if alter in (hook_globally, train_alone) else MODES
    for alter in (wrap, wrap_transparently, subclass, patch, hook, hook_before, hook_globally, parametrization)
}
ALTERATIONS[patch_stream] = MODES[1::2]
ALTERATIONS[hook] = (*MODES, "train")
ALTERATIONS[train_alone] = MODES[:2]


def callable_names(root, alter):
    """The submodules that can be altered so: those that have a forward, which schedules have not."""
    streams = lambda m: alter is not patch_stream or hasattr(m, "streaming_forward")  # noqa: E731
    return [
        name for name, m in root.named_modules() if name and type(m).forward is not nn.Module.forward and streams(m)
    ]


def modes_of(what, alter):
    return [mode for mode in ALTERATIONS[alter] if streams(what) or "stream" not in mode]


def agree(actual, expected):
    """None, or how they differ. Where upstream raises, so must ours, the same kind of error."""
    if isinstance(expected, Exception) or isinstance(actual, Exception):
        return None if type(actual) is type(expected) else f"{actual!r}, upstream {expected!r}"
    for mine, theirs in zip(actual, expected, strict=True):
        error = (mine - theirs).abs().max() / theirs.square().mean().sqrt().clamp(min=1e-6)
        if not error <= rounding(torch.float64, 10_000):
            return f"off by {error:.1e}"
    return None


@pytest.mark.parametrize(
    ("what", "alter"),
    [pytest.param(w, a, id=f"{w}-{a.__name__}") for w in MAKE for a in ALTERATIONS if modes_of(w, a)],
)
def test_an_altered_submodule_is_called_as_upstream_calls_it(what, alter):
    originals = pair(what)
    names = callable_names(originals[0], alter)
    assert names == callable_names(originals[1], alter)
    if what == "layer":  # the rest is as in a causal layer
        names = [name for name in names if name.startswith("conv_module1")]
    elif what == "stack":
        names = [name for name in names if name.count(".") < 3]
    before = {mode: results(what, originals[0], mode) for mode in modes_of(what, alter)}
    wrong, effects = {}, 0
    for name in names:
        found = {mode: [] for mode in before}
        for module in originals:
            undo = alter(module, name)
            for mode in before:
                found[mode].append(results(what, module, mode))
            undo()
        for mode, (mine, theirs) in found.items():
            effects += agree(mine, before[mode]) is not None
            reason = agree(mine, theirs)
            if reason:
                wrong[name, mode] = reason
    assert not wrong, f"{len(wrong)} differ: {dict(list(wrong.items())[:12])}"
    if alter is not train_alone:  # few have any dropout
        assert effects > len(names) / 2, "an alteration should change something"
    elif what == "causal layer":
        assert effects >= 3, "the dropout of three feed-forwards"


def counted(what, module, mode):
    """How often each submodule is called, and seen in backward, by its own hooks; and by global ones, forward."""
    own, backward, overall = Counter(), Counter(), Counter()
    name_of = {submodule: name for name, submodule in module.named_modules()}
    with contextlib.ExitStack() as stack:
        for submodule, name in name_of.items():
            hooks = [submodule.register_forward_hook(lambda *_, name=name: own.update([name]))]
            if "gradients" in mode:
                hooks.append(submodule.register_full_backward_hook(lambda *_, name=name: backward.update([name])))
            for handle in hooks:
                stack.callback(handle.remove)
        results(what, module, mode)
    look = torch_module.register_module_forward_hook(lambda m, *_: overall.update([name_of[m]]))
    with contextlib.ExitStack() as stack:
        stack.callback(look.remove)
        results(what, module, mode)
    return own, backward, overall


def test_a_stream_of_a_layer_that_is_not_causal_is_refused():
    assert isinstance(error := results("layer", pair("layer")[0], "stream"), ValueError)
    assert str(error) == "a stream needs a module made with causal=True"


@pytest.mark.parametrize(("what", "mode"), [(w, m) for w in MAKE for m in MODES if streams(w) or "stream" not in m])
def test_hooks_see_the_calls_that_upstreams_show(what, mode):
    mine, theirs = (counted(what, module, mode) for module in pair(what))
    assert sum(theirs[0].values()) > 5
    assert mine == theirs
