"""How a call of a layer settles by which way its branches run: on what, and when it must not."""

import copy
import gc
import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_inference import arguments, layer, run
from test_plain_modules import MAKE, MODES, Wrap, agree, callable_names, pair, results, streams, wrap
from tolerances import PARITY, assert_agrees
from torch import nn

from zipformer_kernels import use_backend
from zipformer_kernels.branch import plain
from zipformer_kernels.branch.plain import When, plain_parts
from zipformer_kernels.branch.ways import IN_PLACE, MODULES, ONE_KERNEL, WAYS, settle
from zipformer_kernels.core import backend
from zipformer_kernels.modules import SelfAttention

ROOT = Path(__file__).parents[1]


def settled(module, x, *others, masks=(), when=When.INFERENCE):
    with torch.no_grad():
        return settle(module, x, others, when, masks)


def everything(module):
    """The names of all parts of a layer that a fused way can leave out."""
    return set(plain._parts_of(module, When.INFERENCE))


# ---- what is remembered of a layer's parts ----


def replace_parameters(module):
    module.feed_forward2.in_proj._parameters = dict(module.feed_forward2.in_proj._parameters)


class Other(nn.Parameter):
    """A parameter whose numbers may stand in memory in another form."""


def replace_one(module):
    weight = module.feed_forward2.in_proj.weight
    module.feed_forward2.in_proj._parameters["weight"] = weight.as_subclass(Other)


def to_buffer(module, name):
    value = getattr(module, name).detach()
    delattr(module, name)
    module.register_buffer(name, value)


