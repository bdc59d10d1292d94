"""Masks of ones: the CPU leaves their products out, and training goes as upstream's."""

import pytest
import torch
import upstream
from draws import seed_all
from parity import assert_same_run, build_pair
from test_modules_upstream import LAYER, POS_DIM, B, C, T, padding
from torch import nn

from zipformer_kernels import modules
from zipformer_kernels.modules.stack import ZipformerEncoder
from zipformer_kernels.training.randomness import all_ones

RATES = "attention_skip_rate", "conv_skip_rate", "ff2_skip_rate", "ff3_skip_rate"


def small_layer():
    return modules.ZipformerEncoderLayer(**LAYER)


class Passing(nn.Module):
    """A layer that gives back what it gets."""

    def forward(self, src, *args, **kwargs):
        return src


def stack_of_nothing():
    """A stack whose only products are those with its feature mask."""
    stack = ZipformerEncoder(small_layer(), 2, pos_dim=POS_DIM, dropout=0.0, warmup_begin=1.0, warmup_end=2.0)
    stack.layers = nn.ModuleList([Passing(), Passing()])
    return stack


def inputs():
    return torch.randn(T, B, C, dtype=torch.float64), torch.randn(1, 2 * T - 1, POS_DIM, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_only_ones_keep_all(dtype):
    ones = torch.ones(3, 1, dtype=dtype)
    assert all_ones(ones)
    assert all_ones(ones[:1].expand(3, 5))
    for other in (0.0, 2.0, torch.nan):
        assert not all_ones(torch.tensor([[1.0], [other], [1.0]], dtype=dtype))


def test_masks_are_looked_at_on_the_cpu_only_and_not_by_transforms():
    assert not all_ones(torch.ones(3, device="meta"))
    seen = []
    torch.vmap(lambda mask: seen.append(all_ones(mask)) or mask)(torch.ones(3, 2))
    assert seen == [False]


def test_a_layer_has_a_mask_where_sequences_are_dropped_and_none_where_not():
    layer, x = small_layer().train(), torch.randn(T, B, C)
    found = set()
    for seed in range(20):
        seed_all(seed)
        expected = (torch.rand(B, 1) > 0.3).float()
        seed_all(seed)
        mask = layer.get_sequence_dropout_mask(x, 0.3)
        seed_all(seed)
        y = layer.sequence_dropout(x, 0.3)
        found.add(mask is None)
        if expected.all():
            assert mask is None
            assert y is x
        else:
            assert torch.equal(mask, expected)
            assert torch.equal(y, x * expected)
    assert found == {True, False}


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.9])
def test_training_is_upstreams_with_and_without_masks(rate):
    ours, theirs = build_pair(modules.ZipformerEncoderLayer, upstream.zipformer.ZipformerEncoderLayer, **LAYER)
    for model in (ours.train(), theirs.train()):
        for name in RATES:
            delattr(model, name)
            setattr(model, name, rate)
    masks, draw = [], ours.get_sequence_dropout_mask
    ours.get_sequence_dropout_mask = lambda *args: masks.append(draw(*args)) or masks[-1]
    for seed in range(4):
        assert_same_run(ours, theirs, inputs(), {"src_key_padding_mask": padding()}, seed=seed)
    assert {mask is None for mask in masks} == {0.0: {True}, 0.2: {True, False}, 0.9: {False}}[rate]


@pytest.mark.parametrize("channels", [0, 5, C])
def test_a_stack_is_upstreams_with_a_feature_mask(channels):
    """Of zeros, of some, and of ones."""

    def pair_of(classes, layer):
        return lambda: classes.ZipformerEncoder(
            layer(**LAYER), 2, pos_dim=POS_DIM, dropout=0.1, warmup_begin=1.0, warmup_end=9.0
        )

    theirs = upstream.zipformer
    ours, theirs = build_pair(
        pair_of(modules, modules.ZipformerEncoderLayer),
        pair_of(theirs, theirs.ZipformerEncoderLayer),
    )
    mask = (torch.arange(C) < channels).double().expand(1, B, C)
    for model in (ours.train(), theirs.train()):
        model.batch_count = 0.0
    assert_same_run(ours, theirs, inputs()[:1], {"feature_mask": mask, "src_key_padding_mask": padding()})


def test_a_feature_mask_of_ones_is_not_multiplied():
    stack, src = stack_of_nothing(), torch.randn(T, B, C)
    for ones in (1.0, torch.ones(1, B, C)):
        assert stack(src, feature_mask=ones) is src
    mask = torch.ones(1, B, C)
    mask[0, 1, 3:] = 0
    assert torch.equal(stack(src, feature_mask=mask), src * mask)
    assert torch.equal(stack(src, feature_mask=0.5), src / 8)


def test_recorded_no_mask_is_looked_at():
    """What is recorded with a mask of ones holds for all masks."""
    torch._dynamo.reset()
    stack, src = stack_of_nothing(), torch.randn(T, B, C)
    compiled = torch.compile(lambda src, mask: stack(src, feature_mask=mask), fullgraph=True, backend="eager")
    for mask in (torch.ones(1, B, C), (torch.rand(1, B, C) > 0.5).float()):
        assert torch.equal(compiled(src, mask), src * mask)
    layer = small_layer().train()
    compiled = torch.compile(lambda src: layer.sequence_dropout(src, 0.3), fullgraph=True, backend="eager")
    for seed in range(5):
        seed_all(seed)
        expected = layer.sequence_dropout(src, 0.3)
        seed_all(seed)
        assert torch.equal(compiled(src), expected)
