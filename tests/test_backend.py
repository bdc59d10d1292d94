"""Selection of a backend: who is asked first, what an impossible choice raises, and what is explained."""

import asyncio
import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from lanes import Lane

from zipformer_kernels import explain, ops, swoosh_l, use_backend
from zipformer_kernels.core import backend
from zipformer_kernels.core.autograd import gradient_hook
from zipformer_kernels.core.backend import BackendError
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.attention import AttentionWeights

X = torch.zeros(4)
needs_cpu = pytest.mark.skipif(backend.missing["cpu"] is not None, reason=str(backend.missing["cpu"]))


def selected(argument=None):
    return ops.get("swoosh").select(argument, X, "l")


def on_its_choice(op, lane):
    """The backend that an op's example gets where the surrounding choice decides."""
    return ops.get(op).select(None, *ops.example(op, device=lane.device))


@needs_cpu
def test_the_argument_comes_before_use_backend_and_that_before_auto():
    assert selected() == "cpu"
    with use_backend("eager"):
        assert selected() == "eager"
        assert selected("cpu") == "cpu"
        with use_backend("auto"):
            assert selected() == "cpu"
        assert selected() == "eager"
    assert selected() == "cpu"


def test_use_backend_ends_with_its_block_even_by_an_exception():
    before = backend.requested()
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert backend.requested() == before


def in_a_fresh_process(code, **environment):
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch, zipformer_kernels as zk; from zipformer_kernels import ops\n" + code,
        ],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment,
        check=False,
    )


def test_the_environment_variable_comes_after_use_backend():
    code = """
print(ops.get("swoosh").select(None, torch.zeros(1), "l"))
with zk.use_backend("auto"):
    print(ops.get("swoosh").select(None, torch.zeros(1), "l"))
"""
    result = in_a_fresh_process(code, ZIPFORMER_KERNELS_BACKEND="eager")
    best = "eager" if backend.missing["cpu"] else "cpu"
    assert result.stdout.split() == ["eager", best], result.stderr


def test_an_environment_variable_that_cannot_be_served_raises_on_use():
    result = in_a_fresh_process("zk.swoosh_l(torch.zeros(1))", ZIPFORMER_KERNELS_BACKEND="triton")
    assert "BackendError: swoosh: backend 'triton' cannot serve this call: " in result.stderr


@needs_cpu
def test_several_names_are_tried_in_order():
    with use_backend("triton,cpu,eager") if not backend.TRITON_INTERPRETS else use_backend("cuda,cpu,eager"):
        assert selected() == "cpu"
    with pytest.raises(BackendError, match=r"backend 'cuda' cannot serve this call: .*; backend 'cpu' cannot"):
        ops.get("swoosh").select("cuda,cpu", torch.zeros(4, device="meta"), "l")
    with pytest.raises(ValueError, match="got 'gpu'"), use_backend("cpu,gpu"):
        pass


def test_unknown_names_are_refused_wherever_they_come_from():
    wanted = "backend must be one of eager, cpu, triton, cuda, auto, got 'gpu'"
    with pytest.raises(ValueError, match=wanted):
        swoosh_l(X, backend="gpu")
    with pytest.raises(ValueError, match=wanted), use_backend("gpu"):
        pass
    assert wanted in in_a_fresh_process("", ZIPFORMER_KERNELS_BACKEND="gpu").stderr
    with pytest.raises(ValueError, match=r"op must be one of .*swoosh.*, got 'relu'"):
        explain("relu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing is missing")
def test_a_backend_that_is_asked_for_by_name_raises_with_the_reason():
    with pytest.raises(BackendError, match=r"swoosh: backend 'cuda' cannot serve this call: .*CUDA"):
        swoosh_l(X, backend="cuda")
    with use_backend("cuda"), pytest.raises(BackendError):
        swoosh_l(X)


