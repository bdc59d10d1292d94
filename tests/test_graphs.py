"""Graphs of calls and of training steps: on the CPU by a stand-in for CUDA graphs, on a GPU by themselves."""

import random
import warnings

import pytest
import torch
from tolerances import relative_error
from torch import nn

from zipformer_kernels import CaptureError, GraphedStep, ScaledAdam, Zipformer, graphed, use_backend
from zipformer_kernels.training import Whiten, without_draws

SIZES = {
    "encoder_dim": (32, 48),
    "encoder_unmasked_dim": (24, 32),
    "num_encoder_layers": 1,
    "feedforward_dim": 64,
    "num_heads": 2,
}


class Waits(RuntimeError):
    """What torch's `set_sync_debug_mode("error")` raises where the host would wait."""


class StandIn:
    """Captures nothing: a replay runs the function again, on whatever its buffers hold by then."""

    def __init__(self):
        self.rehearsed, self.replayed, self.strict = 0, 0, False

    def serves(self, device):
        return True

    def rehearse(self, run, strict):
        self.rehearsed += 1
        self.strict = strict
        try:
            return run()
        finally:
            self.strict = False

    def record(self, run):
        def replay():
            self.replayed += 1
            return run()

        return replay


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x, scale=1.0, more=()):
        return {"y": scale * self.linear(x), "more": [x.sum() for x in more], "rows": len(x)}


def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def stand_in():
    return StandIn()


@torch.no_grad()
def test_calls_are_replayed_and_results_are_the_callers_own(stand_in):
    module = model()
    call = graphed(module, graphs=stand_in)
    x, z = torch.randn(5, 3), torch.randn(5, 3)
    first, second = call(x, more=(z, x)), call(z, more=(x, z))
    assert stand_in.rehearsed == 2
    assert stand_in.replayed == 2
    assert call.captures == 1
    for result, a, b in ((first, x, z), (second, z, x)):
        assert torch.equal(result["y"], module.linear(a))
        assert [m.item() for m in result["more"]] == [b.sum().item(), a.sum().item()]
        assert result["rows"] == 5


@torch.no_grad()
def test_one_capture_for_each_form_of_a_call(stand_in):
    call = graphed(model(), graphs=stand_in)
    x = torch.randn(5, 3)
    forms = [
        lambda: call(x),
        lambda: call(x[:4]),
        lambda: call(x, 2.0),
        lambda: call(x, scale=2.0),
        lambda: call(x, more=(x,)),
    ]
    for i, form in enumerate(forms, start=1):
        form()
        form()
        assert call.captures == i
    with torch.autocast("cpu", torch.bfloat16):
        assert call(x)["y"].dtype == torch.bfloat16
    with use_backend("eager"):
        call(x)
    assert call.captures == len(forms) + 2


@torch.no_grad()
def test_the_capture_used_longest_ago_goes(stand_in):
    call = graphed(model(), cache=2, graphs=stand_in)
    a, b, c = (torch.randn(n, 3) for n in (1, 2, 3))
    for x in (a, b, a, c):
        call(x)
    assert call.captures == 3
    call(a)
    assert call.captures == 3
    call(b)
    assert call.captures == 4
    with pytest.raises(ValueError, match="cache must be at least 1, got 0"):
        graphed(model(), cache=0)


def in_place(module):
    with torch.no_grad():
        module.linear.weight.mul_(2)


def assigned(module):
    module.load_state_dict({key: 2 * x for key, x in module.state_dict().items()}, assign=True)


def moved(module):
    module.linear.weight.data = 2 * module.linear.weight.data


def converted(module):
    module.double()


def another_module(module):
    module.linear = nn.Linear(3, 4).eval()


@pytest.mark.parametrize("change", [in_place, assigned, moved, converted, another_module])
def test_parameters_that_change(change, stand_in):
    module = model()
    call = graphed(module, graphs=stand_in)
    with torch.no_grad():
        call(torch.randn(5, 3))
    change(module)
    with torch.inference_mode():
        x = torch.randn(5, 3, dtype=module.linear.weight.dtype)
        assert torch.equal(call(x)["y"], module.linear(x))
    assert call.captures == (1 if change is in_place else 2)


