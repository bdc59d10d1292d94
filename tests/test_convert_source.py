"""`convert` recognises classes by what their source does: known versions, edits, and what makes no difference."""

import copy
import functools
import random
import re

import pytest
import torch
import upstream
from torch import nn
from upstream_models import CAUSAL, assert_same_run, batch, build, icefall, snapshot

from zipformer_kernels.convert import convert
from zipformer_kernels.convert.__main__ import main
from zipformer_kernels.convert.digest import Digests, methods

# Versions that are around, as edits of the one on PyPI.
OLD_RULE = (
    "elif self.training and random.random() < float(self.const_attention_rate)",
    "elif not self.training and random.random() < float(self.const_attention_rate)",
)
NO_CAUSAL = (
    ("        self.causal = causal\n        self.bias = ", "        self.bias = "),
    (
        "if self.causal and torch.jit.is_tracing():\n            assert pad",
        "if torch.jit.is_tracing():\n            assert pad",
    ),
    ("if not self.causal or not torch.jit.is_tracing():\n", "if True:\n"),
)
LENGTHS = """        assert self.output_downsampling_factor == 2, self.output_downsampling_factor
        if torch.jit.is_scripting() or torch.jit.is_tracing():
            lengths = (x_lens + 1) // 2
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lengths = (x_lens + 1) // 2
"""
OUTPUT = f"""        x = self.downsample_output(x)
        # class Downsample has this rounding behavior..
{LENGTHS}
        return x, lengths
"""
FULL_RATE = (OUTPUT, "        return x, x_lens\n")
PERHAPS_FULL_RATE = f"""        if self.output_downsampling_factor == 1:
            lengths = x_lens
        else:
            x = self.downsample_output(x)
{re.sub("^", "    ", LENGTHS, flags=re.MULTILINE).rstrip()}
"""
OF_A_STACK = (
    OUTPUT,
    PERHAPS_FULL_RATE
    + """        if self.st_output_layer:
            return x, lengths, outputs[self.st_output_layer]
        else:
            return x, lengths
""",
)
ALWAYS_THREE = (OUTPUT, OUTPUT.replace("return x, lengths", "return x, lengths, outputs[0]"))


def check(edits, kept=(), config=CAUSAL, seeds=2, prepare=lambda model: None):
    """A model of edited sources does the same when it is converted; these classes are not swapped, the rest is."""
    with icefall(*edits) as recipe:
        for train in (True, False):
            model = build(recipe.subsampling, recipe.zipformer, **config).train(train)
            prepare(model)
            theirs = copy.deepcopy(model)
            report = convert(model)
            assert {name for _, name, _ in report.not_swapped} == set(kept)
            assert report.layers == ((0 if "Zipformer2EncoderLayer" in kept else 4), 4)
            for seed in range(seeds):
                assert_same_run(model, theirs, batch(), seed=seed, recipe=recipe)
    return report


def test_the_old_rule_for_constant_attention():
    check([OLD_RULE])


def test_the_old_rule_holds_where_the_rate_is_not_zero_in_evaluation():
    """Upstream then draws constant attention in evaluation, and only there."""

    def prepare(model):
        for module in model.modules():
            if hasattr(module, "const_attention_rate"):
                module.const_attention_rate = type(module.const_attention_rate)((0.0, 0.5), default=0.5)

    check([OLD_RULE], prepare=prepare)


def test_no_causal_in_downsampling():
    check(NO_CAUSAL)


def test_output_at_the_full_rate():
    check([FULL_RATE])


def test_two_results_where_three_could_be():
    check([OF_A_STACK], prepare=lambda model: setattr(model.encoder, "st_output_layer", None))


@pytest.mark.parametrize("edit", [OF_A_STACK, ALWAYS_THREE], ids=["when asked", "always"])
def test_three_results(edit):
    with icefall(edit) as recipe:
        encoder = build(recipe.subsampling, recipe.zipformer, **CAUSAL).encoder.eval()
        encoder.st_output_layer = 1
        theirs = copy.deepcopy(encoder)
        report = convert(encoder)
        assert [(path, name) for path, name, _ in report.not_swapped] == [("", "Zipformer2")]
        assert report.layers == (4, 4)
        args = torch.randn(20, 1, 16, dtype=torch.float64), torch.tensor([20])
        assert_same_run(encoder, theirs, args, recipe=recipe)


FORWARD = (
    "        src = src + self.feed_forward1(src)\n\n        self_attn_dropout_mask",
    "        src = src + 0.5 * self.feed_forward1(src)\n\n        self_attn_dropout_mask",
)
HELPER = "return SoftmaxFunction.apply(x, dim)", "return SoftmaxFunction.apply(x, dim) * 0.5"
BACKWARD = "return grad * ctx.alpha, None", "return grad, None"

