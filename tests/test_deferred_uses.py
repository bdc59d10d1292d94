"""Uses that leave their part to one backward of the weights, on the CPU: against float64, pass by pass, memory."""

import itertools

import pytest
import torch
from test_attention import TOLERANCE, relative, storing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from unseen import unseen

from zipformer_kernels.core import backend
from zipformer_kernels.core.joint import side_by_side, split
from zipformer_kernels.ops.attention import (
    AttentionWeights,
    ChunkMask,
    RecomputedWeights,
    StoredWeights,
    deferred,
)
from zipformer_kernels.ops.attention.cases import padding, weights_inputs
from zipformer_kernels.ops.nonlin_attention import nonlin_attention

pytestmark = pytest.mark.skipif(backend.missing["cpu"] is not None, reason=f"cpu: {backend.missing['cpu']}")
HEADS, BATCH, CHANNELS = 3, 3, 5


def scores(targets=45, sources=None, dtype=torch.float64, heads=HEADS, batch=BATCH):
    """q, k, p, e, as leaves."""
    made = weights_inputs(targets, sources or targets, batch, heads, 8, 3, dtype, "cpu")
    return [x.detach().requires_grad_() for x in made]


def values(frames=45, dtype=torch.float64, heads=HEADS, batch=BATCH, channels=CHANNELS):
    return torch.randn(frames, batch, heads * channels, dtype=dtype, requires_grad=True)


@pytest.fixture(autouse=True, params=[StoredWeights, RecomputedWeights], ids=["stored", "recomputed"])
def kind(request):
    """How weights are held, in every test."""
    with storing(request.param is StoredWeights):
        yield request.param


def cpu_weights(leaves, *args):
    return AttentionWeights(*leaves, *args, backend="cpu")


def gradients(outs, leaves, **kwargs):
    """The gradients from random ones of the outputs, the same at each call."""
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outs]
    return torch.autograd.grad(outs, leaves, grads, **kwargs)


def wide(x):
    """In float64, a leaf as before."""
    return x.detach().double().requires_grad_(x.requires_grad) if torch.is_tensor(x) and x.is_floating_point() else x


def check(function, score_leaves, args=(), others=()):
    """`function(weights, *others)`, a list of outputs, and all gradients on the CPU against float64 on eager."""
    leaves = [x for x in (*score_leaves, *others) if x is not None]
    outs = function(cpu_weights(score_leaves, *args), *others)
    grads = gradients(outs, leaves, allow_unused=True)
    mine, theirs = ([wide(x) for x in tensors] for tensors in (score_leaves, others))
    expected = function(AttentionWeights(*mine, *args, backend="eager"), *theirs)
    wanted = gradients(expected, [x for x in (*mine, *theirs) if x is not None], allow_unused=True)
    tolerance = TOLERANCE[leaves[0].dtype]
    for i, (actual, other) in enumerate(zip(outs, expected, strict=True)):
        assert actual.dtype == leaves[0].dtype
        assert relative(actual, other) < tolerance, f"output {i}"
    for i, (actual, other) in enumerate(zip(grads, wanted, strict=True)):
        assert (actual is None) == (other is None), f"gradient {i}"
        if other is not None:
            assert relative(actual, other, floor=0.1) < 3 * tolerance, f"gradient {i}"


def as_a_layer(weights, first, second, projected, *apart):
    """Self-attention twice, and NonlinAttention with thirds side by side and with others that are not."""
    outs = [weights.aggregate(first), weights.aggregate(second)]
    if weights.shape[2] == weights.shape[3]:
        thirds = split(projected, [CHANNELS] * 3)
        assert side_by_side(*thirds) is not None
        assert side_by_side(*apart) is None
        outs += [nonlin_attention(weights[0:1], *thirds), nonlin_attention(weights[0:1], *apart)]
    return outs


def all_values(frames=45, dtype=torch.float64):
    """What `as_a_layer` takes."""
    thirds = [values(frames, dtype, heads=1) for _ in range(3)]
    return [values(frames, dtype), values(frames, dtype, channels=2), values(frames, dtype, 1, channels=15), *thirds]


