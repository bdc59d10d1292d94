"""ScaledAdam's kernels: chunks of tensors, the number of launches, memory, and the choice of a backend."""

import math
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from optim_steps import assert_same, in_float64, on_lanes, run_on_lanes, set_grads, state_tensors, train  # noqa: F401
from tolerances import relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from unseen import unseen

from zipformer_kernels import BackendError, ops, use_backend
from zipformer_kernels.core import backend
from zipformer_kernels.ops.scaled_adam import native, table
from zipformer_kernels.optim import ScaledAdam

on_kernels = on_lanes(lambda lane: lane.backend != "eager")
on_gpu_kernels = on_lanes(lambda lane: lane.backend in ("triton", "cuda"))


def chunk_elements(lane):
    if lane.backend != "triton":
        return native.CHUNK_ELEMENTS.value
    from zipformer_kernels.ops.scaled_adam import triton

    return triton.CHUNK_ELEMENTS.value


def parameters(sizes, dtype=torch.float32):
    """Parameters, of which every third lies one element off any alignment."""
    generator = torch.Generator().manual_seed(0)
    device = torch.get_default_device()
    params = []
    for k, size in enumerate(sizes):
        memory = torch.randn(size + 1, generator=generator, device="cpu").to(device, dtype)
        params.append(torch.nn.Parameter(memory[k % 3 == 0 :][:size]))
    return params


def same_after(params, others, steps, **options):
    """Steps `params` on the lane and `others` on eager, and compares."""
    for i in range(steps):
        set_grads(params, i)
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad.clone()
        if i == 0:
            ours, theirs = ScaledAdam(params, **options), ScaledAdam(others, **options)
        ours.step()
        with use_backend("eager"):
            theirs.step()
    for p, q in zip(params, others, strict=True):
        assert relative_error(p, q) <= 2e-6
    moments = [(ours.state[p], theirs.state[q]) for p, q in zip(params, others, strict=True)]
    for state, other in moments:
        for name in ("exp_avg_sq", "delta", "param_rms"):
            assert relative_error(state[name], other[name]) <= 2e-6


@on_kernels
def test_sizes_around_the_chunk_limit(lane):
    chunk = chunk_elements(lane)
    sizes = [0, chunk - 1, 0, chunk, 0, 0, chunk + 1, 1, 2 * chunk, 2 * chunk + 1, 3, 0]
    same_after(parameters(sizes), parameters(sizes), 5, clipping_scale=2.0)


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_off_alignment(dtype):
    sizes = [5, 1000, 1, 33, 2049]
    params, others = parameters(sizes, dtype), parameters(sizes, dtype)
    same_after(params, others, 1)


@on_kernels
@pytest.mark.parametrize("sizes", [[0], [0, 0], [1], [0, 1]])
def test_next_to_nothing(sizes):
    same_after(parameters(sizes), parameters(sizes), 5, clipping_scale=2.0)


@on_kernels
def test_more_tensors_than_a_block_plans_at_a_time(lane):
    sizes = [3] * (257 if lane.backend == "triton" else 513)
    same_after(parameters(sizes), parameters(sizes), 2, clipping_scale=2.0, size_update_period=1)


@on_kernels
def test_more_norms_than_a_block_sorts_at_a_time():
    same_after(parameters([3]), parameters([3]), 12, clipping_scale=0.5, clipping_update_period=600)


HUGE = [0, 2**31 + 5, 0, 0, 3, 2**14, 2**33, 0, 2**14 + 1, 0]


def chunks_of(sizes, chunk):
    """(tensor, first element, one after the last) of all chunks, as a generator."""
    for k, size in enumerate(sizes):
        for begin in range(0, size, chunk):
            yield k, begin, min(begin + chunk, size)


def huge_rows(chunk):
    starts, count = table.first_chunks(HUGE, chunk)
    rows = np.zeros((len(HUGE), len(table.TENSOR_COLUMNS)), np.int64)
    rows[:, table.TENSOR_COLUMNS.index("numel")] = HUGE
    rows[:, table.TENSOR_COLUMNS.index("first_chunk")] = starts
    return rows, count


