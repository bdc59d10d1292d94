"""ScaledAdam in training: steps that are skipped, no waiting, GradScaler, checkpoints, diagnostics."""

import copy
import io
import math
import pickle

import pytest
import torch
from optim_steps import (
    SHAPES,
    assert_same,
    dtypes_on_lanes,
    make_params,
    on_lanes,
    once,
    run_on_lanes,  # noqa: F401
    set_grads,
    state_tensors,
    train,
)
from torch.utils._python_dispatch import TorchDispatchMode
from unseen import unseen

from zipformer_kernels.optim import ScaledAdam


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e38])  # the square of the last overflows
@pytest.mark.parametrize("at", [0, 3, 11])
@pytest.mark.parametrize("clipping_scale", [None, 2.0])
def test_skipped_step_touches_nothing_but_its_count(clipping_scale, at, poison):
    params = make_params()
    optimizer = ScaledAdam([{"params": params[:3]}, {"params": params[3:]}], clipping_scale=clipping_scale)
    train(optimizer, params, at)
    if at == 0:
        set_grads(params, 0, math.nan)
        optimizer.step()
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    set_grads(params, 5)
    params[4].grad[1, 2, 3] = poison
    optimizer.step()
    assert_same(params, before[0])
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if name == "num_skipped":
                assert value == before[1][index][name] + 1
            else:
                assert torch.equal(value, before[1][index][name]), name
    assert optimizer.diagnostics()[1].dominant_name == "1.1"


def test_skipped_step_leaves_large_single_elements():
    p = torch.nn.Parameter(torch.tensor(12.0))
    optimizer = ScaledAdam([p])
    p.grad = torch.tensor(math.nan)
    optimizer.step()
    assert p.item() == 12.0
    p.grad = torch.tensor(1.0)
    optimizer.step()
    assert p.item() == 10.0


class NoWaiting(TorchDispatchMode):
    """Fails on every operation that hands a tensor's values to the host."""

    WAITS = frozenset({"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique"})

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        assert name != "_to_copy" or "device" not in (kwargs or {}), "a copy between devices"
        return func(*args, **(kwargs or {}))


def test_no_operation_of_a_step_waits():
    params = make_params()
    optimizer = ScaledAdam([{"params": params[:3]}, {"params": params[3:]}], clipping_scale=2.0)
    with pytest.raises(AssertionError, match="waits"), unseen(NoWaiting()):
        params[0].sum().item()
    with unseen(NoWaiting()) as mode:
        for i in range(25):
            set_grads(params, i, math.nan if i == 7 else None)
            optimizer.step()
    assert mode.calls > 25
    assert [d.steps for d in optimizer.diagnostics()] == [24, 24]


@once
def test_a_step_depends_on_no_value():
    """Meta tensors have no values: a step on them decides nothing on the host, nor leaves their device."""
    params = [torch.nn.Parameter(p.to("meta")) for p in make_params()]
    optimizer = ScaledAdam([{"params": params[:3]}, {"params": params[3:]}], clipping_scale=2.0)
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert all(x.device.type == "meta" for x in state_tensors(optimizer))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        optimizer.diagnostics()


@pytest.mark.gpu("a captured step")
@on_lanes(lambda lane: lane.backend in ("triton", "cuda"))
def test_replays_of_a_captured_step_equal_steps():
    lr = torch.tensor(0.03, device="cuda")
    captured, stepped = ([torch.nn.Parameter(p.detach().cuda()) for p in make_params()] for _ in range(2))
    adams = ScaledAdam(captured, lr=lr, clipping_scale=2.0), ScaledAdam(stepped, lr=0.03, clipping_scale=2.0)
    static = [torch.zeros_like(p) for p in captured]
    for p, g in zip(captured, static, strict=True):
        p.grad = g
    for i in range(60):
        lr_now = 0.03 / (1 + i)
        lr.fill_(lr_now)
        adams[1].param_groups[0]["lr"] = lr_now
        for p, g in zip(stepped, static, strict=True):
            g.copy_(torch.full_like(g, math.nan) if i == 30 else torch.randn_like(g))
            p.grad = g.clone()
        if i == 3:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                adams[0].step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            if i < 3:
                adams[0].step()
            else:
                graph.replay()
            adams[1].step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for p, q in zip(captured, stepped, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=0)
    assert [d.skipped for d in adams[0].diagnostics()] == [1]


@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_unscales_and_skips(unscale_first):
    scaled, plain = make_params(), make_params()
    adams = ScaledAdam(scaled, clipping_scale=1.0), ScaledAdam(plain, clipping_scale=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**13, growth_interval=7)
    for i in range(16):
        set_grads(plain, i)
        overflow = i in (0, 4, 13)
        loss = sum((p * q.grad).sum() for p, q in zip(scaled, plain, strict=True))
        adams[0].zero_grad()
        scaler.scale(loss).backward()
        if overflow:
            scaled[3].grad[0] = math.inf
        if unscale_first:
            scaler.unscale_(adams[0])
        scaler.step(adams[0])
        scaler.update()
        if not overflow:
            adams[1].step()
    for p, q in zip(scaled, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-9)
    assert adams[0].diagnostics()[0].skipped == 3
    assert adams[0].diagnostics()[0].steps == 13


