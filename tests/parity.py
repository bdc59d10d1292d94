"""Runs a module of ours and upstream's side by side, from the same weights, inputs and seeds."""

import contextlib
import random

import torch
import upstream
from draws import generators, seed_all
from tolerances import PARITY, assert_parity

from zipformer_kernels.ops.attention import AttentionWeights


def build_pair(our_class, their_class, *args, seed=0, dtype=torch.float64, **kwargs):
    """Both modules, after a check that one seed gives both the same weights; then perturbed alike."""
    seed_all(seed)
    theirs = their_class(*args, **kwargs)
    drawn = (random.getstate(), torch.get_rng_state())
    seed_all(seed)
    ours = our_class(*args, **kwargs)
    assert random.getstate() == drawn[0]
    assert torch.equal(torch.get_rng_state(), drawn[1])
    assert_same_weights(ours, theirs)

    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.to(dtype), theirs.to(dtype)


def assert_same_weights(ours, theirs):
    expected = theirs.state_dict()
    actual = ours.state_dict()
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def run(module, seed, args, kwargs=None):
    """Forward and backward under a seed.

    Returns:
        Everything to compare, by name: outputs, gradients of float inputs, gradients of parameters; and the
        states of all random generators afterwards.
    """
    args = [a.detach().clone().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    seed_all(seed)
    module.zero_grad(set_to_none=True)
    outputs = module(*args, **(kwargs or {}))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [out.materialize() if isinstance(out, AttentionWeights) else out for out in outputs]
    floats = [out for out in outputs if out.is_floating_point() and out.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in floats]
    if floats:
        torch.autograd.backward(floats, grads)
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    results |= {f"gradient of input {i}": a.grad for i, a in enumerate(args) if torch.is_tensor(a)}
    results |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    return results, generators()


def assert_same_run(ours, theirs, args, kwargs=None, *, seed=1, tolerance=None):
    """Outputs, all gradients and all draws agree. In float64 upstream runs `wide`."""
    dtype = next(a.dtype for a in args if torch.is_tensor(a) and a.is_floating_point())
    tolerance = tolerance or PARITY[dtype]
    with upstream.wide() if dtype == torch.float64 else contextlib.nullcontext():
        expected, their_draws = run(theirs, seed, args, kwargs)
    actual, our_draws = run(ours, seed, args, kwargs)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_parity(actual[name], expected[name], tolerance, name)
    for name, state in their_draws.items():
        assert our_draws[name] == state, f"{name} was drawn from differently"
