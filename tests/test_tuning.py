"""Thresholds and tile sizes: each has a source, an override reaches its use, and none lies elsewhere."""

import ast
import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lanes import HAS_GPU, lanes
from optim_steps import make_params, train
from tolerances import assert_agrees, rounding

import zipformer_kernels
from zipformer_kernels import ops
from zipformer_kernels.core import backend, tuning
from zipformer_kernels.core.launch import few_rows
from zipformer_kernels.core.op import Op
from zipformer_kernels.modules import convnext, subsampling
from zipformer_kernels.ops import scaled_adam
from zipformer_kernels.ops.attention import AttentionWeights, RecomputedWeights, StoredWeights
from zipformer_kernels.ops.attention.tiles import tile_of
from zipformer_kernels.optim import ScaledAdam

PACKAGE = Path(zipformer_kernels.__file__).parent
ROOT = PACKAGE.parent
ENTRIES = tuning.entries()
SOURCES = ("counted:", "reasoned:", "unrecorded:")

on_cpu = pytest.mark.skipif(backend.missing["cpu"] is not None, reason=f"cpu: {backend.missing['cpu']}")
in_checkout = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="no checkout")

ROOMS = ("core", "ops", "training", "branch", "modules", "optim")
HARD = {
    "PARAMETERS": "of two products",
    "PIECE": "as csrc has it",
    "_ALIGNED": "16 bytes of half precision",
    "ALIGNMENT": "as Triton has it",
    "ACCESS": "16 bytes is the most that an instruction moves",
    "BACK": "tiles are at most half as long",
    "BY_GATHER": "a name",
    "BY_LOADS": "a name",
    "BY_SLOTS": "a name",
    "COPIED": "the longest copy of a thread",
    "DTYPE_CODES": "as csrc numbers them",
    "FRONT": "tiles are at most half as long",
    "FEATURE_MASK_DROPOUT": "upstream's",
    "GROUP": "as csrc has it",
    "GROUP_PLAN": "the layout of a table",
    "KINDS": "as csrc numbers them",
    "LOG2E": "mathematics",
    "LOWEST": "no tensor's address is below",
    "MASKED_SCORE": "upstream's",
    "MIN_FRAMES": "three convolutions need them",
    "MOST_SEQUENCES": "a quotient in float32 is right so far",
    "NARROW": "as csrc has it",
    "NO_TERM": "a name",
    "OLDEST": "brought what kernels are made of",
    "(PACKED, PACKED_WIDE)": "as csrc has them",
    "PARTIAL_LINE": "as csrc has it",
    "STEP": "as csrc has it",
    "SCORE_LIMIT": "upstream's",
    "SCORE_PENALTY": "upstream's",
    "STATES_PER_LAYER": "upstream's",
    "SUMS": "the layout of a table",
    "TENSOR_PLAN": "the layout of a table",
    "TINY": "keeps quotients finite",
    "WIDEST": "the shared memory of every GPU holds so much",
    "WIDEST_FRAME": "32 bits address so much",
}
"""Numbers that may stand at the top of files of these rooms, besides references and cases."""


@pytest.fixture
def weights():
    """A function that makes small attention weights on the CPU."""
    q, k = torch.randn(6, 1, 2, 4), torch.randn(6, 1, 2, 4)
    return lambda: AttentionWeights(q, k, None, None, backend="cpu").held


# ---- the table ----


def test_names_are_unique_and_say_where():
    names = [one.name for one in ENTRIES]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z_0-9]+\.[a-z_0-9]+", name) for name in names)


@in_checkout
@pytest.mark.parametrize("one", ENTRIES, ids=lambda one: one.name)
def test_every_entry_says_what_it_is_and_where_it_comes_from(one):
    assert all((one.unit, one.what, one.device, one.source))
    files = re.findall(r"\b(?:docs|benchmarks|csrc)/[\w./-]*\w", one.source)
    assert [name for name in files if not (ROOT / name).is_file()] == []
    assert one.source.startswith(SOURCES) or one.source in files


def test_values_are_those_of_the_table_and_valid():
    assert [one.name for one in ENTRIES if one.value != one.default] == []
    with tuning.override(**{one.name: one.default for one in ENTRIES}):
        pass