CHANGES = {
    "padding_mode": ("conv_module1", lambda m: setattr(m.conv_module1.depthwise_conv, "padding_mode", "circular")),
    "dilation": ("conv_module1", lambda m: setattr(m.conv_module1.depthwise_conv, "dilation", (2,))),
    "activation": ("conv_module2", lambda m: setattr(m.conv_module2.out_proj, "activation", "SwooshL")),
    "class of a parameter": ("feed_forward2", replace_one),
    "training": ("feed_forward3", lambda m: m.feed_forward3.out_whiten.train()),
    "part of a part": ("nonlin_attention", lambda m: setattr(m.nonlin_attention, "tanh", nn.Hardtanh())),
    "part": ("bypass", lambda m: setattr(m, "bypass", Wrap(m.bypass))),
    "no part": ("whiten", lambda m: m._modules.pop("whiten")),
    "a parameter that an attribute hides": (
        "feed_forward1",
        lambda m: m.feed_forward1.in_proj.__dict__.update(weight=m.feed_forward1.in_proj.weight.half()),
    ),
    "a parameter that became a buffer": ("norm", lambda m: to_buffer(m.norm, "bias")),
    "hooks put in place": (
        "norm",
        lambda m: m.norm.__dict__.update(_forward_hooks={0: lambda *_: None}),
    ),
    "class": ("norm", lambda m: setattr(m.norm, "__class__", type("Sub", (type(m.norm),), {}))),
    "forward": ("self_attn1", lambda m: setattr(m.self_attn1, "forward", m.self_attn1.forward)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_a_call_is_seen_by_the_next(change):
    module = layer()
    assert plain_parts(module, When.INFERENCE) == everything(module)
    part, act = CHANGES[change]
    act(module)
    assert plain_parts(module, When.INFERENCE) == everything(module) - {part}


def test_parameters_may_be_replaced_by_others_of_their_kind():
    module = layer(torch.float32)
    args = arguments(torch.float32)
    with torch.no_grad():
        run(module, *args)
        replace_parameters(module)
        module.feed_forward2.in_proj.weight = nn.Parameter(module.feed_forward2.in_proj.weight * 2)
        module.norm.log_scale.data = module.norm.log_scale.data + 1
        actual = run(module, *args)
    assert plain_parts(module, When.INFERENCE) == everything(module)
    assert_agrees(actual, run(module, *args).detach(), PARITY[actual.dtype])


def test_a_forward_replaced_on_a_class_is_called(monkeypatch):
    module = layer()
    assert plain_parts(module, When.INFERENCE) == everything(module)
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: x)
    assert plain_parts(module, When.INFERENCE) == everything(module) - {"nonlin_attention"}


def test_a_copy_is_looked_at_by_itself_and_nothing_is_held():
    module = layer()
    assert plain_parts(module, When.INFERENCE) == everything(module)
    other = copy.deepcopy(module)
    other.norm.register_forward_hook(lambda *_: None)
    assert plain_parts(other, When.INFERENCE) == everything(module) - {"norm"}
    assert plain_parts(module, When.INFERENCE) == everything(module)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None


def test_what_is_replaced_is_freed():
    module = layer()
    assert plain_parts(module, When.INFERENCE) == everything(module)
    before = [weakref.ref(module.feed_forward1), weakref.ref(module.conv_module1.in_proj.weight)]
    module.feed_forward1 = Wrap(layer().feed_forward1)
    module.conv_module1.in_proj.weight = nn.Parameter(torch.zeros_like(module.conv_module1.in_proj.weight))
    gc.collect()
    assert [x() for x in before] == [None, None]


def test_a_part_that_knows_its_layer_does_not_hold_it():
    module = layer()
    module.feed_forward1.__dict__["owner"] = [module]
    assert plain_parts(module, When.INFERENCE) == everything(module)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_what_was_remembered_is_what_would_be_said_anew():
    """`Answer` looks at all that `matches` does: whatever changes one answer changes the other, for every submodule."""
    module = layer(causal=True)
    for name, submodule in list(module.named_modules())[1:]:
        if type(submodule).forward is nn.Module.forward:
            continue
        before = plain_parts(module, When.CHUNK)
        undo = wrap(module, name)
        remembered = plain_parts(module, When.CHUNK)
        plain._known.pop(module)
        assert remembered == plain_parts(module, When.CHUNK), name
        undo()
        assert plain_parts(module, When.CHUNK) == before, name


# ---- when modules are called ----


def test_what_a_call_settles_on():
    module, (x, position, padding) = layer(torch.float32), arguments(torch.float32)
    found = settled(module, x, position, None, masks=(padding,))
    assert found.ways[0] is IN_PLACE
    assert found.fused == everything(module)
    assert found.backend == ("eager" if backend.missing["cpu"] else "cpu")
    assert settled(module, x[:5, :1], position).ways[:2] == (ONE_KERNEL, IN_PLACE)
    with use_backend("eager"):
        assert settled(module, x).backend == "eager"


class Sub(torch.Tensor):
    """A subclass: its numbers may stand in memory in another form."""


REFUSED = {
    "gradients": lambda m, x: settle(m, x, (), When.INFERENCE),
    "autocast": lambda m, x: torch.autocast("cpu", torch.bfloat16)(settled)(m, x),
    "half precision": lambda m, x: settled(m.bfloat16(), x.bfloat16()),
    "a state in another dtype": lambda m, x: settled(m, x, x.double()),
    "a state of integers": lambda m, x: settled(m, x, torch.zeros(2, dtype=torch.int8)),
    "a complex state": lambda m, x: settled(m, x, x.to(torch.complex64)),
    "positions of a subclass": lambda m, x: settled(m, x, x.as_subclass(Sub)),
    "a parameter in another dtype": lambda m, x: settled(m, x) if m.feed_forward1.double() else None,
    "no memory": lambda m, x: settled(m.to("meta"), x.to("meta")),
    "another backend": lambda m, x: use_backend("triton")(settled)(m, x),
}


@pytest.mark.parametrize("why", REFUSED)
def test_calls_that_modules_must_serve(why):
    module, x = layer(torch.float32), arguments(torch.float32)[0]
    assert REFUSED[why](module, x) == MODULES


STRIDED = ("conv_module1.in_proj", "feed_forward1.in_proj", "nonlin_attention.in_proj", "self_attn1.in_proj")


@pytest.mark.parametrize("name", STRIDED)
def test_biases_of_any_strides(name):
    module, args = layer(torch.float32, causal=True), arguments(torch.float32)
    part = module.get_submodule(name)
    apart = torch.randn(part.bias.numel(), 3)
    part.bias = nn.Parameter(apart[:, 1])
    assert not part.bias.is_contiguous()
    with torch.no_grad():
        actual = run(module, *args)
    assert_agrees(actual, run(module, *args).detach(), PARITY[actual.dtype])


WRONG_SHAPES = {
    "conv_module1.depthwise_conv.chunkwise_conv.bias": (1,),
    "conv_module1.depthwise_conv.chunkwise_conv_scale": (2, 24, 3),
    "conv_module1.depthwise_conv.causal_conv.weight": (24, 1, 2),
    "conv_module1.in_proj.bias": (1,),
    "bypass.bypass_scale": (1,),
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_parameters_whose_shapes_changed_are_refused(name):
    module, args = layer(torch.float32, causal=True), arguments(torch.float32)
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, nn.Parameter(torch.ones(WRONG_SHAPES[name])))
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match=r"must have shape|size"):
        run(module, *args)


