"""`rel_pos_attention` against its formula: any width of positions, any mask, every lane; its memory, and its errors."""

import pytest
import torch
import torch.nn.functional as F
from contract import TOLERANCE, relative
from lanes import lanes
from test_attention import OP, allocations, both_ways, storing

from zipformer_kernels import BackendError, ChunkMask, rel_pos_attention
from zipformer_kernels.core import tuning

every_lane = pytest.mark.parametrize("lane", lanes(OP))


def formula(q, k, v, p=None, pos=None, key_padding_mask=None, attn_mask=None, scale=None):
    """The docstring's, pair by pair."""
    targets, sources = q.shape[2], k.shape[2]
    s = torch.einsum("bhid,bhjd->bhij", q, k)
    if p is not None:
        offset = targets - 1 - torch.arange(targets).unsqueeze(1) + torch.arange(sources)
        s = s + torch.einsum("bhip,bhijp->bhij", p, pos.expand(len(q), *pos.shape[-3:])[:, :, offset])
    s = s * (q.shape[3] ** -0.5 if scale is None else scale)
    if key_padding_mask is not None:
        s = s.masked_fill(key_padding_mask[:, None, None, :], -1000.0)
    if attn_mask is not None:
        s = s.masked_fill(attn_mask if attn_mask.ndim == 2 else attn_mask.unsqueeze(1), -1000.0)
    return s.softmax(dim=-1) @ v


def inputs(targets, sources, positions, batch=2, heads=3, query=24, values=10, sets=()):
    """q, k, v, p and pos; `sets` are the dimensions of pos before its heads."""
    torch.manual_seed(targets + 100 * sources + positions)
    shapes = [(batch, heads, targets, query), (batch, heads, sources, query), (batch, heads, sources, values)]
    if positions:
        shapes += [(batch, heads, targets, positions), (*sets, heads, targets + sources - 1, positions)]
    return [torch.randn(shape) for shape in shapes]


def check(lane, tensors, dtype=torch.float32, tolerance=None, **options):
    """Result and all gradients on a lane, against the formula in float64."""
    leaves = [x.to(lane.device, dtype).requires_grad_() for x in tensors]
    wide = [x.detach().double().cpu().requires_grad_() for x in leaves]
    masks = {
        name: x.to(lane.device) if isinstance(x, torch.Tensor) else x for name, x in options.items() if x is not None
    }
    try:
        with lane.active():
            out = rel_pos_attention(*leaves, **masks)
            grad = torch.randn_like(out)
            grads = torch.autograd.grad(out, leaves, grad)
    except BackendError as refused:  # a right answer, if the backend says so before it computes anything
        assert lane.backend not in ("eager", "cpu")
        pytest.skip(str(refused))
    if isinstance(options.get("attn_mask"), ChunkMask):
        options["attn_mask"] = options["attn_mask"].materialize(tensors[0].shape[2])
    expected = formula(*wide, **options)
    expected_grads = torch.autograd.grad(expected, wide, grad.double().cpu())
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    assert out.dtype == dtype
    assert relative(out, expected) < tolerance
    floor = 0.1 * grad.double().norm().item()  # a single source leaves scores without a gradient: only rounding
    for name, leaf, actual, wanted in zip(("q", "k", "v", "p", "pos"), leaves, grads, expected_grads, strict=False):
        assert actual.dtype == leaf.dtype
        assert relative(actual, wanted, floor) < 3 * tolerance, f"gradient of {name}"
    return out


def padding(batch, sources):
    """The last sequence is all padding, if there are several."""
    lengths = torch.linspace(sources, 0, batch).long() if batch > 1 else torch.tensor([sources - 1])
    return torch.arange(sources) >= lengths.unsqueeze(1)


@both_ways
@pytest.mark.parametrize("sizes", [(21, 21), (13, 40), (40, 13), (1, 9), (9, 1)], ids=str)
@pytest.mark.parametrize("positions", [0, 1, 4, 16, 64])
@every_lane
def test_matches_the_formula(lane, positions, sizes, stored):
    with storing(stored):
        check(lane, inputs(*sizes, positions))