CASES = {
    "no masks": {},
    "padding, a sequence all of it": {"masks": (padding(BATCH, 45, "cpu"),)},
    "a mask": {"masks": (None, torch.arange(45) % 3 == torch.arange(45)[:, None] % 4)},
    "a mask for each sequence": {"masks": (None, torch.arange(45 * 45 * BATCH).view(BATCH, 45, 45) % 7 < 3)},
    "chunks": {"masks": (padding(BATCH, 45, "cpu"), ChunkMask(8, 1))},
    "penalty": {"masks": (padding(BATCH, 45, "cpu"), None, 0.3, 1.0)},
    "no positions": {"positions": None},
    "positions for each sequence": {"positions": "by sequence"},
    "few targets": {"targets": 7, "sources": 80, "masks": (padding(BATCH, 80, "cpu"),)},
    "tiles": {"targets": 70, "sources": 800, "masks": (padding(BATCH, 800, "cpu"), None, 0.3, 1.0)},
    "square tiles": {"targets": 400, "sources": 400, "masks": (padding(BATCH, 400, "cpu"), ChunkMask(50, 7))},
    "one frame": {"targets": 1, "sources": 1},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_uses_of_a_layer_match_float64(case, dtype):
    case = {"targets": 45, "sources": 45, "masks": (), "positions": "shared"} | CASES[case]
    leaves = scores(case["targets"], case["sources"], dtype)
    if case["positions"] is None:
        leaves[2:] = None, None
    elif case["positions"] == "by sequence":
        leaves[3] = torch.randn(BATCH, *leaves[3].shape).to(dtype).requires_grad_()
    check(as_a_layer, leaves, case["masks"], all_values(case["sources"], dtype))


def test_padding_of_a_whole_sequence():
    check(as_a_layer, scores(), CASES["padding, a sequence all of it"]["masks"], all_values())


OTHER_USES = {
    "one use": lambda w, v: [w.aggregate(v)],
    "one value used twice": lambda w, v: [w.aggregate(v), w.aggregate(v) * 2],
    "weights too": lambda w, v: [w.aggregate(v), w.materialize().exp()],
    "weights alone": lambda w, v: [w.materialize()],
    "the first head alone": lambda w, v: [w[0:1].aggregate(v[..., :CHANNELS])],
    "the first head as a tensor": lambda w, v: [w[0:1].aggregate(v[..., :CHANNELS]), w[0:1].materialize()],
    "heads behind the first": lambda w, v: [w[1:].aggregate(v[..., CHANNELS:]), w.aggregate(v)],
    "a head of several": lambda w, v: [w[1:2].aggregate(v[..., :CHANNELS]), w.aggregate(v)],
    "heads on both sides": lambda w, v: [w[0:2].aggregate(v[..., CHANNELS:]), w[2:3].aggregate(v[..., :CHANNELS])],
    "a slice of a slice": lambda w, v: [w[1:][1:].aggregate(v[..., :CHANNELS]), w[:][0:1].materialize()],
    "constant weights": lambda w, v: [w.constant().aggregate(v), w.aggregate(v)],
    "constant weights of a head": lambda w, v: [w[0:1].constant().aggregate(v[..., :CHANNELS]), w.aggregate(v)],
    "torch's functions": lambda w, v: [torch.sum(w, dim=2), w.aggregate(v)],
}


@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("use", OTHER_USES)
def test_other_uses_match_float64(use, penalty):
    """Heads that nothing uses get the penalty's gradient alone."""
    check(OTHER_USES[use], scores(), (padding(BATCH, 45, "cpu"), None, penalty, 1.0), [values()])


@pytest.mark.parametrize("heads", [1, 2])
def test_few_heads(heads):
    check(OTHER_USES["weights too"], scores(heads=heads), others=[values(heads=heads)])


def test_uses_of_strided_values_and_expanded_gradients():
    leaves = scores()
    base = torch.randn(HEADS * CHANNELS, BATCH, 90, dtype=torch.float64, requires_grad=True)
    check(lambda w, base: [w.aggregate(base.transpose(0, 2)[::2])], leaves, others=[base])
    sums = []
    for name in ("cpu", "eager"):
        out = AttentionWeights(*leaves, backend=name).aggregate(values := base.transpose(0, 2)[::2])
        sums.append(torch.autograd.grad((out + values).sum(), [*leaves, base]))
    for actual, expected in zip(*sums, strict=True):
        assert relative(actual, expected, floor=0.1) < TOLERANCE[torch.float64]


def test_uses_under_autocast_and_outside_add_up(kind):
    leaves, v = scores(dtype=torch.float32), values(dtype=torch.float32)
    weights = cpu_weights(leaves)
    outside = weights.aggregate(v)
    with torch.autocast("cpu", torch.bfloat16):
        inside = weights.aggregate(v)
    assert inside.dtype == (torch.bfloat16 if kind is StoredWeights else torch.float32)  # kernels have their own dtype
    exact = [wide(x) for x in (*leaves, v)]
    out = AttentionWeights(*exact[:4], backend="eager").aggregate(exact[4])
    wanted = gradients([out, out], exact)
    for actual, expected in zip(gradients([outside, inside], [*leaves, v]), wanted, strict=True):
        assert relative(actual, expected) < TOLERANCE[torch.bfloat16]


# ---- one backward pass after another ----


def layer(leaves, others=None, penalty=0.0):
    """Outputs of all uses on stored weights, and all leaves."""
    others = others or all_values()
    weights = cpu_weights(leaves, padding(BATCH, 45, "cpu"), None, penalty, 1.0)
    return as_a_layer(weights, *others), [*leaves, *others]


def test_uses_leave_their_factors(kind):
    """What the tests below are about."""
    assert type(cpu_weights(scores()).held) is kind
    (first, second, gated, apart), _ = layer(scores())
    assert type(first.grad_fn.next_functions[0][0]).__name__ == "_AverageBackward"
    assert type(second.grad_fn.next_functions[0][0]).__name__ == "_AverageBackward"
    assert type(gated.grad_fn).__name__ == "_GatedAverageBackward"
    assert type(apart.grad_fn).__name__ == "_GatedAverageBackward"


def test_passes_over_a_graph_repeat_bit_for_bit():
    outs, leaves = layer(scores(), penalty=0.3)
    first, second = (gradients(outs, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("wanted", ["values", "q", "one use"])
def test_a_pass_over_a_part_of_the_graph_adds_nothing_to_the_next(wanted):
    outs, leaves = layer(scores())
    expected = gradients(outs, leaves, retain_graph=True)
    for _ in range(2):
        if wanted == "one use":
            gradients(outs[:1], leaves[:5], retain_graph=True)
        else:
            part = gradients(outs, leaves[4:] if wanted == "values" else leaves[:1], retain_graph=True)
            assert all(map(torch.equal, part, expected[4:] if wanted == "values" else expected[:1]))
    assert all(map(torch.equal, gradients(outs, leaves), expected))


def test_a_pass_that_fails_adds_nothing_to_the_next():
    leaves, v = scores(), values()
    weights = cpu_weights(leaves)
    weights.held.pieces()  # made before the values are cut by head, whose gradient then comes first
    doubled = weights.aggregate(v) * 2
    expected = gradients([doubled], leaves, retain_graph=True)

    def fail(grad):
        raise ArithmeticError

    handle = v.register_hook(fail)
    with pytest.raises(ArithmeticError):
        gradients([doubled], [*leaves, v], retain_graph=True)
    handle.remove()
    assert all(map(torch.equal, gradients([doubled], leaves), expected))


def test_passes_from_two_losses_add_up():
    outs, leaves = layer(scores())
    for out in outs:
        out.square().sum().backward(retain_graph=True)
    for leaf, expected in zip(leaves, torch.autograd.grad(sum(o.square().sum() for o in outs), leaves), strict=True):
        assert relative(leaf.grad, expected) < TOLERANCE[torch.float64]


def test_a_pass_inside_another():
    """A hook that runs a backward pass of its own over the same weights, between a use and the weights."""
    leaves, v, other = scores(), values(), values()
    weights = cpu_weights(leaves)
    weights.held.pieces()  # as above
    out, inner = weights.aggregate(v), weights.aggregate(other).sum()
    expected = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    expected_inside = torch.autograd.grad(inner, leaves, retain_graph=True)
    inside = []
    v.register_hook(lambda grad: inside.extend(torch.autograd.grad(inner, leaves, retain_graph=True)))
    *actual, _ = torch.autograd.grad(out.square().sum(), [*leaves, v])
    assert all(map(torch.equal, actual, expected))
    assert all(map(torch.equal, inside, expected_inside))


def test_gradients_can_be_differentiated():
    leaves = [x.detach().requires_grad_() for x in weights_inputs(5, 5, 1, 2, 3, 2, torch.float64, "cpu")]
    others = [torch.randn(5, 1, width, dtype=torch.float64, requires_grad=True) for width in (4, 6)]

    def function(q, k, p, e, v, projected):
        weights = cpu_weights((q, k, p, e), torch.arange(5)[None] > 3, ChunkMask(2, 1))
        gated = nonlin_attention(weights[0:1], *projected.chunk(3, dim=2))
        return weights.aggregate(v), gated, weights.materialize()

    assert torch.autograd.gradcheck(function, (*leaves, *others))
    assert torch.autograd.gradgradcheck(function, (*leaves, *others))


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_gradients_are_the_same_with_a_graph_of_them(penalty):
    outs, leaves = layer(scores(), penalty=penalty)
    plain, again = (gradients(outs, leaves, retain_graph=True, create_graph=graph) for graph in (False, True))
    last = gradients(outs, leaves)
    for a, b, c in zip(plain, again, last, strict=True):
        assert b.requires_grad
        assert relative(b, a) < TOLERANCE[torch.float64]
        assert torch.equal(c, a)


@pytest.mark.parametrize("around", ["weights and uses", "uses alone"])
def test_checkpointing_changes_no_gradient(around):
    leaves, others = scores(), all_values()
    expected = gradients(*layer(leaves, others))

    def uses(weights, *others):
        return tuple(as_a_layer(weights, *others))

    masks = (padding(BATCH, 45, "cpu"),)
    if around == "uses alone":
        weights = cpu_weights(leaves, *masks)
        weights.held.pieces()  # made outside
        outs = checkpoint(uses, weights, *others, use_reentrant=False)
    else:
        function = lambda *args: uses(cpu_weights(args[:4], *masks), *args[4:])  # noqa: E731
        outs = checkpoint(function, *leaves, *others, use_reentrant=False)
    assert all(map(torch.equal, gradients(outs, [*leaves, *others]), expected))


@pytest.mark.parametrize("wanted", [n for k in range(4) for n in itertools.combinations(range(4), k)], ids=str)
def test_only_wanted_gradients(wanted):
    """Of some of q, k, p, e and of the values; with none of the four the weights are constants."""
    leaves, others = scores(), all_values()
    everything = gradients(*layer(leaves, others))
    some = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(leaves)]
    outs, _ = layer(some, others)
    actual = gradients(outs, [*(some[i] for i in wanted), *others])
    expected = [*(everything[i] for i in wanted), *everything[4:]]
    for mine, other in zip(actual, expected, strict=True):
        assert relative(mine, other) < TOLERANCE[torch.float64]


def test_frozen_values():
    leaves, others = scores(), all_values()
    expected = gradients(*layer(leaves, others))[:4]
    outs, _ = layer(leaves, [x.detach() for x in others])
    assert all(map(torch.equal, gradients(outs, leaves), expected))


def test_changes_in_place_are_noticed():
    leaves, v = scores(), values()
    for i in range(5):
        out = cpu_weights(leaves).aggregate(v)
        with torch.no_grad():
            [*leaves, v][i].mul_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients([out], [*leaves, v])


# ---- memory and threads ----


class Allocations(TorchDispatchMode):
    """The elements of each tensor that torch's operations return in memory of its own."""

    def __init__(self):
        super().__init__()
        self.seen, self.elements = set(), []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if torch.is_tensor(x):
                self.seen.add(x.untyped_storage().data_ptr())
        results = operation(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in self.seen:
                self.elements.append(x.untyped_storage().nbytes() // x.element_size())
        return results


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_backward_makes_nothing_as_large_as_the_weights(penalty):
    largest = {}
    for name in ("cpu", "eager"):
        leaves, others = scores(120), all_values(120)
        weights = AttentionWeights(*leaves, None, None, penalty, 1.0, backend=name)
        outs = as_a_layer(weights, *others)
        with unseen(Allocations()) as made:
            gradients(outs, [*leaves, *others])
        largest[name] = max(made.elements)
    assert largest["cpu"] < BATCH * 120 * 120  # the weights of one head
    assert largest["eager"] >= HEADS * BATCH * 120 * 120


@pytest.mark.parametrize("wanted", [slice(None), slice(1), slice(4, None)], ids=["all", "q", "values"])
def test_nothing_is_left_of_a_pass(wanted):
    """Whatever gradients it is asked for, while the graph is retained."""
    outs, leaves = layer(scores())
    uses = uses_of(outs)
    assert uses
    gradients(outs, leaves[wanted], retain_graph=True)
    assert not any(use.left for use in uses)


def uses_of(outs):
    """Where the uses in the graph of the outputs leave what they do."""
    found, nodes = [], [out.grad_fn for out in outs]
    while nodes:
        node = nodes.pop()
        uses = getattr(node, "uses", None)  # of the node that made the weights
        found += uses if isinstance(uses, list) else [uses] if isinstance(uses, deferred.Uses) else []
        nodes += [following for following, _ in node.next_functions if following is not None]
    return found


def test_gradients_of_scores_do_not_depend_on_the_threads():
    """Those of one forward pass, whose products are torch's."""
    leaves, others = scores(400, dtype=torch.float32, batch=1), [values(400, torch.float32, batch=1)]
    others.append(values(400, torch.float32, heads=1, batch=1, channels=15))
    weights = cpu_weights(leaves, None, None, 0.3, 1.0)
    outs = [weights.aggregate(others[0]), nonlin_attention(weights[0:1], *split(others[1], [CHANNELS] * 3))]
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            runs.append(gradients(outs, leaves, retain_graph=True))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *runs))