def test_what_cannot_be_graphed_is_refused(stand_in):
    module = model()
    call = graphed(module, graphs=stand_in)
    x = torch.randn(5, 3)
    with pytest.raises(RuntimeError, match="has no gradients: call it within"):
        call(x)
    with torch.no_grad():
        with pytest.raises(ValueError, match="all tensors must be on cpu to be captured, got tensor 1 on meta"):
            call(x, more=(torch.ones(2, device="meta"),))
        with pytest.raises(TypeError, match="arguments must be tensors or hashable, got a set"):
            call(x, {1})
        module.linear.train()
        with pytest.raises(RuntimeError, match="must be in eval mode"):
            call(x)


def test_on_a_cpu_the_model_runs_as_it_is():
    call = graphed(model())
    x = torch.randn(5, 3, requires_grad=True)
    with pytest.warns(UserWarning, match="nothing is captured on cpu"):
        y = call(x)["y"]
    y.sum().backward()
    assert x.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(x)
    assert call.captures == 0


class Reads(nn.Module):
    """Reads a number from the device, as the stand-in has it."""

    def __init__(self, graphs):
        super().__init__()
        self.graphs = graphs

    def forward(self, x):
        if self.graphs.strict:
            raise Waits("called a synchronizing operation")
        return x


@torch.no_grad()
def test_what_stops_a_capture_is_named(stand_in):
    module = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Identity(), Reads(stand_in))).eval()
    call = graphed(module, graphs=stand_in)
    wanted = (
        r"this call cannot be captured: Waits: called a synchronizing operation in 1\.1 \(Reads\), .*test_graphs.py:"
    )
    with pytest.raises(CaptureError, match=wanted):
        call(torch.randn(2, 3))
    assert call.captures == 0


def encoder():
    torch.manual_seed(0)
    return Zipformer(**SIZES)


def frames(length=40):
    return (
        torch.randn(length, 2, 32),
        torch.tensor([length, length - 9]),
        torch.arange(length) >= torch.tensor([[99], [20]]),
    )


@torch.inference_mode()
def test_an_encoder(stand_in):
    module = encoder().eval()
    call = graphed(module, graphs=stand_in)
    for length in (40, 40, 24):
        x = frames(length)
        y, lengths = call(*x)
        wanted, wanted_lengths = module(*x)
        assert torch.equal(y, wanted)
        assert torch.equal(lengths, wanted_lengths)
    assert call.captures == 2


# ---- training ----


def loss_of(module, x, lengths, padding):
    return module(x, lengths, padding)[0].square().mean()


def make_step(stand_in, **options):
    module = encoder().train()
    optimizer = ScaledAdam(module.named_parameters(), lr=0.03, clipping_scale=2.0)
    return GraphedStep(module, loss_of, optimizer, graphs=stand_in, **options), module, optimizer


def set_batch_count(module, count):
    for part in module.modules():
        if hasattr(part, "batch_count"):
            part.batch_count = float(count)


@pytest.mark.parametrize("serves", [True, False], ids=["captured", "by Python"])
def test_every_call_takes_one_step(stand_in, serves):
    stand_in.serves = lambda device: serves
    step, module, optimizer = make_step(stand_in)
    twin = encoder().train()
    theirs = ScaledAdam(twin.named_parameters(), lr=0.03, clipping_scale=2.0)
    state = random.getstate()
    for i in range(6):
        batch = frames()
        torch.manual_seed(i)
        loss = step(*batch)
        torch.manual_seed(i)
        theirs.zero_grad()
        with without_draws():
            wanted = loss_of(twin, *batch)
            wanted.backward()
        theirs.step()
        assert relative_error(loss, wanted.detach()) <= 1e-5
        assert not loss.requires_grad
    assert random.getstate() == state, "Python draws nothing"
    assert step.captures == int(serves)
    assert [d.steps for d in optimizer.diagnostics()] == [6]
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert relative_error(p, q) <= 1e-4


def test_learning_rates_reach_the_replay(stand_in):
    step, module, optimizer = make_step(stand_in)
    for _ in range(3):
        step(*frames())
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in module.parameters()]
    momentum = [optimizer.state[p]["delta"].clone() for p in module.parameters()]
    step(*frames())
    assert optimizer.param_groups[0]["lr"].item() == 0.0
    for p, q, m in zip(module.parameters(), before, momentum, strict=True):
        torch.testing.assert_close(p.detach(), q + 0.9 * m, rtol=1e-4, atol=1e-5)  # only the momentum moves it
    assert step.captures == 1


