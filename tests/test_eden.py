"""Eden and Eden2: upstream's schedules number for number, and what torch expects of a schedule."""

import pytest
import torch
import upstream
from torch.optim.lr_scheduler import LRScheduler

from zipformer_kernels.optim import Eden, Eden2, ScaledAdam

SCHEDULES = {
    "recipe": ("Eden", (7500, 3.5), {"warmup_start": 0.1}),
    "defaults": ("Eden", (30, 2), {}),
    "hours for epochs": ("Eden", (10.5, 0.75), {"warmup_batches": 12.5, "warmup_start": 0.0}),
    "no warm-up": ("Eden", (40, 4), {"warmup_batches": 0, "warmup_start": 1.0}),
    "batches only": ("Eden2", (25,), {"warmup_batches": 10, "warmup_start": 0.3}),
    "all by position": ("Eden", (40, 4, 20.0, 0.25, False), {}),
}
OURS = {"Eden": Eden, "Eden2": Eden2}


def make_optimizer(lrs=(0.045, 0.01)):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr} for lr in lrs], lr=1.0)


def lrs(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize(("name", "args", "kwargs"), SCHEDULES.values(), ids=SCHEDULES)
def test_equals_upstream_number_for_number(name, args, kwargs):
    optimizers = make_optimizer(), make_optimizer()
    ours = OURS[name](optimizers[0], *args, **kwargs)
    theirs = getattr(upstream.optim, name)(optimizers[1], *args, **kwargs)
    assert lrs(optimizers[0]) == [0.045, 0.01], "no change before the first step"
    seen = set()
    for epoch in range(12):
        for schedule in (ours, theirs):
            schedule.step_epoch(*([epoch] if epoch % 3 else []))
        for batch in range(60):
            for schedule in (ours, theirs):
                schedule.step_batch(*([60 * epoch + batch] if batch % 7 == 0 else []))
            assert lrs(optimizers[0]) == lrs(optimizers[1])
            assert ours.get_last_lr() == theirs.get_last_lr() == ours.get_lr()
            seen.add(ours.get_last_lr()[0])
        assert ours.state_dict() == theirs.state_dict()
    assert len(seen) > 600


def test_resumes_from_its_own_state_and_from_upstreams():
    theirs = upstream.optim.Eden(make_optimizer(), 30, 2)
    ours = Eden(make_optimizer(), 30, 2)
    for schedule in (ours, theirs):
        schedule.step_epoch(3)
        schedule.step_batch(77)
    for state in (ours.state_dict(), theirs.state_dict(), {**theirs.state_dict(), "base_lrs": [9.0, 9.0]}):
        resumed = Eden(make_optimizer(), 30, 2)
        resumed.load_state_dict(state)
        resumed.step_batch()
        theirs.step_batch(78)
        assert resumed.get_last_lr() == theirs.get_last_lr()
    theirs.load_state_dict(ours.state_dict())
    with pytest.raises(ValueError, match=r"'epoch' and 'batch', got the keys \['last_epoch'\]"):
        ours.load_state_dict({"last_epoch": 3})


def test_base_rates_come_from_the_group_and_outlive_loading():
    optimizer = make_optimizer()
    optimizer.param_groups[0]["base_lr"] = 0.5
    schedule = Eden(optimizer, 1000, 10, warmup_batches=0)
    optimizer.load_state_dict(make_optimizer((7.0, 7.0)).state_dict())
    schedule.step_batch(0)
    assert lrs(optimizer) == [0.5, 0.01]


def test_a_group_added_later_is_scheduled_too():
    optimizer = make_optimizer()
    schedule = Eden(optimizer, 100, 2, warmup_batches=4, warmup_start=0.5)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 2.0})
    schedule.step_batch(0)
    assert lrs(optimizer) == [0.0225, 0.005, 1.0]


def test_fills_a_rate_that_is_a_tensor():
    rate = torch.tensor(0.04)
    optimizer = ScaledAdam([torch.nn.Parameter(torch.zeros(2))], lr=rate)
    Eden(optimizer, 100, 2, warmup_batches=0).step_batch(100)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.04 * 2**-0.25, rel=1e-6)


def test_is_a_torch_schedule():
    schedule = Eden(make_optimizer(), 100, 2, warmup_batches=10)
    assert isinstance(schedule, LRScheduler)
    assert schedule.get_last_lr() == [0.045, 0.01]
    for _ in range(5):
        schedule.step()
    assert schedule.batch == 5
    assert schedule.get_last_lr()[0] == pytest.approx(0.045 * 0.75, rel=1e-3)


def test_verbose_logs_each_change(caplog):
    schedule = Eden(make_optimizer(), 100, 2, verbose=True)
    with caplog.at_level("INFO"):
        schedule.step_batch(3)
    assert [record.getMessage()[:17] for record in caplog.records] == ["epoch 0, batch 3:"] * 2


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got list"):
        Eden([], 100, 2)
    with pytest.raises(ValueError, match=r"warmup_start must be in \[0, 1\], got 1.5"):
        Eden2(make_optimizer(), 100, warmup_start=1.5)