# Edits of one line each, and the class that each changes.
METHODS = {
    "ZipformerEncoderLayer": FORWARD,
    "NonlinAttention": ("x = torch.matmul(attn_weights, x_pad)", "x = torch.matmul(attn_weights, x_pad) * 2"),
    "Zipformer": ("torch.logical_or(src_c > tgt_c,", "torch.logical_or(src_c >= tgt_c,"),  # in a private method
    "CompactRelPositionalEncoding": (
        "x: torch.Tensor, left_context_len: int = 0) -> torch.Tensor",
        "x: torch.Tensor, left_context_len: int = 1) -> torch.Tensor",
    ),
    "SelfAttention": (
        "class SelfAttention(torch.nn.Module):",
        "class Base(torch.nn.Module):\n    def __call__(self, *args):\n        return 2 * super().__call__(*args)\n\n\n"
        "class SelfAttention(Base):",
    ),
    "BypassModule": (
        "    def forward(self, src_orig:",
        "    def scale(self):\n        return self.bypass_scale\n\n    def forward(self, src_orig:",
    ),
}
HELPERS = {
    "RelPositionMultiheadAttentionWeights": HELPER,
    "ScaleGrad": BACKWARD,
    "SwooshL": (  # in a function that its objects hold
        "return logaddexp(zero, x - 4.0) - 0.08 * x - 0.035\n\n\ndef _swooshr(",
        "return logaddexp(zero, x - 4.0) - 0.08 * x\n\n\ndef _swooshr(",
    ),
    "ScheduledFloat": ("return self.pairs[0][1]", "return 2 * self.pairs[0][1]"),  # in an object that its objects hold
    "Whiten": (
        "metric = _whitening_metric(x_detached, w.num_groups)",
        "metric = 2 * _whitening_metric(x_detached, w.num_groups)",
    ),
}
DEEPER = {
    "RelPositionMultiheadAttentionWeights": ("x_grad = x_grad - ans * x_grad.sum(", "x_grad = x_grad - x_grad.sum("),
    "BiasNorm": ("prob: float = 0.6", "prob: float = 0.5"),
    "BypassModule": ("prob: float = 0.6", "prob: float = 0.5"),
}
NOTHING = (
    ("        x = self.out_proj(x)\n", "        # The last product.\n        x = self.out_proj(x)\n"),
    ("Downsample, go through encoder, upsample.", "Slow down and up again."),
    ("selected_attn_weights", "chosen"),
    ("limit_param_value", "kept_within"),
    ("_get_bypass_scale", "_scale_of"),
    (") -> torch.Tensor:", "):"),
    ("ScheduledFloat: name=", "schedule "),
    ("        assert src.shape[0] == d_seq_len * ds, (src.shape, d_seq_len, ds)\n", ""),
    (
        "if torch.jit.is_scripting() or torch.jit.is_tracing():\n"
        "            attention_skip_rate = 0.0\n        else:\n",
        "if True:\n",
    ),
    ("torch.nn.functional.", "nn.functional."),
    ("import torch\n", "import torch\nfrom torch import nn\n"),
)
MADE = {"SwooshL": (), "ScheduledFloat": ((0.0, 0.5), (10.0, 0.0))}


def digests_of(recipe):
    """Those of every class, and of what an object of it holds where it holds functions or other objects."""
    modules = (recipe.scaling, recipe.subsampling, recipe.zipformer)
    classes = {n: c for m in modules for n, c in vars(m).items() if isinstance(c, type) and issubclass(c, nn.Module)}
    return {
        name: Digests().of(cls(*MADE[name])) if name in MADE else dict(methods(cls)) for name, cls in classes.items()
    }


@functools.cache
def unedited():
    with icefall() as recipe:
        return digests_of(recipe)


@pytest.mark.parametrize(
    "edits", [METHODS, HELPERS, DEEPER, {}], ids=["methods", "helpers", "helpers of helpers", "nothing"]
)
def test_what_edits_change(edits):
    with icefall(*dict.fromkeys(edits.values() if edits else NOTHING)) as recipe:
        found = digests_of(recipe)
    assert all(digest is not None for of_class in found.values() for digest in of_class.values())
    changed = {
        name.replace("Zipformer2", "Zipformer") for name, of_class in unedited().items() if found[name] != of_class
    }
    assert changed == edits.keys()


def test_an_edited_class_is_kept():
    report = check(
        [FORWARD, HELPER, BACKWARD], ["Zipformer2EncoderLayer", "RelPositionMultiheadAttentionWeights", "ScaleGrad"]
    )
    assert {name: reason for _, name, reason in report.not_swapped}["Zipformer2EncoderLayer"] == (
        "its forward is none of the known versions of ZipformerEncoderLayer; "
        "if it does the same, pass trust=['Zipformer2EncoderLayer']"
    )


def test_who_insists_gets_it():
    edit = FORWARD[0], FORWARD[1].replace("0.5", "1.0")
    with icefall(edit) as recipe:
        model = build(recipe.subsampling, recipe.zipformer)
        assert convert(model, trust=[recipe.zipformer.SelfAttention]).layers == (0, 4)
        report = convert(model, trust=["Zipformer2EncoderLayer"])
        assert (report.not_swapped, report.layers) == ([], (4, 4))