@both_ways
@pytest.mark.parametrize("masks", ["padding", "mask", "mask for each", "both", "all masked", "chunks", "causal"])
@every_lane
def test_every_mask(lane, masks, stored):
    sizes = (37, 37) if masks in ("chunks", "causal") else (25, 37)
    torch.manual_seed(1)
    options = {
        "padding": {"key_padding_mask": padding(2, 37)},
        "mask": {"attn_mask": torch.rand(25, 37) > 0.5},
        "mask for each": {"attn_mask": torch.rand(2, 25, 37) > 0.5},
        "both": {"key_padding_mask": padding(2, 37), "attn_mask": torch.rand(25, 37) > 0.5},
        "all masked": {"attn_mask": torch.ones(25, 37, dtype=torch.bool)},
        "chunks": {"attn_mask": ChunkMask(8, 1), "key_padding_mask": padding(2, 37)},
        "causal": {"attn_mask": ChunkMask(1)},
    }[masks]
    tensors = inputs(*sizes, 8)
    with storing(stored):
        out = check(lane, tensors, **options)
    if masks == "all masked":
        mean = tensors[2].mean(2, keepdim=True).expand(out.shape)
        torch.testing.assert_close(out.cpu(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("isa")
@both_ways
@pytest.mark.parametrize("positions", [3, 33, 64, 100])
@pytest.mark.parametrize("lane", lanes(OP, "eager", "triton", "cuda"))
def test_wide_heads_over_several_tiles(lane, positions, stored):
    """On every instruction set; more sources than a tile holds, heads wider than one sum."""
    for dtype in (torch.float64, torch.float32):
        with storing(stored):
            check(lane, inputs(45, 400, positions, query=128, values=65), dtype, key_padding_mask=padding(2, 400))


@both_ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_lane
def test_half_precision(lane, dtype, stored):
    """The scale is a power of two and exact; the default, 24^-0.5, would round q once more."""
    with storing(stored):
        check(lane, inputs(30, 30, 16, query=64), dtype, key_padding_mask=padding(2, 30))
        check(lane, inputs(30, 30, 16), dtype, scale=0.25)


@pytest.mark.parametrize("sets", [(), (1,), (2,)], ids=["one set", "one set, as a batch", "one for each"])
@every_lane
def test_projected_positions_may_have_a_batch(lane, sets):
    check(lane, inputs(20, 20, 8, sets=sets))


@every_lane
def test_without_positions_it_is_torchs(lane):
    tensors = [x.to(lane.device) for x in inputs(20, 30, 0)]
    mask = torch.rand(20, 30, device=lane.device) > 0.6
    mask[:, 0] = False
    with lane.active():
        out = rel_pos_attention(*tensors, attn_mask=mask)
        scaled = rel_pos_attention(*tensors, scale=1.0)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*tensors, attn_mask=~mask), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scaled, F.scaled_dot_product_attention(*tensors, scale=1.0), rtol=1e-5, atol=1e-6)


@both_ways
@every_lane
def test_any_strides(lane, stored):
    """Heads of one projection as layers make them, positions expanded, and a gradient of one element."""
    torch.manual_seed(3)
    width = 4 if lane.backend == "cuda" else 8  # as wide as it takes position queries
    projected = torch.randn(2, 20, 3, 3, width, device=lane.device, requires_grad=True)  # batch, frames, parts, heads
    bias = torch.randn(3, 1, width, device=lane.device, requires_grad=True)
    pos = torch.randn(1, 39, 3, 2 * width, device=lane.device, requires_grad=True)
    leaves = projected, bias, pos
    with lane.active(), storing(stored):
        results = []
        for function in (rel_pos_attention, formula):
            q, k, v = projected.permute(2, 0, 3, 1, 4)
            out = function(q, k, v, q + bias, pos.transpose(1, 2)[..., ::2])
            results.append([out, *torch.autograd.grad(out, leaves, torch.ones(1, device=lane.device).expand_as(out))])
    for actual, wanted in zip(*results, strict=True):
        assert relative(actual, wanted) < 1e-5


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_gradcheck(backend):
    leaves = [x.double().requires_grad_() for x in inputs(4, 6, 3, heads=2, query=3, values=2)]

    def call(*leaves):
        return rel_pos_attention(
            *leaves, key_padding_mask=padding(2, 6) & (torch.arange(2) < 1)[:, None], backend=backend
        )

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@both_ways
@every_lane
def test_compiles_without_graph_breaks(lane, stored):
    tensors = [x.to(lane.device).requires_grad_() for x in inputs(12, 12, 4)]

    def call(*tensors):
        return rel_pos_attention(*tensors, attn_mask=ChunkMask(4, 1))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with lane.active(), storing(stored):
        results = [torch.autograd.grad(f(*tensors).square().sum(), tensors) for f in (compiled, call)]
    for actual, wanted in zip(*results, strict=True):
        assert relative(actual, wanted) < 3 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("lane", lanes(OP, "triton", "cuda"))
def test_autocast_takes_what_torchs_takes(lane):
    """Here p is in float32, as a half-precision projection plus a parameter is."""
    tensors = inputs(20, 20, 8)
    mixed = [x.to(torch.float32 if i == 3 else torch.bfloat16).requires_grad_() for i, x in enumerate(tensors)]
    with lane.active(), torch.autocast("cpu", torch.bfloat16):
        out = rel_pos_attention(*mixed)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), mixed)
    assert [x.dtype for x in grads] == [x.dtype for x in mixed]
    assert relative(out, formula(*(x.double() for x in mixed))) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(("targets", "sources"), [(0, 0), (0, 5), (5, 0)])
