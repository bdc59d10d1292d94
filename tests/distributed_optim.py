"""Trains a small model with ScaledAdam on several gloo processes of this machine.

``python tests/distributed_optim.py KINDS FOLDER WORLD_SIZE`` forks them, for to import torch in each would take
longest; KINDS says what they do, one after the other. Rank 0 writes whole parameters and diagnostics to FOLDER.
"""

import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from poison import poison_memory
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from zipformer_kernels import use_backend
from zipformer_kernels.optim import ScaledAdam

STEPS = 25


class Model(torch.nn.Module):
    """Parameters that shard unevenly, down to one element, so that some processes have none of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 13), torch.nn.Tanh(), torch.nn.Linear(13, 3))
        self.scale = torch.nn.Parameter(torch.tensor([1.5]))

    def forward(self, x):
        return self.layers(x) * self.scale


def batch(step, rank=0, world_size=1):
    """This process's part of a batch of eight."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator)
    y = x[:, :3] * (10.0 if step % 7 == 0 else 1.0)
    part = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    return x[part], y[part]


def train(model, optimizer, steps, rank=0, world_size=1):
    for step in steps:
        x, y = batch(step, rank, world_size)
        if step == 9:
            x = x.clone()
            x[-1, -1] = float("nan") if rank == world_size - 1 else x[-1, -1]
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def optimizer_for(model):
    named = list(model.named_parameters())
    groups = [{"named_params": named[:2], "lr": 0.03}, {"named_params": named[2:]}]
    return ScaledAdam(groups, lr=0.045, clipping_scale=1.0, clipping_update_period=12)


def fully_sharded(model, mesh):
    fully_shard(model.layers[2], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model, mesh):
    """Only the weights are sharded, by columns and by rows; the rest stays plain tensors."""
    for layer, dim in ((model.layers[0], 0), (model.layers[2], 1)):
        layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(dim)]))
    return model


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def save(model, optimizer, path, rank):
    """Whole parameters, and what each group's statistics say."""
    params = [whole(p.detach()) for p in model.parameters()]
    if rank == 0:
        torch.save({"params": params, "diagnostics": [vars(d) for d in optimizer.diagnostics()]}, path)


def step_with_whole_gradients(model, optimizer, steps):
    """Every process has the gradients of one that is alone, and hands its optimizer its shards of them."""
    alone = Model()
    for step in steps:
        x, y = batch(step)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            q.data.copy_(whole(p.detach()))
        alone.zero_grad()
        (alone(x) - y).square().mean().backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements) if hasattr(p, "placements") else q.grad
        optimizer.step()


def main(kinds, folder, rank, world_size):
    torch.set_num_threads(1)
    poison_memory()
    store = dist.FileStore(str(folder / f"store-{world_size}"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    for kind in kinds.split(","):
        name, backend = kind.split("-")
        with use_backend(backend):
            run(name, folder, folder / f"{kind}-{world_size}.pt", rank, world_size)
    dist.destroy_process_group()


def run(name, folder, path, rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    if name == "ddp":
        model = Model()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = optimizer_for(model)
        train(wrapped, optimizer, range(STEPS), rank, world_size)
    elif name == "fsdp":
        model = fully_sharded(Model(), mesh)
        optimizer = optimizer_for(model)
        train(model, optimizer, range(STEPS), rank, world_size)
    elif name == "hybrid":  # replicas of shards
        model = fully_sharded(
            Model(), init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicas", "shards"))
        )
        optimizer = optimizer_for(model)
        train(model, optimizer, range(STEPS), rank, world_size)
    elif name == "tensor":
        model = tensor_parallel(Model(), mesh)
        optimizer = optimizer_for(model)
        step_with_whole_gradients(model, optimizer, range(STEPS))
    elif name == "save":
        model = fully_sharded(Model(), mesh)
        optimizer = optimizer_for(model)
        train(model, optimizer, range(12), rank, world_size)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")
    elif name == "resume":
        torch.manual_seed(1)
        model = fully_sharded(Model(), mesh)
        optimizer = optimizer_for(model)
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state}
        dcp.load(saved, checkpoint_id=folder / "checkpoint")
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        train(model, optimizer, range(12, STEPS), rank, world_size)
    else:
        raise ValueError(f"unknown kind {name!r}")
    save(model, optimizer, path, rank)


def fork(kinds, folder, world_size):
    """Runs `main` in as many processes; the worst exit code of theirs."""
    forks = multiprocessing.get_context("fork")
    processes = [forks.Process(target=main, args=(kinds, folder, rank, world_size)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode) for process in processes)


if __name__ == "__main__":
    sys.exit(fork(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
