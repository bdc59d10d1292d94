"""Models built from upstream's classes, before and after `convert`, and back."""

import copy
import inspect
import os
import pickle
import random
import subprocess
import sys

import parity
import pytest
import torch
import upstream
from draws import seed_all, set_batch_count
from test_streaming import feed
from tolerances import PARITY, assert_parity
from torch import nn
from upstream_models import CAUSAL, Model, assert_same_run, batch, build, icefall, is_upstream, snapshot

from zipformer_kernels import modules, training
from zipformer_kernels.convert import ORIGINAL, convert, revert
from zipformer_kernels.convert.known import KNOWN
from zipformer_kernels.convert.rows import ROWS
from zipformer_kernels.modules.encoder import Zipformer

ATTENTION = {
    "Zipformer",
    "ZipformerEncoder",
    "DownsampledZipformerEncoder",
    "ZipformerEncoderLayer",
    "RelPositionMultiheadAttentionWeights",
    "SelfAttention",
    "NonlinAttention",
}
CLASSES = {
    "swoosh": {"SwooshL", "SwooshR"},
    "bias_norm": {"BiasNorm"},
    "swoosh_linear": {"ActivationDropoutAndLinear"},
    "attention": ATTENTION,
    "nonlin_attention": ATTENTION,
}


def assert_identical(before, after):
    """The very same objects, under the same names."""
    assert before.keys() == after.keys()
    for path, (cls, attributes, held) in before.items():
        assert after[path][0] is cls, path
        for old, new in zip([attributes, *held], [after[path][1], *after[path][2]], strict=True):
            assert list(old) == list(new) or set(old) == set(new), path
            assert all(old[name] is new[name] for name in old), path


@pytest.mark.parametrize("config", [{}, CAUSAL], ids=["offline", "causal"])
def test_every_module_is_swapped_and_nothing_else_changes(config):
    model = build(**config)
    model.encoder.encoders[0].eval()
    model.encoder.downsample_output.bias.requires_grad_(False)
    before, state = snapshot(model), model.state_dict()
    theirs = [path for path, module in model.named_modules() if is_upstream(module)]
    report = convert(model)
    assert [path for path, _ in report.swapped] == theirs
    assert report.not_swapped == report.kept == []
    assert not [path for path, module in model.named_modules() if is_upstream(module)]
    after = snapshot(model)
    assert after.keys() == before.keys()
    for path, (cls, attributes, held) in before.items():
        assert after[path][0].__name__ == cls.__name__
        assert after[path][2] == held
        assert after[path][1]["training"] == attributes["training"]
    assert state.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert value.data_ptr() == state[key].data_ptr(), key


def test_table_is_complete():
    """Every module of ours is in the table, and the table's examples are what it says."""
    public = [getattr(module, name) for module in (modules, training) for name in module.__all__]
    wanted = {cls.__name__ for cls in public if inspect.isclass(cls) and issubclass(cls, nn.Module)}
    assert wanted | {"Zipformer", "Identity"} == set(ROWS) == set(KNOWN)
    for name, row in ROWS.items():
        assert type(row.example).__name__ == name


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("ops", [None, *([op] for op in CLASSES), ["swoosh", "bias_norm"]], ids=str)
def test_outputs_gradients_and_draws(ops, train):
    """With everything swapped, or only the modules of some ops."""
    model = build(**CAUSAL).train(train)
    theirs = copy.deepcopy(model)
    report = convert(model, ops)
    swapped = {name for _, name in report.swapped}
    if ops is not None:
        assert swapped == set().union(*(CLASSES[op] for op in ops))
    assert {type(m).__name__ for m in model.modules() if not is_upstream(m)} >= swapped
    assert report.not_swapped == []
    for seed in range(4):
        assert_same_run(model, theirs, batch(), seed=seed)


def test_float32():
    model = build(dtype=torch.float32).eval()
    theirs = copy.deepcopy(model)
    convert(model)
    with torch.no_grad():
        assert_same_run(model, theirs, batch(torch.float32))