def test_schedules_are_followed_after_some_calls(stand_in):
    step, module, _ = make_step(stand_in, hold=4)
    set_batch_count(module, 0)
    for _ in range(3):
        step(*frames())
    set_batch_count(module, 10_000)
    for _ in range(3):
        step(*frames())
    assert step.captures == 1
    for _ in range(3):  # looks, calls twice by Python, captures
        step(*frames())
    assert step.captures == 2
    for _ in range(20):
        step(*frames())
    assert step.captures == 2, "nothing has moved"


@pytest.mark.parametrize("change", ["state", "parameter", "form"])
def test_what_leads_to_a_new_capture_of_a_step(change, stand_in):
    step, module, optimizer = make_step(stand_in)
    for _ in range(4):
        step(*frames())
    if change == "state":
        optimizer.load_state_dict(optimizer.state_dict())
    elif change == "parameter":
        p = next(module.parameters())
        p.data = p.data.clone()
    for _ in range(3):
        step(*frames(24 if change == "form" else 40))
    assert step.captures == 2


def test_what_a_step_leaves_out_is_named(stand_in):
    step, module, _ = make_step(stand_in)
    kinds = {type(module.get_submodule(name)).__name__ for name in step.left_out}
    assert kinds == {"Balancer", "Whiten"}
    whiten = next(part for part in module.modules() if isinstance(part, Whiten))
    name = next(name for name, part in module.named_modules() if part is whiten)
    assert "the host reads its metric" in step.left_out[name]

    original = Whiten._whitened_gradient

    def reads(self, grad, x):
        if stand_in.strict:
            raise Waits("called a synchronizing operation")
        return original(self, grad, x)

    whiten.prob = whiten.min_prob = 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Whiten, "_whitened_gradient", reads)
        step(*frames())
        with pytest.raises(CaptureError, match=rf"this step cannot be captured: Waits: .* in {name} \(Whiten\)"):
            step(*frames())


def test_bad_arguments_of_a_step(stand_in):
    module = encoder()
    with pytest.raises(ValueError, match="must be made with capturable=True, got a AdamW without it in group 0"):
        GraphedStep(module, loss_of, torch.optim.AdamW(module.parameters()))
    with pytest.raises(ValueError, match="hold must be at least 1, got 0"):
        GraphedStep(module, loss_of, ScaledAdam(module.parameters()), hold=0)
    step, *_ = make_step(stand_in)
    with pytest.raises(ValueError, match="must be on cpu to be captured, got tensor 1 on meta"):
        step(frames()[0], torch.ones(2, device="meta"), None)


# ---- on a GPU ----


def on_gpu(batch):
    return tuple(x.cuda() for x in batch)


@pytest.mark.gpu("captures of an encoder")
@torch.inference_mode()
def test_captures_of_an_encoder():
    module = encoder().eval().cuda()
    call = graphed(module)
    for autocast in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            for length in (40, 24, 40):
                x = on_gpu(frames(length))
                y, lengths = call(*x)
                wanted, wanted_lengths = module(*x)
                assert relative_error(y, wanted) <= (1e-2 if autocast else 1e-5)
                assert torch.equal(lengths, wanted_lengths)
    assert call.captures == 4


@pytest.mark.gpu("a host sync within a capture")
@torch.inference_mode()
def test_a_wait_is_named():
    class Item(nn.Module):
        def forward(self, x):
            return x * x.sum().item()

    with pytest.raises(CaptureError, match=r"in 0 \(Item\)"):
        graphed(nn.Sequential(Item()).eval().cuda())(torch.randn(3, device="cuda"))


@pytest.mark.gpu("a captured training step")
def test_a_captured_training_step_learns():
    module = encoder().train().cuda()
    optimizer = ScaledAdam(module.named_parameters(), lr=0.03, clipping_scale=2.0)
    step = GraphedStep(module, loss_of, optimizer)
    batch = on_gpu(frames())
    losses = [step(*batch).item() for _ in range(60)]
    assert step.captures == 1
    assert losses[-1] < 0.5 * losses[0]
    assert len(set(losses)) == 60, "dropout is drawn anew"
    assert [d.steps for d in optimizer.diagnostics()] == [60]