@pytest.mark.parametrize("lane", [Lane("triton"), Lane("cuda")], ids=lambda lane: lane.backend)
def test_a_whole_model_runs_by_one_name(lane):
    """An op without kernels there runs on the next backend that has some; asked by itself, it says so."""
    name = lane.backend
    args, scores = ops.example("depthwise_conv2d", device=lane.device), ops.example("attention", device=lane.device)[:4]
    with lane.active():
        assert on_its_choice("depthwise_conv2d", lane) == "eager"
        assert on_its_choice("swoosh", lane) == name
        assert on_its_choice("attention", lane) == AttentionWeights(*scores).backend == name
        assert explain("depthwise_conv2d", *args).startswith(f"depthwise_conv2d: runs on 'eager' (asked for: '{name}')")
        with pytest.raises(BackendError, match=f"backend '{name}' cannot serve .*: depthwise_conv2d has no {name} k"):
            ops.get("depthwise_conv2d").select(name, *args)
        double = torch.zeros(4, dtype=torch.float64, device=lane.device)
        with pytest.raises(BackendError, match=f"swoosh: backend '{name}' cannot serve this call: it takes float32"):
            swoosh_l(double)  # it has kernels, but none for this call


def test_several_names_without_kernels_go_on_behind_the_last():
    lane = Lane("triton")
    args = ops.example("depthwise_conv2d", device=lane.device)
    with lane.active(), Lane("cuda").active(), use_backend("cuda,triton"):
        assert ops.get("depthwise_conv2d").select(None, *args) == "eager"


@needs_cpu
def test_an_unsupported_dtype_is_told_and_auto_passes_on():
    x = torch.zeros(3, dtype=torch.float8_e4m3fn)
    with pytest.raises(BackendError, match=r"it takes float32, .* got torch\.float8_e4m3fn"):
        swoosh_l(x, backend="cpu")
    assert ops.get("swoosh").select("auto", x, "l") == "eager"


@needs_cpu
def test_explain_names_the_choice_and_every_reason():
    lines = explain("swoosh").splitlines()
    assert lines[0] == "swoosh: runs on 'cpu' (asked for: 'auto')"
    assert [line.split()[0] for line in lines[1:]] == list(backend.BACKENDS)
    for line, name in zip(lines[1:], backend.BACKENDS, strict=True):
        reason = ops.get("swoosh").unsupported(name, *ops.example("swoosh"))
        assert line.split(None, 1)[1] == ("available" if reason is None else f"no: {reason}")
    assert explain("swoosh", backend="eager").startswith("swoosh: runs on 'eager' (asked for: 'eager')")