def test_positional_encoding_after_half_precision():
    """Upstream keeps its table in the dtype of its last input; ours makes a table of its own."""
    model = build()
    theirs = copy.deepcopy(model).eval()
    model.eval().bfloat16()(*batch(torch.bfloat16))
    model.load_state_dict(theirs.state_dict())
    model.double().load_state_dict(theirs.state_dict())
    convert(model)
    assert_same_run(model, theirs, batch())


def test_streaming():
    model = build(causal=True, chunk_size=(8,), left_context_frames=(16,)).eval()
    theirs = copy.deepcopy(model)
    convert(model)
    x, x_lens = torch.randn(24, 2, 16, dtype=torch.float64), torch.tensor([24, 19])
    for ours, expected in zip(feed(model.encoder, x, x_lens), feed(theirs.encoder, x, x_lens), strict=True):
        for a, b in zip([*ours[:2], *ours[2]], [*expected[:2], *expected[2]], strict=True):
            assert_parity(a, b, PARITY[torch.float64], "chunk")


def train(model, optimizer, batches, first):
    for step, args in enumerate(batches, first):
        set_batch_count(model, 3000.0 + step)
        optimizer.zero_grad()
        with upstream.wide():
            model(*args)[0].square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("there_and_back", [False, True], ids=["converted", "converted and reverted"])
def test_training_goes_on_with_the_same_optimizer(there_and_back):
    """Nine steps from one seed, the model swapped after three (and back after six)."""
    model = build(**CAUSAL).train()
    theirs = copy.deepcopy(model)
    batches = [batch() for _ in range(9)]
    ends = []
    for current in (model, theirs):
        optimizer = torch.optim.Adam(current.parameters(), lr=1e-3)
        seed_all(3)
        train(current, optimizer, batches[:3], 0)
        if current is model:
            assert convert(model).swapped
        train(current, optimizer, batches[3:6], 3)
        if current is model and there_and_back:
            revert(model)
        train(current, optimizer, batches[6:], 6)
        ends.append((random.getstate(), torch.get_rng_state()))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])
    for (name, ours), expected in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-8, atol=1e-10), name


def test_checkpoints_go_to_and_fro():
    model, theirs = build(), build()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    convert(model)
    assert list(model.state_dict()) == list(theirs.state_dict())
    model.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(model.state_dict(), strict=True)
    assert_same_run(model.eval(), theirs.eval(), batch())


def test_hooks_stay():
    model = build().eval()
    calls = []
    weights = model.encoder.encoders[0].layers[0].self_attn_weights
    weights.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    convert(model)
    model(*batch())
    assert calls == [modules.RelPositionMultiheadAttentionWeights]


def test_revert_restores_every_object():
    model = build(**CAUSAL).train()
    theirs, before = copy.deepcopy(model), snapshot(model)
    report = convert(model)
    reverted = revert(model)
    assert (reverted.swapped, reverted.not_swapped) == (report.swapped, [])
    assert (report.layers, reverted.layers) == ((4, 4), (0, 4))
    assert_identical(before, snapshot(model))
    assert_same_run(model, theirs, batch())
    assert revert(model).swapped == []


def test_deepcopy_and_its_revert():
    model = build()
    convert(model)
    twin = copy.deepcopy(model)
    assert_same_run(twin, model, batch())
    swapped = revert(twin).swapped
    assert swapped
    assert all(is_upstream(twin.get_submodule(path)) for path, _ in swapped)
    assert not any(is_upstream(module) for module in model.modules())
    assert_same_run(model, twin, batch())


def test_pickle_needs_no_upstream(monkeypatch):
    model = build(**CAUSAL).eval()
    convert(model)
    pickled = pickle.dumps(model)
    for name in [name for name in sys.modules if name.split(".")[0] == "zipformer"]:
        monkeypatch.setitem(sys.modules, name, None)
    loaded = pickle.loads(pickled)
    assert_same_run(loaded, model, batch())
    report = revert(loaded)
    assert not report.swapped
    assert {reason for _, _, reason in report.not_swapped} == {"it was pickled since it was swapped"}