@every_lane
def test_no_frames(lane, targets, sources):
    torch.manual_seed(0)
    shapes = [(2, 3, targets, 8), (2, 3, sources, 8), (2, 3, sources, 6), (2, 3, targets, 4)]
    shapes.append((3, max(targets + sources - 1, 0), 4))
    leaves = [torch.randn(shape, device=lane.device, requires_grad=True) for shape in shapes]
    with lane.active():
        out = rel_pos_attention(*leaves)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == (2, 3, targets, 6)
    assert not any(x.any() for x in (out, *grads))


@pytest.mark.parametrize("lane", lanes(OP, "eager"))
def test_no_tensor_grows_with_the_square_of_the_frames(lane, monkeypatch):
    """The largest is linear in T: twice as long for twice the frames. The interpreter's and the
    emulator's kernels are skipped.

    Triton's backward pass takes no more scratch than it must.
    """
    if lane.device.type == "cpu" and lane.backend == "triton":
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **kwargs: None)
    if lane.device.type == "cpu" and lane.backend == "cuda":
        monkeypatch.setattr("zipformer_kernels.ops.attention.cuda.call_cuda", lambda *args: None)
        monkeypatch.setattr("zipformer_kernels.ops.attention.cuda_gradients.call_cuda", lambda *args: None)
    heads, width, positions = 4, 32, 4 if lane.backend == "cuda" else 32
    largest = []
    for frames in (2048, 4096):
        leaves = [x.to(lane.device).requires_grad_() for x in inputs(frames, frames, positions, 1, heads, width, width)]
        with lane.active(), storing(False), tuning.override(**{"attention.triton_scratch_bytes": 0}):
            step = lambda: torch.autograd.grad(rel_pos_attention(*leaves).sum(), leaves)  # noqa: E731, B023
            largest.append(allocations(step))
    assert largest[1] < 2.001 * largest[0]
    assert largest[1] < 3 * 4096 * heads * width  # pos has 2 T - 1 rows; kernels may pad them


def of(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


BAD = {
    "q is a tensor": ({"q": None}, TypeError, "q must be a tensor, got NoneType"),
    "q is floating": ({"q": of(2, 3, 5, 8, dtype=torch.int64)}, TypeError, "q must be of a floating-point dtype"),
    "q has heads": ({"q": of(2, 5, 24)}, ValueError, r"q must have shape \(batch, heads, .*got \(2, 5, 24\)"),
    "k is as wide": ({"k": of(2, 3, 7, 9)}, ValueError, r"k must have shape \(2, 3, 7, 8\), got \(2, 3, 7, 9\)"),
    "k has as many heads": ({"k": of(2, 1, 7, 8)}, ValueError, r"k must have shape \(2, 3, 7, 8\)"),
    "v is of the sources": ({"v": of(2, 3, 5, 6)}, ValueError, r"v must have shape \(2, 3, 7, 6\)"),
    "v is of q's dtype": ({"v": of(2, 3, 7, 6, dtype=torch.float64)}, TypeError, "v must be of dtype torch.float32 as"),
    "pos comes with p": ({"pos": None}, ValueError, "p and pos must be given together, got only p"),
    "p comes with pos": ({"p": None}, ValueError, "p and pos must be given together, got only pos"),
    "p is of the targets": ({"p": of(2, 3, 7, 4)}, ValueError, r"p must have shape \(2, 3, 5, 4\)"),
    "pos is of the offsets": (
        {"pos": of(3, 5, 4)},
        ValueError,
        r"pos must have shape .* = \(3, 11, 4\), or a batch of 1 or 2 of these, got \(3, 5, 4\)",
    ),
    "pos is a tensor": ({"pos": [1]}, TypeError, "pos must be a tensor or None, got list"),
    "devices": ({"p": torch.zeros(2, 3, 5, 4, device="meta")}, ValueError, "p must be on cpu as q is, got meta"),
    "padding is bool": ({"key_padding_mask": of(2, 7)}, TypeError, "key_padding_mask must be a tensor of bools"),
    "padding's shape": (
        {"key_padding_mask": of(2, 5, dtype=torch.bool)},
        ValueError,
        r"key_padding_mask must be of shape \(2, 7\), got \(2, 5\)",
    ),
    "mask is bool": ({"attn_mask": of(5, 7)}, TypeError, "attn_mask must be of dtype bool, got torch.float32"),
    "mask is a tensor": ({"attn_mask": "causal"}, TypeError, "attn_mask must be a tensor of bools, a ChunkMask or"),
    "mask's shape": ({"attn_mask": of(7, 7, dtype=torch.bool)}, ValueError, "attn_mask must be of shape"),
    "chunks": ({"attn_mask": ChunkMask(2)}, ValueError, "a ChunkMask needs as many sources as targets"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changed, error, message = BAD[name]
    given = {"q": of(2, 3, 5, 8), "k": of(2, 3, 7, 8), "v": of(2, 3, 7, 6), "p": of(2, 3, 5, 4), "pos": of(3, 11, 4)}
    with pytest.raises(error, match=message):
        rel_pos_attention(**given | changed)
