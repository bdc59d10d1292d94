"""The conv embed in tiles of frames, as it runs where no gradient is wanted: the same results in bounded memory."""

import random

import pytest
import torch
import upstream
from draws import seed_all
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import build_pair
from tolerances import PARITY, assert_parity, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from unseen import unseen

from zipformer_kernels.core import tuning
from zipformer_kernels.modules import Conv2dSubsampling, subsampling
from zipformer_kernels.modules.swoosh import SwooshR
from zipformer_kernels.training import ScheduledFloat

BINS = 20


@pytest.fixture
def tile():
    """Tiles so small that short inputs need several."""
    with tuning.override(**{"conv_embed.frames": 5}):
        yield


def pair(dtype=torch.float64):
    their_class = upstream.subsampling.Conv2dSubsampling
    ours, theirs = build_pair(Conv2dSubsampling, their_class, BINS, 12, 4, 8, 6, dtype=dtype)
    return ours.eval(), theirs.eval()


def embed():
    torch.manual_seed(0)
    return Conv2dSubsampling(BINS, 12, 4, 8, 6).eval()


def inputs(batch, frames, dtype=torch.float32):
    return torch.randn(batch, frames, BINS, dtype=dtype), torch.full((batch,), frames)


def whole(model, x, x_lens):
    """The result of the layers on all frames at once: x asks for a gradient."""
    with torch.enable_grad():
        y, lengths = model(x.detach().requires_grad_(), x_lens)
    return y.detach(), lengths


@pytest.mark.parametrize("frames", [*range(9, 34), 57, 58, 107])
@torch.no_grad()
def test_any_number_of_tiles_is_upstream(tile, frames):
    for dtype in (torch.float64, torch.float32):
        ours, theirs = pair(dtype)
        for batch in (1, 2, 7):
            x, x_lens = inputs(batch, frames, dtype)
            assert ours._goes_in_tiles(x)
            y, lengths = ours(x, x_lens)
            expected, expected_lengths = theirs(x, x_lens)
            assert_parity(y, expected, PARITY[dtype], f"{batch} x {frames}")
            assert torch.equal(lengths, expected_lengths)
            assert_parity(y, whole(ours, x, x_lens)[0], PARITY[dtype], "all frames at once")


@pytest.mark.parametrize("name", ["S", "L"])
@torch.no_grad()
def test_presets_are_upstreams_across_real_tiles(name):
    ours = Conv2dSubsampling.from_preset(name).eval()
    theirs = upstream.subsampling.Conv2dSubsampling(80, ours.out.out_features).eval()
    theirs.load_state_dict(ours.state_dict())
    x, x_lens = torch.randn(2, 1206, 80), torch.tensor([1206, 900])
    y, lengths = ours(x, x_lens)
    expected, expected_lengths = theirs(x, x_lens)
    assert_parity(y, expected, PARITY[torch.float32], "embedding")
    assert torch.equal(lengths, expected_lengths)


@torch.no_grad()
def test_only_what_convolutions_made_is_overwritten(tile):
    model = embed()
    x, x_lens = inputs(2, 31)
    given = x.clone()
    expected = whole(model, x, x_lens)[0]
    assert_parity(model(x, x_lens)[0], expected, PARITY[torch.float32], "in place")
    assert torch.equal(x, given)
    first, *rest = model.conv
    kept = Kept()
    model.conv = torch.nn.Sequential(torch.nn.Identity(), SwooshR(), first, kept, SwooshR(), *rest)
    expected = whole(model, x, x_lens)[0]
    assert_parity(model(x, x_lens)[0], expected, PARITY[torch.float32], "other activations")
    assert torch.equal(x, given)
    assert torch.equal(kept.seen, kept.copy)


class Kept(torch.nn.Module):
    """Returns its input and keeps it."""

    def forward(self, x):
        self.seen, self.copy = x, x.clone()
        return x


@settings(max_examples=100)
@given(batch=st.integers(1, 40), frames=st.integers(1, 2000))
def test_tiles_cover_every_frame_once(batch, frames):
    seen = torch.zeros(batch, frames)
    for sequences, begin, end in subsampling._tiles(batch, frames):
        part = seen[sequences, begin:end]
        assert 0 < part.numel() <= subsampling.TILE.value
        part += 1
    assert (seen == 1).all()


@torch.no_grad()
def test_strided_input(tile):
    model = embed()
    base = torch.randn(2 * BINS, 90, 4)
    for x in (
        base[:BINS, ::2].permute(2, 1, 0),
        base[::2, 40:].permute(2, 1, 0),
        base[:BINS, :30, :1].permute(2, 1, 0),
    ):
        x_lens = torch.full((x.shape[0],), x.shape[1])
        assert (
            relative_error(model(x, x_lens)[0], model(x.clone(memory_format=torch.contiguous_format), x_lens)[0])
            <= PARITY[torch.float32]
        )
    x = torch.randn(1, 30, BINS).expand(3, 30, BINS)
    y, _ = model(x, torch.full((3,), 30))
    assert relative_error(y, y[:1].expand(3, *y.shape[1:])) <= PARITY[torch.float32]