def resume_by_state_dict(optimizer, params):
    params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    resumed = ScaledAdam([{"params": params[:3]}, {"params": params[3:]}], lr=77.0)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    return resumed, params


def resume_by_deepcopy(optimizer, params):
    return copy.deepcopy((optimizer, params))


def resume_by_pickle(optimizer, params):
    return pickle.loads(pickle.dumps((optimizer, params)))


@dtypes_on_lanes("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("resume", [resume_by_state_dict, resume_by_deepcopy, resume_by_pickle])
@pytest.mark.parametrize("steps", [0, 1, 14])
def test_resuming_equals_not_stopping(resume, steps, dtype):
    params = make_params(dtype=dtype)
    groups = [{"params": params[:3], "lr": 0.02}, {"params": params[3:]}]
    optimizer = ScaledAdam(groups, lr=0.05, clipping_scale=1.0)
    train(optimizer, params, steps)
    resumed, copies = resume(optimizer, params)
    train(optimizer, params, 40, start=steps)
    halfway = [p.detach().clone() for p in copies]
    train(resumed, copies, 40, start=steps)
    assert_same(copies, params)
    assert any(not torch.equal(p, q) for p, q in zip(halfway, copies, strict=True))
    assert_same(state_tensors(resumed), state_tensors(optimizer))
    assert resumed.diagnostics() == optimizer.diagnostics()


def test_resuming_on_every_backend():
    params = make_params()
    optimizer = ScaledAdam([{"params": params[:3], "lr": 0.02}, {"params": params[3:]}], clipping_scale=1.0)
    train(optimizer, params, 9)
    resumed, copies = resume_by_state_dict(optimizer, params)
    train(optimizer, params, 4, start=9)
    train(resumed, copies, 4, start=9)
    assert_same(copies, params)
    assert_same(state_tensors(resumed), state_tensors(optimizer))


def test_diagnostics_are_of_the_moment_they_were_asked_for():
    params = make_params()
    optimizer = ScaledAdam(params, clipping_scale=2.0)
    train(optimizer, params, 3)
    now, pending = optimizer.diagnostics(), optimizer.start_diagnostics()
    train(optimizer, params, 2, start=3)
    assert pending.result() == now
    assert pending.ready()
    assert [d.steps for d in optimizer.diagnostics()] == [5]


def test_loading_copies_the_state():
    params, others = make_params(), make_params()
    optimizer, other = ScaledAdam(params), ScaledAdam(others)
    train(optimizer, params, 3)
    other.load_state_dict(optimizer.state_dict())
    kept = copy.deepcopy(state_tensors(other))
    train(optimizer, params, 3)
    assert_same(state_tensors(other), kept)


def test_loading_a_state_of_other_shapes():
    params, others = make_params(), [torch.nn.Parameter(torch.zeros(2, *s)) for s in SHAPES]
    optimizer, other = ScaledAdam(params), ScaledAdam(others)
    train(optimizer, params, 1)
    with pytest.raises(
        ValueError, match=r"state_dict must hold exp_avg_sq of shape \(2, 3, 5\) for '0.0', got \(3, 5\)"
    ):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state, "nothing is taken of what does not fit"


def test_diagnostics():
    small, large = make_params([(4, 4), (5,)])
    optimizer = ScaledAdam([("small", small), ("large", large)], lr=0.0, clipping_scale=2.0)
    assert optimizer.diagnostics() == []
    norms = []
    for i in range(42):
        small.grad, large.grad = torch.full_like(small, 1e-3), torch.full_like(large, 1.0 + i % 10)
        if i == 41:
            large.grad *= 100
        optimizer.step()
        weights = [p.detach().square().mean().sqrt() for p in (small, large)]
        squares = [(g * w).square().sum() for g, w in zip((small.grad, large.grad), weights, strict=True)]
        norms.append(sum(squares).sqrt().item())
    (found,) = optimizer.diagnostics()
    assert (found.steps, found.skipped, found.dominant_name) == (42, 0, "large")
    recorded = sorted(norms[1:])
    assert found.norm_quartiles == pytest.approx([recorded[k] for k in (0, 10, 20, 30, 40)], rel=1e-5)
    assert found.threshold == pytest.approx(2 * 2 * sorted(norms[1:41])[20], rel=1e-5)  # set at t = 40, doubled
    assert found.percent_clipped == 50.0  # of t = 40 and 41
    assert found.dominant_proportion == pytest.approx(1.0, abs=1e-3)
    assert found.dominant_rms == pytest.approx(large.detach().square().mean().sqrt().item(), rel=1e-6)


def test_diagnostics_without_clipping_and_without_gradients():
    params = make_params()
    optimizer = ScaledAdam(params)
    optimizer.step()
    (found,) = optimizer.diagnostics()
    assert (found.steps, found.norm_quartiles, found.threshold, found.percent_clipped) == (
        1,
        None,
        math.inf,
        0.0,
    )
    assert found.dominant_name is None
    assert math.isnan(found.dominant_proportion)
