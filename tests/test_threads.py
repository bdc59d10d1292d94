"""The CPU kernels and threads: one OpenMP runtime, torch's thread count, forks, nesting, and Python's lock."""

import ctypes
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from test_swoosh import assert_values
from tolerances import relative_error, rounding
from torch.utils.data import DataLoader

from zipformer_kernels import ops, swoosh_l, use_backend
from zipformer_kernels.core import backend
from zipformer_kernels.optim import ScaledAdam

pytestmark = [
    pytest.mark.skipif(backend.missing["cpu"] is not None, reason=f"cpu: {backend.missing['cpu']}"),
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted under /proc, on Linux"),
]
TASKS = Path("/proc/self/task")
PATIENCE = 60  # seconds until a child process counts as hanging
FORK = multiprocessing.get_context("fork")
ON_CPU = [name for name in ops.names() if "cpu" in ops.get(name).backends]


def run_op(name):
    """An op forward and backward, on the smallest of the shapes that it is measured on; its results."""
    torch.manual_seed(0)
    with use_backend("cpu"):
        if name == "scaled_adam":
            parameter = torch.nn.Parameter(torch.randn(600, 500))
            parameter.grad = torch.randn(600, 500)
            ScaledAdam([parameter]).step()
            return [parameter.detach()]
        cases = importlib.import_module(f"zipformer_kernels.ops.{name}.cases").CASES
        case = min((case for case in cases if case.large), key=lambda case: case.bytes(4)["forward"])
        args = case.inputs(torch.float32, "cpu")
        y = ops.get(name)(*args)
        leaves = [arg for arg in args if torch.is_tensor(arg) and arg.requires_grad]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


class Watch:
    """Stands in for the compiled module: runs every CPU kernel in a fresh Python thread, without OpenMP threads yet.

    Attributes:
        threads: how many threads each kernel ran on, at most.
        overlapped: the kernels during which another Python thread woke up.
    """

    def __init__(self, native):
        self.native, self.threads, self.overlapped = native, {}, set()

    def __getattr__(self, name):
        function = getattr(self.native, name)
        if not name.endswith("_cpu"):
            return function
        return lambda *args, **named: self._run(name, partial(function, **named), args)

    def _run(self, name, function, args):
        before, span, used, woken = set(os.listdir(TASKS)), [], [], []

        def call():
            span.append(time.perf_counter())
            function(*args)
            span.append(time.perf_counter())
            used.append(len(set(os.listdir(TASKS)) - before))

        thread = threading.Thread(target=call)
        thread.start()
        while thread.is_alive():
            time.sleep(1e-4)
            woken.append(time.perf_counter())
        self.threads[name] = max(self.threads.get(name, 0), *used)
        if any(span[0] < moment < span[1] for moment in woken):
            self.overlapped.add(name)


@pytest.fixture
def watch(monkeypatch):
    monkeypatch.setattr(backend, "native", Watch(backend.native))
    return backend.native


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("imports", ["import torch, zipformer_kernels", "import zipformer_kernels, torch"])
def test_one_openmp_runtime(imports):
    """The kernels use the runtime that torch brings."""
    code = f"""
{imports}
torch.set_num_threads(2)
torch.sigmoid(torch.randn(1 << 18))
zipformer_kernels.swoosh_l(torch.randn(1 << 18), backend="cpu")
print(open("/proc/self/maps").read())
"""
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    runtimes = set(re.findall(r"/\S*lib(?:g|i|)omp[^/\s]*", maps))
    assert len(runtimes) == 1, runtimes
    assert Path(runtimes.pop()).is_relative_to(Path(torch.__file__).parent.parent)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ON_CPU)
def test_takes_as_many_threads_as_torch_has(name, threads, watch, set_threads):
    set_threads(threads)
    run_op(name)
    assert watch.threads
    assert max(watch.threads.values()) == threads, watch.threads


@pytest.mark.parametrize("name", ON_CPU)
def test_results_do_not_depend_on_the_number_of_threads(name, set_threads):
    results = []
    for threads in (1, 3):
        set_threads(threads)
        results.append(run_op(name))
    for one, several in zip(*results, strict=True):  # swoosh_linear's products are torch's, which add in another order
        assert relative_error(several, one) < rounding(torch.float32, 1 << 12)