def test_twice_is_once():
    model = build()
    convert(model, ["bias_norm"])
    first = convert(model)
    assert "BiasNorm" not in {name for _, name in first.swapped}
    second = convert(model)
    assert (second.swapped, second.not_swapped) == ([], [])
    assert str(second) == "swapped: 0\nnot swapped: 0\n4 of 4 encoder layers are ours"
    assert len(revert(model).swapped) > len(first.swapped)


def test_our_models_are_left_alone():
    model = Model(modules.Conv2dSubsampling, Zipformer)
    before = snapshot(model)
    report = convert(model)
    assert (report.swapped, report.not_swapped) == ([], [])
    assert_identical(before, snapshot(model))


@pytest.mark.parametrize("root", [upstream.scaling.SwooshL, lambda: upstream.scaling.BiasNorm(7)])
def test_the_model_itself_is_swapped(root):
    model = root().double()
    theirs = copy.deepcopy(model)
    assert convert(model).swapped == [("", type(theirs).__name__)]
    assert not is_upstream(model)
    assert_same_run(model.train(), theirs.train(), [torch.randn(5, 7, dtype=torch.float64)])


def test_inside_a_sequential_and_in_two_places():
    norm = upstream.scaling.BiasNorm(6)
    model = nn.Sequential(nn.Linear(6, 6), norm, upstream.scaling.SwooshR(), norm).double()
    theirs = copy.deepcopy(model)
    assert convert(model).swapped == [("1", "BiasNorm"), ("2", "SwooshR")]
    assert model[1] is norm
    assert model[3] is norm
    assert type(model[2]) is modules.SwooshR
    assert_same_run(model, theirs, [torch.randn(5, 6, dtype=torch.float64)])


def test_inside_distributed_data_parallel():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = build().train()
        theirs = copy.deepcopy(model)
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        report = convert(parallel)
        assert report.swapped[0] == ("module.encoder_embed", "Conv2dSubsampling")
        assert not report.not_swapped
        args = batch()
        for seed in range(3):
            with upstream.wide():
                expected, *their_draws = parity.run(theirs, seed, args)
            actual, *our_draws = parity.run(parallel, seed, args)
            actual = {name.replace("of module.", "of "): value for name, value in actual.items()}
            assert actual.keys() == expected.keys()
            for name, value in expected.items():
                assert_parity(actual[name], value, PARITY[torch.float64], name)
            assert our_draws[0] == their_draws[0]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("config", [{}, CAUSAL], ids=["offline", "causal"])
def test_icefall_layout(config):
    """Another base class and other names: everything is swapped all the same."""
    with icefall() as recipe:
        model = build(recipe.subsampling, recipe.zipformer, **config)
        for module in model.modules():
            assert not is_upstream(module) or type(module).__module__ in ("scaling", "subsampling", "zipformer")
        assert type(model.encoder).__mro__[1].__name__ == "EncoderInterface"
        theirs, before = copy.deepcopy(model), snapshot(model)
        report = convert(model)
        assert not report.not_swapped
        assert report.layers == (4, 4)
        names = {name for _, name in report.swapped}
        assert {"Zipformer2", "Zipformer2Encoder", "DownsampledZipformer2Encoder", "Zipformer2EncoderLayer"} < names
        assert not any(is_upstream(module) for module in model.modules())
        for seed in range(2):
            assert_same_run(model.train(), theirs.train(), batch(), seed=seed, recipe=recipe)
        revert(model)
        assert before["encoder"][0] is type(model.encoder)
        assert not any(hasattr(module, ORIGINAL) for module in model.modules())


IMPORTS = """
import sys
import upstream_models
model = upstream_models.build(**upstream_models.CAUSAL)
before = set(sys.modules)
from zipformer_kernels import convert
assert convert(model).layers == (4, 4)
model.eval()(*upstream_models.batch())
print(*sorted(set(sys.modules) - before))
"""


def test_nothing_is_imported_that_is_not_needed(tmp_path):
    """Such as torch.compile, which takes a second, and takes a recipe's own profile.py for the standard library's."""
    (tmp_path / "profile.py").write_text("raise ImportError('this is the profile.py of a recipe')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    env = os.environ | {"PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", IMPORTS], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert not [name for name in run.stdout.split() if not name.startswith("zipformer_kernels")]
