"""The check of whole models calls wrong what is wrong: attention that is zero, and gradients that are off."""

from functools import partial

import pytest
import torch
import upstream
from tiny import TINY

from benchmarks.harness import check, models
from benchmarks.harness.check import ModelCheck
from benchmarks.harness.machine import DEVICE
from benchmarks.harness.peers import Wrong
from zipformer_kernels import Zipformer

FRAMES, BATCH = 60, 2
DTYPES = [torch.float32, torch.bfloat16]


def right(module):
    return module


def without(part, module):
    """The model, all parts of this name giving zeros."""
    for name, child in module.named_modules():
        if name.rpartition(".")[2] in part:
            child.register_forward_hook(lambda child, args, output: torch.zeros_like(output))
    return module


def with_wrong_gradients(part, module):
    """The model, the gradients of one parameter of each layer off by half."""
    for name, parameter in module.named_parameters():
        if name.endswith(part):
            parameter.register_hook(lambda gradient: gradient * 1.5)
    return module


FAULTS = {
    "no self-attention": partial(without, ("self_attn1", "self_attn2")),
    "no NonlinAttention": partial(without, ("nonlin_attention",)),
    "gradient of the values": partial(with_wrong_gradients, "self_attn1.in_proj.weight"),
    "gradient of queries and keys": partial(with_wrong_gradients, "self_attn_weights.in_proj.weight"),
}


def build(peer, ours=right):
    """A small encoder of upstream's, or of ours with a fault."""
    torch.manual_seed(0)
    made = Zipformer(**TINY)
    if models.is_ours(peer):
        return models.Encoder(ours(made)).to(DEVICE)
    theirs = upstream.zipformer.Zipformer(**TINY)
    theirs.load_state_dict(made.state_dict())
    return models.Encoder(theirs).to(DEVICE)


def frames():
    return torch.randn(FRAMES, BATCH, TINY["encoder_dim"][0], device=DEVICE)


TRAINED, EVALUATED = partial(models.trained, frames), partial(models.evaluated, frames)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probe", [TRAINED, EVALUATED], ids=["trained", "evaluated"])
def test_our_model_passes(probe, dtype):
    ModelCheck(build, probe, dtype).check("ours", True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_our_modules_is_called_wrong_by_float64(fault, dtype):
    with pytest.raises(Wrong, match="from upstream in float64, itself in float64"):
        ModelCheck(partial(build, ours=fault), TRAINED, dtype).check("ours", True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_kernels_alone_is_called_wrong(fault, dtype):
    """What the reference implementations do not have: it can be seen only beyond rounding."""
    with pytest.raises(Wrong, match=r"from upstream in float64(?!, itself)"):
        ModelCheck(build, TRAINED, dtype).check("ours", True, change=fault)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["no self-attention", "no NonlinAttention"])
def test_evaluation_sees_attention_that_is_zero(fault, dtype):
    with pytest.raises(Wrong, match="its output is off"):
        ModelCheck(build, EVALUATED, dtype).check("ours", True, change=FAULTS[fault])


def test_without_upstream_kernels_are_held_against_our_reference():
    model_check = ModelCheck(build, EVALUATED, torch.float32, upstream=None)
    model_check.check("ours", True)
    with pytest.raises(Wrong, match="from ours in float64"):
        model_check.check("ours", True, change=FAULTS["no NonlinAttention"])


def test_a_seed_draws_the_same_in_every_dtype():
    drawn = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        models.seed(0)
        with check.draws_of_float32():
            x = torch.ones(1000, dtype=dtype)
            drawn.append((torch.rand(1000, dtype=dtype) > 0.5, torch.nn.functional.dropout(x, 0.3) > 0))
    for uniform, kept in drawn[1:]:
        assert torch.equal(uniform, drawn[0][0])
        assert torch.equal(kept, drawn[0][1])
    assert 0.65 < drawn[0][1].double().mean() < 0.75


def test_nan_is_wrong():
    with pytest.raises(Wrong, match="off by nan"):
        ModelCheck(build, EVALUATED, torch.float32).check("ours", True, change=lambda module: module.apply(spoil))


def spoil(module):
    for parameter in module.parameters(recurse=False):
        parameter.data.fill_(float("nan"))


def test_peers_are_checked_apart_from_what_is_timed_and_rows_say_who_was_not(monkeypatch):
    if models.unserved("upstream compiled"):
        pytest.skip("no compiler")
    monkeypatch.setitem(models.CHANGES, "upstream compiled", right)
    timed = []

    def make_run(module):
        timed.append(module)
        return lambda: timed.append("ran")

    wanted = ("upstream", "upstream compiled", "ours")
    why = {"upstream compiled": "it draws"}
    prepared = models.prepare(build, make_run, EVALUATED, torch.float32, wanted, why)
    assert (tuple(prepared.runs), prepared.wrong, prepared.failed) == (wanted, {}, {})
    assert prepared.unchecked == why
    assert len(timed) == 3
    faulty = partial(build, ours=FAULTS["no NonlinAttention"])
    prepared = models.prepare(faulty, make_run, EVALUATED, torch.float32, wanted)
    assert tuple(prepared.runs) == ("upstream", "upstream compiled")
    assert "its output is off" in prepared.wrong["ours"]