def taken():
    """The names that files take entries by; an f-string counts as a pattern."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tuning.entry":
                (name,) = node.args
                parts = name.values if isinstance(name, ast.JoinedStr) else [name]
                yield "".join(re.escape(p.value) if isinstance(p, ast.Constant) else r"\w+" for p in parts)


def test_every_entry_is_used():
    used = re.compile("|".join(f"({name})" for name in taken()))
    assert [one.name for one in ENTRIES if not used.fullmatch(one.name)] == []


def numbers(node):
    """Whether an expression is numbers alone, or a collection of them."""
    if isinstance(node, ast.Dict):
        return bool(node.values) and all(map(numbers, node.values))
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return bool(node.elts) and all(map(numbers, node.elts))
    if isinstance(node, ast.BinOp):
        return numbers(node.left) and numbers(node.right)
    if isinstance(node, ast.UnaryOp):
        return numbers(node.operand)
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def constants(path):
    """The numbers that a file names at its top."""
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        while isinstance(value, ast.Call) and len(value.args) == 1:  # tl.constexpr(1)
            (value,) = value.args
        if value is not None and numbers(value):
            yield from (ast.unparse(target) for target in targets)


def test_no_number_is_tuned_elsewhere():
    paths = [path for room in ROOMS for path in sorted((PACKAGE / room).rglob("*.py"))]
    found = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in paths
        if path.name not in ("tuned.py", "reference.py", "cases.py")
        for name in constants(path)
        if name.upper() == name and name not in HARD
    }
    assert sorted(found) == []


# ---- overrides ----


@on_cpu
def test_stored_attention_weights(weights):
    assert type(weights()) is StoredWeights
    with tuning.override(**{"attention.stored_bytes": 0}):
        assert type(weights()) is RecomputedWeights
    assert type(weights()) is StoredWeights


def test_few_rows():
    x = torch.empty(5, 3, 8)
    assert few_rows(x)
    with tuning.override(**{"linear.few_rows": 14}):
        assert not few_rows(x)
    assert few_rows(x)


def test_tile_of_the_conv_embed():
    assert len(list(subsampling._tiles(1, 100))) == 1
    with tuning.override(**{"conv_embed.frames": 10}):
        assert len(list(subsampling._tiles(1, 100))) == 10


def test_tile_of_an_attention_kernel():
    with tuning.override(**{"attention.triton_score_2_bytes": (32, 16, 8, 64, 1)}):
        assert tile_of("score", torch.bfloat16).options() == {"num_warps": 8, "num_stages": 1}
    assert tile_of("score", torch.bfloat16).warps == 4


def test_blocks_within_blocks_and_after_errors():
    entry = tuning.entry("convnext.rows")
    with tuning.override(**{"convnext.rows": 5}):
        with contextlib.suppress(KeyError), tuning.override(**{"convnext.rows": 7, "linear.few_rows": 0}):
            assert convnext.ROWS.value == 7
            raise KeyError
        assert entry.value == 5
        assert tuning.entry("linear.few_rows").value == 16
    assert entry.value == entry.default


def test_an_entry_changes_by_an_override_alone():
    with pytest.raises(AttributeError):
        tuning.entry("convnext.rows").value = 5


def test_compiled_code_follows_an_override():
    function = torch.compile(lambda x: x + tuning.entry("convnext.rows").value, backend="eager", fullgraph=True)
    other = torch.compile(lambda x: x + 1 if few_rows(x) else x, backend="eager", fullgraph=True)
    x = torch.zeros(15, 2)
    assert function(x)[0, 0] == 4096
    assert other(x)[0, 0] == 1
    with tuning.override(**{"convnext.rows": 5, "linear.few_rows": 0}):
        assert function(x)[0, 0] == 5
        assert other(x)[0, 0] == 0


def smaller(one):
    """Another value of an entry, so small that small inputs are cut up."""
    if one.name.startswith("products."):  # a quarter has 16 columns at least
        return tuple(max(1, size // 2) for size in one.default)
    if isinstance(one.default, tuple):  # targets, sources, warps, channels, stages; one matrix instruction has 16
        _, sources, warps, _, _ = one.default
        return (16, min(2 * 16 if "position" in one.name else 16, sources), warps // 2, 16, 1)
    return max(one.least, one.default // 16)


SMALLER = {one.name: smaller(one) for one in ENTRIES}
OPS = [name for name in ops.names() if isinstance(ops.get(name), Op)]


def results_of(name, args):
    """Outputs and gradients."""
    outputs = ops.get(name)(*args)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    grads = [torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape) for y in outputs]
    return *outputs, *torch.autograd.grad(outputs, leaves, grads)


@on_cpu
@pytest.mark.parametrize("name", OPS)
def test_results_do_not_depend_on_tuning(name):
    """On the CPU: without a GPU the small tiles of the others take minutes."""
    with backend.use_backend("cpu"):
        for case in ops.cases_of(name):
            if case.large:
                continue
            args = case.inputs(torch.float64, "cpu")
            terms = max(x.numel() for x in args if isinstance(x, torch.Tensor))  # no sum has more
            expected = results_of(name, args)
            with tuning.override(**SMALLER):
                assert_agrees(results_of(name, args), expected, rounding(torch.float64, terms))


@pytest.mark.parametrize("lane", lanes(scaled_adam._op, *(() if HAS_GPU else ("triton", "cuda"))))
def test_steps_of_scaled_adam_do_not_depend_on_tuning(lane):
    """Within one optimizer, so that tables of steps before do not serve."""
    trained = []
    for changes in ([{}] * 4, [{}, SMALLER, {}, SMALLER]):
        with lane.active(), lane.device:
            params = make_params([(70, 30), (), (5000,), (3, 5)])
            optimizer = ScaledAdam(params)
            for i, change in enumerate(changes):
                with tuning.override(**change):
                    train(optimizer, params, 1, start=i)
        trained.append([p.detach() for p in params])
    assert_agrees(*trained, rounding(torch.float32, 5000))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("attention.stored_byte", 0, "no entry 'attention.stored_byte'; the nearest are attention.stored_bytes,"),
        ("attention.stored_bytes", -1, r"a whole number of 0 or more \(bytes\), got -1"),
        ("attention.stored_bytes", 1.5, r"wanted a whole number of 0 or more \(bytes\), got 1.5"),
        ("attention.stored_bytes", True, "got True"),
        ("convnext.rows", 0, "a whole number of 1 or more"),
        ("convnext.rows", (1, 2), r"got \(1, 2\)"),
        ("swoosh.triton_block", 1000, "a power of two"),
        ("attention.triton_score_2_bytes", 64, "5 whole numbers of 0 or more"),
        ("attention.triton_score_2_bytes", (64, 16), r"got \(64, 16\)"),
    ],
)
def test_what_cannot_be_is_named(name, value, message):
    with pytest.raises(ValueError, match=message), tuning.override(**{"linear.few_rows": 0, name: value}):
        raise AssertionError
    assert tuning.entry("linear.few_rows").value == 16


# ---- the environment variable ----


def test_text_of_the_variable():
    assert tuning.parse("") == {}
    text = "attention.stored_bytes=0, linear.few_rows = 3,attention.triton_key_4_bytes=16x32x4x32x1,"
    expected = {"attention.stored_bytes": 0, "linear.few_rows": 3, "attention.triton_key_4_bytes": (16, 32, 4, 32, 1)}
    assert tuning.parse(text) == expected
    for wrong, message in {
        "linear.few_rows": "wanted name=value,name=value, got 'linear.few_rows'",
        "linear.few_rows=many": r"linear.few_rows: wanted a whole number of 0 or more \(rows\), got 'many'",
        "linear.few=0": "no entry 'linear.few'",
    }.items():
        with pytest.raises(ValueError, match=message):
            tuning.parse(wrong)


def python(code, tuned):
    """What a process prints whose environment has the variable, and what it fails with."""
    env = {**os.environ, tuning.VARIABLE: tuned}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    return done.stdout, done.stderr


@on_cpu
def test_the_variable_reaches_every_use():
    code = """
import torch
from zipformer_kernels.core.launch import few_rows
from zipformer_kernels.modules import subsampling
from zipformer_kernels.ops import scaled_adam
from zipformer_kernels.ops.attention import AttentionWeights
q = torch.randn(6, 1, 2, 4)
held = AttentionWeights(q, q, None, None, backend="cpu").held
print(type(held).__name__, few_rows(torch.empty(5, 3, 8)), len(list(subsampling._tiles(1, 100))))
"""
    assert python(code, "")[0].split() == ["StoredWeights", "True", "1"]
    out, _ = python(code, "attention.stored_bytes=0,linear.few_rows=14,conv_embed.frames=10")
    assert out.split() == ["RecomputedWeights", "False", "10"]


def test_a_wrong_variable_raises_at_import():
    _, err = python("import zipformer_kernels.core.tuning", "linear.few=0")
    assert "ValueError: tuning has no entry 'linear.few'; the nearest are linear.few_rows" in err