def test_methods_replaced_on_the_class(monkeypatch):
    """What runs counts, not what the file says."""
    forward = upstream.scaling.BiasNorm.forward

    @functools.wraps(forward)
    def doubled(self, x):
        return 2 * forward(self, x)

    assert convert(upstream.scaling.BiasNorm(4)).swapped
    monkeypatch.setattr(upstream.scaling.BiasNorm, "forward", doubled)
    assert [kept[1] for kept in convert(upstream.scaling.BiasNorm(4)).not_swapped] == ["BiasNorm"]


SOURCE = """
from torch import nn

class Identity(nn.Module):
    SCALE = 1.0

    def forward(self, x):
        return x * self.SCALE
"""


def imported(path, text):
    path.write_text(text)
    namespace = {"__name__": "a_file"}
    exec(compile(text, str(path), "exec"), namespace)
    return namespace["Identity"]


def test_constants_of_classes_count(tmp_path):
    first = methods(imported(tmp_path / "a.py", SOURCE))
    second = methods(imported(tmp_path / "b.py", SOURCE.replace("1.0", "2.0")))
    assert first["forward"] is not None
    assert first != second


def test_a_file_that_changed_since_it_was_imported(tmp_path):
    cls = imported(tmp_path / "a.py", SOURCE)
    (tmp_path / "a.py").write_text(SOURCE.replace("x * self", "x + self"))
    assert methods(cls) == {"forward": None}


STREAM = "x = torch.matmul(attn_weights, x_pad)", "x = torch.matmul(attn_weights, x_pad) * 2"
DRAW = "if self.training and random.random() < 0.1", "if self.training and random.random() < 0.1 + random.random()"


def converted_without_source(*edits, path=""):
    """A model, or the part of it at a path, whose source cannot be had, and the report of its conversion."""
    with icefall(*edits, with_source=False) as recipe:
        model = build(recipe.subsampling, recipe.zipformer, dtype=torch.float32, **CAUSAL).get_submodule(path)
        drawn = random.getstate(), torch.get_rng_state()
        report = convert(model)
        assert random.getstate() == drawn[0]
        assert torch.equal(torch.get_rng_state(), drawn[1])
    return model, report


def test_a_small_run_finds_what_is_another_where_no_source_can_be_had():
    _, report = converted_without_source(FORWARD, BACKWARD, STREAM, DRAW)
    differ = "its source cannot be had, and a trial run in {} disagrees: {}"
    reasons = {name: reason for _, name, reason in report.not_swapped}
    for name, mode, what in (
        ("Zipformer2EncoderLayer", "evaluation", "results differ by"),
        ("NonlinAttention", "evaluation", "results differ by"),
        ("ScaleGrad", "training", "gradients: results differ by"),
        ("RelPositionMultiheadAttentionWeights", "training", "random numbers are drawn otherwise"),
    ):
        assert reasons.pop(name).startswith(differ.format(mode, what)), name
    assert not reasons


def test_a_small_run_finds_the_version_where_no_source_can_be_had():
    layer, report = converted_without_source(OLD_RULE, path="encoder.encoders.0.layers.0")
    assert (report.not_swapped, report.layers) == ([], (1, 1))
    assert not layer.const_attention_in_training


def test_a_run_on_a_batch_agrees():
    model = build(**CAUSAL).train()
    report = convert(model, check=batch())
    assert re.fullmatch(r"outputs agree to \d\.\de-1\d of their RMS", report.check)
    assert f"check: {report.check}" in str(report)
    assert all(module.training for module in model.modules())
    names = dict(zip(("x", "x_lens"), batch(), strict=True))
    assert convert(build(), check=names).check.startswith("outputs agree")


def test_a_run_on_a_batch_that_differs_brings_all_back():
    with icefall(FORWARD) as recipe:
        model = build(recipe.subsampling, recipe.zipformer)
        convert(model, ["bias_norm"])
        before = snapshot(model)
        report = convert(model, check=batch(), trust=["Zipformer2EncoderLayer"])
        assert report.check.startswith("everything was swapped back: results differ by")
        assert (report.swapped, report.layers) == ([], (0, 4))
        after = snapshot(model)
        assert {path: (of[0], of[2]) for path, of in after.items()} == {
            path: (of[0], of[2]) for path, of in before.items()
        }


def test_a_batch_that_the_model_refuses_leaves_it_whole():
    model = build()
    before = snapshot(model)
    with pytest.raises(TypeError):
        convert(model, check=(1, 2, 3, 4))
    assert snapshot(model).keys() == before.keys()
    assert all(type(m) is before[path][0] for path, m in model.named_modules())
    with pytest.raises(TypeError, match=r"check: wanted the model's arguments in a tuple or a dict, got Tensor"):
        convert(model, check=torch.zeros(3))


def test_digests_of_a_file_are_printed(capsys):
    main([upstream.subsampling.__file__])
    lines = [line.split()[1:] for line in capsys.readouterr().out.splitlines()]
    assert ["ConvNeXt", "forward", methods(upstream.subsampling.ConvNeXt)["forward"], "known", "ConvNeXt"] in lines