@pytest.mark.parametrize("name", ON_CPU)
def test_python_runs_during_kernels(name, watch, set_threads):
    """Kernels give up Python's lock, which nobody takes from a thread within the interval set here.

    On a busy machine the watcher may not wake up within a short kernel: it gets more than one.
    """
    set_threads(1)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(PATIENCE)
    try:
        for _ in range(100):
            run_op(name)
            if watch.overlapped:
                break
    finally:
        sys.setswitchinterval(interval)
    assert watch.overlapped


def test_python_threads_at_once(set_threads):
    """Each gets right results, and no more threads than torch's own operations give it."""
    set_threads(2)
    inputs = [torch.randn(1 << 18) for _ in range(3)]
    results, most = [None] * len(inputs), []
    everyone = threading.Barrier(len(inputs))

    def call(i):
        everyone.wait()
        for _ in range(20):
            results[i] = swoosh_l(inputs[i], backend="cpu")
        everyone.wait()  # all have run, and none has gone
        most.append(len(set(os.listdir(TASKS)) - before))
        everyone.wait()

    before = set(os.listdir(TASKS))
    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 2 * len(inputs)
    for x, y in zip(inputs, results, strict=True):
        assert_values(x, y, "l")


def test_inside_a_parallel_region(set_threads):
    """A kernel called by each thread of an OpenMP team stays on that thread."""
    set_threads(2)
    x = torch.randn(1 << 18)
    expected = swoosh_l(x, backend="cpu")
    runtime = re.search(r"/\S*libgomp\S*", Path("/proc/self/maps").read_text())
    if runtime is None:
        pytest.skip("a torch with libgomp would run this")
    results, used = [], []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_):
        results.append(swoosh_l(x, backend="cpu"))
        used.append(len(set(os.listdir(TASKS)) - before))

    def region():
        ctypes.CDLL(runtime.group()).GOMP_parallel(body, None, 2, 0)

    before = set(os.listdir(TASKS))
    thread = threading.Thread(target=region)
    thread.start()
    thread.join()
    assert len(results) == 2
    assert max(used) <= 2
    for result in results:
        assert torch.equal(result, expected)


def in_child(results, names):
    """Runs in a forked process. torch's own operations need one thread there; the kernels are asked for two."""
    torch.set_num_threads(1)
    torch.get_num_threads = lambda: 2
    results.put([[x.numpy() for x in run_op(name)] for name in names])


def test_fork_after_threads_have_run(set_threads):
    """A child of a process whose OpenMP threads have started neither hangs nor computes anything else."""
    names = ON_CPU
    for threads in (2, 1):
        set_threads(threads)
        expected = [run_op(name) for name in names]
    results = FORK.SimpleQueue()
    child = FORK.Process(target=in_child, args=(results, names))
    child.start()
    try:
        assert results._reader.poll(PATIENCE), "the child hangs"
        actual = results.get()
    finally:
        child.kill()
        child.join()
    for name, wanted, got in zip(names, expected, actual, strict=True):
        assert all(map(torch.equal, map(torch.from_numpy, got), wanted)), name


def test_fork_alone():
    """os.fork, with nothing set in the child; a kernel, for torch's own operations hang there."""
    code = """
import os, signal, torch
from zipformer_kernels import swoosh_l
from zipformer_kernels.core import backend
torch.set_num_threads(2)
x = torch.randn(1 << 18)
expected = swoosh_l(x, backend="cpu").numpy()
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if (swoosh_l(x, backend="cpu").numpy() == expected).all() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print((swoosh_l(x, backend="cpu").numpy() == expected).all())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert result.stdout.split() == ["0", "True"]


class Frames(torch.utils.data.Dataset):
    """One item for each of two workers: a kernel's output, torch's number of threads, and how many the kernel started.

    No more items, for torch shares tensors between processes in threads of its own.
    """

    def __len__(self):
        return 2

    def __getitem__(self, index):
        before = len(os.listdir(TASKS))
        y = swoosh_l(torch.arange(-1000.0, 1 << 18), backend="cpu")
        return y, torch.get_num_threads(), len(os.listdir(TASKS)) - before


def test_data_loader_workers_stay_on_one_thread(set_threads):
    set_threads(2)
    expected = Frames()[0][0]  # starts the threads
    loader = DataLoader(Frames(), batch_size=None, num_workers=2, multiprocessing_context=FORK, timeout=PATIENCE)
    for y, threads, started in loader:
        assert torch.equal(y, expected)
        assert (threads, started) == (1, 0)
