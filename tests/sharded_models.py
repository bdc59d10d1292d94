"""Runs upstream's model and ours, wrapped alike by FSDP, on two gloo processes of this machine.

``python tests/sharded_models.py FILE`` forks them. Rank 0 writes what it got, by kind of wrapping, mode and side.
"""

import multiprocessing
import sys

import torch
import torch.distributed as dist
import upstream
import upstream_models
from draws import seed_all
from poison import poison_memory
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from upstream_models import build

from zipformer_kernels import convert

WORLD_SIZE = 2
CHUNKS = {"causal": True, "chunk_size": (2,), "left_context_frames": (8,)}
LEAVES = ("Linear", "Conv1d", "Conv2d")
PARTS = (
    *("RelPositionMultiheadAttentionWeights", "SelfAttention", "NonlinAttention", "FeedforwardModule"),
    *("ConvolutionModule", "ConvNeXt", "BypassModule"),
)
WRAPPED = {"leaves": LEAVES, "parts": PARTS, "layers": ("ZipformerEncoderLayer",)}


def fsdp1(model, names, mesh):
    """FSDP as torch had it first: in whose place a module stood stands a wrapper."""
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=lambda module, recurse, nonwrapped_numel: recurse or type(module).__name__ in names,
        device_id=torch.device("cpu"),
        use_orig_params=True,
        ignored_states=scalars(model),
    )


def fsdp2(model, names, mesh):
    """FSDP as it is now: modules get another class, and hooks."""
    for module in reversed(list(model.modules())):
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh, ignored_params=set(scalars(model)))
    return fully_shard(model, mesh=mesh, ignored_params=set(scalars(model)))


def scalars(model):
    """The parameters without a dimension, which FSDP refuses."""
    return [p for p in model.parameters() if p.ndim == 0]


KINDS = {f"{wrap.__name__} {which}": (wrap, which) for wrap in (fsdp1, fsdp2) for which in WRAPPED}
MODES = ("evaluated", "trained")
SIDES = ("theirs", "ours")


def result(model, mode):
    """The output; unless it is only evaluated, also the gradients of the input and of this process's parameters."""
    model.train(mode == "trained")
    graded = mode != "evaluated"
    seed_all(1)
    x, lengths = upstream_models.batch()
    x.requires_grad_(graded)
    with torch.set_grad_enabled(graded), upstream.wide():
        y = model(x, lengths)[0]
        if not graded:
            return {"output": y}
        y.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    shards = {name: getattr(grad, "_local_tensor", grad) for name, grad in grads.items()}
    return {"output": y.detach(), "x": x.grad} | shards


def main(file, rank):
    torch.set_num_threads(1)
    poison_memory()
    store = dist.FileStore(f"{file}.store", WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    found = {}
    for kind, (wrap, which) in KINDS.items():
        for side in SIDES:
            model = build(**CHUNKS)
            if side == "ours":
                assert convert(model).layers == (4, 4)
            model = wrap(model, WRAPPED[which], mesh)
            found |= {(kind, mode, side): result(model, mode) for mode in MODES}
    dist.destroy_process_group()
    if rank == 0:
        torch.save(found, file)


if __name__ == "__main__":
    forks = multiprocessing.get_context("fork")  # to import torch in each would take longest
    processes = [forks.Process(target=main, args=(sys.argv[1], rank)) for rank in range(WORLD_SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in processes))