def test_a_subclass_gets_a_tensor():
    """Ours take a handle of the attention weights; a class that is derived from ours has not said so."""
    module, args, seen = layer(), arguments(), []

    class Own(SelfAttention):
        def forward(self, x, attn_weights):
            seen.append(type(attn_weights))
            return super().forward(x, attn_weights)

    module.self_attn1.__class__ = Own
    run(module, *args)
    with torch.no_grad():
        run(module, *args)
    assert seen == [torch.Tensor, torch.Tensor]


def test_weights_that_come_from_elsewhere_are_looked_at():
    """A module in our place may return weights that kernels cannot read; the branches that take them are called."""
    module, args = layer(torch.float32), arguments(torch.float32)
    module.self_attn_weights.forward = lambda *a, forward=module.self_attn_weights.forward, **k: (
        forward(*a, **k).double().as_subclass(Sub)
    )
    for name in ("self_attn1", "self_attn2", "nonlin_attention"):  # what takes them takes them in any dtype
        part = getattr(module, name)
        part.forward = lambda x, w, forward=part.forward: forward(x, w.as_subclass(torch.Tensor).float())
    with torch.no_grad():
        actual = run(module, *args)
    assert type(actual) is torch.Tensor
    assert_agrees(actual, run(module, *args).detach(), PARITY[actual.dtype])


def test_a_branch_that_changes_the_dtype_is_followed_by_modules():
    module, args = layer(torch.float32), arguments(torch.float32)
    forward = module.conv_module2.forward
    module.conv_module2.forward = lambda *a, **k: forward(*a, **k).double()
    for name in ("feed_forward3", "norm", "bypass"):
        getattr(module, name).double()
    with torch.no_grad():
        actual = run(module, *args)
    expected = run(module, *args).detach()
    assert actual.dtype == expected.dtype == torch.float64
    assert_agrees(actual, expected, PARITY[torch.float32])


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_chunks_that_do_not_fit_are_refused_alike(chunk_size):
    module, (x, position, padding) = layer(causal=chunk_size == 0), arguments()
    errors = []
    for graded in (True, False):
        with torch.set_grad_enabled(graded), pytest.raises(ValueError, match="chunk_size") as error:
            module(x, position, chunk_size=chunk_size, src_key_padding_mask=padding)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


# ---- the ways ----


@pytest.fixture
def taken(monkeypatch):
    """The way and the class of each branch that runs by one, in order."""
    calls = []

    def watched(way):
        def add(branch, given):
            added = way.add(branch, given)
            if added is not None:
                calls.append((way.name, type(branch).__name__))
            return added

        return replace(way, add=add)

    for device, offered in WAYS.items():
        monkeypatch.setitem(WAYS, device, tuple(map(watched, offered)))
    return calls


BY_NODES = [(what, mode) for what in MAKE for mode in (*MODES, "train") if "stream" not in mode or streams(what)]


@pytest.mark.parametrize(("what", "mode"), BY_NODES)
def test_the_way_of_other_devices_gives_the_same(monkeypatch, taken, what, mode):
    """Each branch as one node, as on a GPU; also beside a module that is called."""
    monkeypatch.setitem(WAYS, "cpu", WAYS["cuda"])
    mine, theirs = pair(what)
    assert agree(results(what, mine, mode), results(what, theirs, mode)) is None
    by_nodes = what != "conv embed" and mode != "stream with gradients"
    averages = by_nodes and mode in ("infer", "stream")  # with gradients so few frames average on `eager`, by modules
    assert taken.count(("one node", "FeedforwardModule")) == 3 * by_nodes
    assert len(taken) == 5 * by_nodes + 3 * averages
    for name in callable_names(mine, wrap) if what == "causal layer" else ():
        undo = [wrap(module, name) for module in (mine, theirs)]
        assert agree(results(what, mine, mode), results(what, theirs, mode)) is None, name
        for act in undo:
            act()


def test_few_rows_take_one_kernel_where_there_is_one(taken):
    x, position, _ = arguments(frames=4, batch=1)
    with torch.no_grad():
        layer()(x, position)
    assert taken.count(("one kernel", "FeedforwardModule")) == 3
    assert sum(way == "in place" for way, _ in taken) == 5


# ---- how often is asked ----


def test_a_call_asks_less_than_fifteen_questions():
    out = subprocess.run(
        [sys.executable, ROOT / "benchmarks/questions.py"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    rows = {row.pop("what"): row for row in map(json.loads, out.stdout.splitlines())}
    for name in ("layer without gradients", "chunk of a stream"):
        assert 0 < rows[name]["questions"] < 15, rows[name]
    assert 0 < rows["deciding functions"]["count"] <= 8, rows