@on_lanes(lambda lane: lane.backend == "cpu")
def test_chunks_of_tensors_past_32_bits():
    rows, count = huge_rows(2**14)
    for index, expected in enumerate(chunks_of(HUGE, 2**14)):
        assert backend.native.scaled_adam_chunk(rows.ctypes.data, len(HUGE), 2**14, index) == expected
    assert count == index + 1 == sum(-(-size // 2**14) for size in HUGE)


@on_lanes(lambda lane: lane.backend == "triton")
def test_chunks_of_tensors_past_32_bits_in_triton(lane):
    from find_chunk_kernel import find_kernel

    rows, count = huge_rows(2**14)
    words = torch.from_numpy(rows).to(lane.device)
    places = list(chunks_of(HUGE, 2**14))
    out = torch.zeros(3, dtype=torch.int64)
    for index in (0, 1, 2**17, 2**17 + 1, 2**17 + 2, 2**17 + 3, count // 2, count - 3, count - 2, count - 1):
        find_kernel[(1,)](words, out, len(HUGE), index, 2**14)
        assert tuple(out.tolist()) == places[index]


class CountingModule:
    """The compiled module, counting calls of its functions."""

    def __init__(self, module):
        self.module, self.calls = module, Counter()

    def __getattr__(self, name):
        value = getattr(self.module, name)
        if callable(value):
            self.calls[name] += 1
        return value


@on_gpu_kernels
def test_four_launches_for_any_number_of_tensors(lane, monkeypatch):
    params = parameters([2, 0, 5, 1] * 20)
    optimizer = ScaledAdam([{"params": params[k::3]} for k in range(3)], clipping_scale=2.0)
    train(optimizer, params, 1)
    set_grads(params, 0)
    if lane.backend == "cuda":
        counting = CountingModule(backend.native)
        monkeypatch.setattr(backend, "native", counting)
        optimizer.step()
        launches = sum(counting.calls[name] for name in counting.calls if name.endswith("_cuda"))
    else:
        from zipformer_kernels.ops.scaled_adam import triton

        launches = 0
        original = triton._launch

        def launch(*args):
            nonlocal launches
            launches += 1
            original(*args)

        monkeypatch.setattr(triton, "_launch", launch)
        optimizer.step()
    assert launches == 4


class Allocations(TorchDispatchMode):
    """The most bytes of new storage alive at once."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)}
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in known:
                storage = x.untyped_storage()
                self.sizes[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, id(storage), None)
                self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def test_memory_of_a_first_and_a_later_step(lane):
    sizes = [180_000, 30_000, 1, 500] + [256] * 20
    params = parameters(sizes)
    optimizer = ScaledAdam(params, clipping_scale=2.0)
    set_grads(params, 0)
    total = 4 * sum(sizes)
    optimizer.step()
    state = sum(x.numel() * x.element_size() for x in state_tensors(optimizer))
    assert 2 * total <= state <= 2 * total + 200 * len(sizes) + 2000
    with unseen(Allocations()) as allocations:
        optimizer.step()
    if lane.backend == "eager":
        assert allocations.peak > 0.01 * total, "the measurement sees eager's temporaries"
    else:
        assert allocations.peak < 0.01 * total


def test_autograd_notices_the_step():
    (p,) = parameters([5])
    optimizer = ScaledAdam([p])
    square = (p * p).sum()
    set_grads([p], 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_repeated_steps_are_the_same_to_the_bit():
    runs = []
    for _ in range(2):
        params = parameters([9000, 7, 1])
        train(ScaledAdam(params, clipping_scale=1.0), params, 5)
        runs.append(params)
    assert_same(*runs)


@on_lanes(lambda lane: lane.backend == "cpu")
def test_any_number_of_threads_gives_the_same_bits():
    threads = torch.get_num_threads()
    runs = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        params = parameters([40_000, 7, 1, 20_000])
        train(ScaledAdam(params, clipping_scale=1.0), params, 6)
        runs.append(params)
    torch.set_num_threads(threads)
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


@on_lanes(lambda lane: lane.backend == "cpu")
@pytest.mark.usefixtures("isa")
def test_every_instruction_set():
    same_after(parameters([40_000, 7, 1, 33]), parameters([40_000, 7, 1, 33]), 9, clipping_scale=1.0)


@on_gpu_kernels
def test_a_backend_that_cannot_says_why(lane):
    params = parameters([3], torch.float64)
    set_grads(params, 0)
    with pytest.raises(
        BackendError, match=f"backend '{lane.backend}' cannot serve this call: it takes float32.*float64"
    ):
        ScaledAdam(params).step()


@in_float64
def test_the_choice_is_explained(lane):
    lines = ops.explain("scaled_adam").splitlines()
    assert lines[0] == f"scaled_adam: runs on '{lane.backend}' (asked for: '{lane.backend}')"
    assert len(lines) == 1 + len(backend.BACKENDS)


def test_a_parameter_of_another_size_than_its_state():
    (p,) = parameters([6])
    optimizer = ScaledAdam([p])
    train(optimizer, [p], 1)
    p.data = torch.ones(9)
    set_grads([p], 0)
    with pytest.raises(ValueError, match=r"parameter '0.0' must have the shape \(6,\) of its exp_avg_sq, got \(9,\)"):
        optimizer.step()


def test_a_learning_rate_in_float64_on_the_device():
    params, others = parameters([5, 1]), parameters([5, 1])
    train(ScaledAdam(params, lr=torch.tensor(0.01, dtype=torch.float64)), params, 5)
    train(ScaledAdam(others, lr=0.01), others, 5)
    for p, q in zip(params, others, strict=True):
        assert relative_error(p, q) <= 1e-6
        assert not math.isnan(p.sum())
