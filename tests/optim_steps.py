"""Parameters, gradients and steps for the tests of ScaledAdam alone."""

import torch

SHAPES = [(3, 5), (), (0, 2), (7,), (2, 3, 4), (1,)]


def make_params(shapes=tuple(SHAPES), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter((0.5 * torch.randn(s, generator=generator) + 0.1).to(dtype)) for s in shapes]


def set_grads(params, seed, value=None):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        g = torch.randn(p.shape, generator=generator) + 0.5
        p.grad = (g if value is None else torch.full_like(g, value)).to(p.dtype)


def train(optimizer, params, steps, start=0):
    for i in range(start, start + steps):
        set_grads(params, 1000 + i)
        optimizer.step()


def state_tensors(optimizer):
    return [x for state in optimizer.state_dict()["state"].values() for x in state.values()]


def assert_same(params, others):
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