@torch.no_grad()
def test_no_sequences():
    y, lengths = embed()(*inputs(0, 30))
    assert y.shape == (0, 11, 12)
    assert lengths.shape == (0,)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation returned."""

    nbytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        for x in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(x, torch.Tensor):
                self.nbytes = max(self.nbytes, x.numel() * x.element_size())
        return results


@torch.no_grad()
def test_no_tensor_grows_with_the_frames_but_the_result():
    """Two minutes: the ConvNeXt block's hidden channels would fill 350 MB."""
    model = Conv2dSubsampling.from_preset("S").eval()
    x, x_lens = torch.randn(1, 12007, 80), torch.tensor([12007])
    with unseen(Largest()) as largest:
        y, _ = model(x, x_lens)
    hidden = (subsampling.TILE.value + 2 * 3) * model.out_width * 384 * 4
    assert y.shape == (1, 6000, 192)
    assert largest.nbytes <= hidden


@torch.no_grad()
def test_hooks_see_whole_sequences_once(tile):
    model = embed()
    x, x_lens = inputs(2, 40)
    expected, _ = model(x, x_lens)
    for module in model.modules():
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            calls = []
            handle = register(lambda module, args, *result, calls=calls: calls.append(args))
            y, _ = model(x, x_lens)
            handle.remove()
            assert relative_error(y, expected) <= PARITY[torch.float32]
            if module is model.convnext.out_whiten or isinstance(module, ScheduledFloat):  # for gradients only
                assert calls == []
                continue
            assert len(calls) == 1, module
            assert calls[0][0].shape[0] == 2, module


@torch.no_grad()
def test_a_hook_may_change_what_it_sees(tile):
    model = embed()
    x, x_lens = inputs(2, 40)
    handle = model.out.register_forward_hook(lambda module, args, result: result + 1)
    changed, _ = model(x, x_lens)
    handle.remove()
    model.out.bias += 1
    assert relative_error(changed, model(x, x_lens)[0]) <= PARITY[torch.float32]


def test_a_replaced_linear_layer_is_called(tile):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = embed()
    x, x_lens = inputs(2, 40)
    doubled = Doubled(model.out.in_features, model.out.out_features)
    doubled.load_state_dict(model.out.state_dict())
    model.out.weight.data *= 2
    model.out.bias.data *= 2
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected, _ = model(x, x_lens)
            linear, model.out = model.out, doubled
            y, _ = model(x, x_lens)
            model.out = linear
            assert relative_error(y, expected) <= PARITY[torch.float32]


def test_a_gradient_that_is_wanted_is_had(tile):
    model = embed().requires_grad_(False)
    x, x_lens = inputs(2, 40)
    assert model._goes_in_tiles(x)  # though grad mode is on
    tiled, _ = model(x, x_lens)
    assert not tiled.requires_grad
    assert model(x.requires_grad_(), x_lens)[0].requires_grad
    for parameter in model.parameters():
        parameter.requires_grad_()
        y, _ = model(x.detach(), x_lens)
        parameter.requires_grad_(False)
        assert y.requires_grad
        assert relative_error(y, tiled) <= PARITY[torch.float32]


@torch.no_grad()
def test_training_mode_draws_as_upstream_without_gradients(tile):
    ours, theirs = pair()
    x, x_lens = inputs(3, 40, torch.float64)
    for seed in range(4):
        results = []
        for model in (ours.train(), theirs.train()):
            seed_all(seed)
            results.append((model(x, x_lens)[0], random.getstate(), torch.get_rng_state()))
        (y, *drawn), (expected, *drawn_upstream) = results
        assert_parity(y, expected, PARITY[torch.float64], "training mode")
        assert drawn[0] == drawn_upstream[0]
        assert torch.equal(drawn[1], drawn_upstream[1])


@torch.no_grad()
def test_eval_draws_nothing_more_than_upstream(tile):
    ours, theirs = pair()
    args = inputs(2, 40, torch.float64)
    for model in (ours, theirs):
        seed_all(3)
        model(*args)
        if model is ours:
            drawn = random.getstate(), torch.get_rng_state()
    assert drawn[0] == random.getstate()
    assert torch.equal(drawn[1], torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_and_autocast(tile, dtype):
    """As far from float32 as the same layers on all frames at once, in the same dtype."""
    model = embed()
    x, x_lens = inputs(2, 40)
    exact, _ = model(x, x_lens)
    with torch.autocast("cpu", dtype):
        y, _ = model(x, x_lens)
        expected, _ = whole(model, x, x_lens)
    assert y.dtype == expected.dtype
    assert relative_error(y, exact) <= 2 * relative_error(expected, exact)
    model, x = model.to(dtype), x.to(dtype)
    y, expected = model(x, x_lens)[0], whole(model, x, x_lens)[0]
    assert y.dtype == expected.dtype == dtype
    assert relative_error(y, exact) <= 2 * relative_error(expected, exact)


@torch.no_grad()
def test_transforms_of_torch_func_see_the_plain_layers(tile):
    model = embed()
    x, x_lens = inputs(6, 40)
    mapped = torch.func.vmap(lambda x: model(x.unsqueeze(0), torch.tensor([40]))[0][0])(x)
    assert relative_error(mapped, model(x, x_lens)[0]) <= PARITY[torch.float32]


@torch.no_grad()
def test_compiles_without_graph_breaks(tile):
    model = embed()
    args = inputs(2, 40)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*args)[0], model(*args)[0]) <= PARITY[torch.float32]