def test_without_the_compiled_module_everything_runs_on_plain_pytorch():
    code = """
import importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "zipformer_kernels._native":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hidden())
import torch, zipformer_kernels as zk
print(float(zk.swoosh_l(torch.zeros(1))))
print(zk.explain("swoosh"))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    value, chosen, *reasons = result.stdout.splitlines()
    assert float(value) == float(swoosh_l(torch.zeros(1), backend="eager"))
    assert chosen == "swoosh: runs on 'eager' (asked for: 'auto')"
    assert sum("the compiled module was not built" in line for line in reasons) == 2


# ---- a backend from outside ----


@pytest.fixture
def mine():
    """A backend registered from outside the package, with launchers of swoosh that tell when they run."""
    calls, eager = [], ops.get("swoosh").backends["eager"]

    def forward(*args):
        calls.append("forward")
        return eager.forward(*args)

    def backward(*args):
        calls.append("backward")
        return eager.backward(*args)

    backend.register(backend.Backend("mine", lambda: ("cpu",), lambda: None, {"cpu": 500}))
    ops.get("swoosh").add_backend("mine", Launchers(lambda x, kind: None, forward, backward))
    try:
        yield calls
    finally:
        del ops.get("swoosh").backends["mine"]
        backend.unregister("mine")


def test_a_backend_can_be_added_from_outside(mine):
    x = torch.randn(4, requires_grad=True)
    swoosh_l(x, backend="mine").sum().backward()
    with use_backend("mine"), torch.no_grad():
        assert torch.equal(swoosh_l(x), swoosh_l(x, backend="eager"))
    assert mine == ["forward", "backward", "forward"]
    assert backend.PREFERENCE["cpu"] == ("cpu", "mine", "eager")
    assert [line.split()[0] for line in explain("swoosh").splitlines()[1:]] == [*backend.BACKENDS]
    assert explain("swoosh", backend="mine").startswith("swoosh: runs on 'mine'")
    with use_backend("mine"):  # an op that has none there runs on the next
        assert ops.get("bypass").select(None, *ops.example("bypass")) == "eager"
    with pytest.raises(BackendError, match="bypass has no mine kernels"):
        ops.get("bypass").select("mine", *ops.example("bypass"))
    with pytest.raises(ValueError, match="launchers for 'mine' already"):
        ops.get("swoosh").add_backend("mine", ops.get("swoosh").backends["eager"])


def test_an_added_backend_brings_its_variants(mine):
    op = ops.get("swoosh_linear")
    own, variant = op.backends["eager"], op.variants["feed_forward"]
    args = ops.example("swoosh_linear.feed_forward")
    with pytest.raises(ValueError, match="has the variants feed_forward, got 'no_such'"):
        op.add_backend("mine", replace(own, variants={"no_such": own}))
    assert "mine" not in op.backends
    try:
        op.add_backend("mine", own)
        assert torch.equal(variant(*args, backend="mine"), variant(*args, backend="eager"))
    finally:
        del op.backends["mine"], variant.backends["mine"]


def test_a_backend_that_is_gone_cannot_be_asked_for():
    with pytest.raises(ValueError, match="got 'mine'"):
        swoosh_l(X, backend="mine")
    with pytest.raises(ValueError, match="got 'mine'"):
        ops.get("swoosh").add_backend("mine", ops.get("swoosh").backends["eager"])
    with pytest.raises(ValueError, match="there is a backend 'cpu' already"):
        backend.register(backend.registry["cpu"])
    for name in ("auto", "a,b", ""):
        with pytest.raises(ValueError, match="must not be 'auto', empty, or have a comma"):
            backend.register(backend.Backend(name, None, lambda: None, {}))


# ---- whose choice it is ----


def in_thread(function):
    """The result of a function that runs in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_choice_belongs_to_its_thread():
    both_inside, done = threading.Barrier(2), threading.Event()

    def other():
        with use_backend("cpu,eager"):
            both_inside.wait(10)
            assert done.wait(10)
            return backend.requested()

    with ThreadPoolExecutor(1) as pool:
        with use_backend("eager"):
            assert in_thread(backend.requested) == backend._default
            result = pool.submit(other)
            both_inside.wait(10)
            assert backend.requested() == "eager"
        assert backend.requested() == backend._default  # the block that began first ends first
        done.set()
        assert result.result() == "cpu,eager"
    assert backend.requested() == backend._default
    assert backend._latest is None


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_blocks_end_in_any_order(order):
    names = ["eager", "cpu", "auto"]
    blocks = [use_backend(name) for name in names]
    for block in blocks:
        block.__enter__()
    inside = dict(enumerate(names))
    for i in order:
        assert backend.requested() == inside[max(inside)]
        blocks[i].__exit__(None, None, None)
        del inside[i]
    assert backend.requested() == backend._default


def test_generators():
    def chosen(name):
        with use_backend(name):
            yield backend.requested()

    first, second = chosen("eager"), chosen("cpu")
    assert (next(first), next(second)) == ("eager", "cpu")
    first.close()
    assert backend.requested() == "cpu"
    in_thread(second.close)  # where the block did not begin
    assert backend.requested() == backend._default
    assert backend._latest is None


def test_tasks_of_asyncio():
    async def task(name, rounds):
        with use_backend(name):
            for _ in range(rounds):
                await asyncio.sleep(0)
                assert backend.requested() == name
        return backend.requested()

    async def both():
        with use_backend("auto"):
            return await asyncio.gather(task("eager", 3), task("cpu", 5), task("cpu,eager", 1))

    assert asyncio.run(both()) == ["auto"] * 3
    assert backend.requested() == backend._default


def test_a_backward_pass_keeps_the_choice_of_its_forward():
    seen = []

    def note(grad):
        seen.append(backend.requested())
        return grad

    x = torch.randn(3, requires_grad=True)
    with use_backend("eager"):
        y = gradient_hook(x, note)
    in_thread(y.sum().backward)
    with use_backend("eager"):
        gradient_hook(x, note).sum().backward()
    z = gradient_hook(x, note).sum()
    with use_backend("eager"):
        z.backward()
    assert seen == ["eager", "eager", backend._default]
