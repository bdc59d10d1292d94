"""Models whose linear layers torchao quantizes give what upstream's give, quantized alike."""

import functools
from unittest import mock

import pytest
import torch
import upstream_models
from draws import seed_all, set_batch_count
from tolerances import PARITY, assert_agrees
from upstream_models import BINS, build

from zipformer_kernels import Conv2dSubsampling, Zipformer2, convert

pytest.importorskip("torchao", reason="torchao is not installed: pip install --no-deps torchao==0.18.0")
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

CHUNKS = {"causal": True, "chunk_size": (2,), "left_context_frames": (8,)}
CONFIGS = {"weights": Int8WeightOnlyConfig, "activations too": Int8DynamicActivationInt8WeightConfig}


def quantized(model, config):
    quantize_(model, CONFIGS[config]())
    return model


def ours_alone():
    """A model of our classes, with the weights of upstream's."""
    model = upstream_models.Model(Conv2dSubsampling, Zipformer2, **CHUNKS)
    model.load_state_dict(build(dtype=torch.float32, **CHUNKS).state_dict())
    set_batch_count(model, 3000.0)  # as `build`
    return model


def converted(model):
    assert convert(model).layers == (4, 4)
    return model


WAYS = {
    "ours": lambda config: quantized(ours_alone(), config),
    "converted": lambda config: converted(quantized(build(dtype=torch.float32, **CHUNKS), config)),
    "quantized after": lambda config: quantized(converted(build(dtype=torch.float32, **CHUNKS)), config),
}
"""Where a quantized model of ours comes from."""


@functools.cache
def pair(config, way):
    return WAYS[way](config).eval(), quantized(build(dtype=torch.float32, **CHUNKS), config).eval()


def noise(*shape, nudge):
    """Normal noise, in the last digits of float32 altered by a `nudge` other than 0."""
    x = torch.randn(shape)
    if nudge:
        generator = torch.Generator().manual_seed(nudge)
        x *= 1 + torch.finfo(x.dtype).eps * torch.randint(-8, 9, shape, generator=generator)
    return x


def offline(model, nudge=0):
    with torch.no_grad():
        return model(noise(2, 51, BINS, nudge=nudge), torch.tensor([51, 40]))[:1]


def with_gradients(model, nudge=0):
    x = noise(2, 51, BINS, nudge=nudge).requires_grad_()
    out, _ = model(x, torch.tensor([51, 40]))
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    return out, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)


def in_training(model, nudge=0):
    try:
        return with_gradients(model.train(), nudge)
    finally:
        model.eval()


def streamed(model, nudge=0, streams=1):
    """The results of three chunks of streams, and the last states."""
    embed, encoder = model.encoder_embed, model.encoder
    left, states, results = embed.get_init_states(streams), encoder.get_init_states(streams), []
    with torch.no_grad():
        for chunk in range(3):
            x = noise(streams, 17, BINS, nudge=nudge and nudge + chunk)
            x, lengths, left = embed.streaming_forward(x, torch.full((streams,), 17), left)
            unseen = torch.arange(8 + 2).expand(streams, -1) < 8 - 2 * chunk
            x, lengths, states = encoder.streaming_forward(x.transpose(0, 1), lengths, states, unseen)
            results.append(x)
    return *results, left, *states


RUNS = {
    "offline": offline,
    "with gradients": with_gradients,
    "in training": in_training,
    "a stream": streamed,
    "streams": functools.partial(streamed, streams=3),
}


def run(name, model, nudge=0):
    """Results of a run, and how many products of int8 it took."""
    seed_all(0)
    with mock.patch.object(torch, "_int_mm", wraps=torch._int_mm) as products:
        return RUNS[name](model, nudge), products.call_count


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RUNS)
def test_weights_of_int8(name, way):
    (ours, _), (theirs, _) = (run(name, model) for model in pair("weights", way))
    assert_agrees(ours[:1], theirs[:1], PARITY[torch.float32])
    assert_agrees(ours[1:], theirs[1:], 100 * PARITY[torch.float32])  # the gradient of the keys' bias is rounding alone


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RUNS)
def test_activations_of_int8(name, way):
    """The largest of each row, if negative, lies at the edge of two steps of int8: its last digit may move it by one.

    So results differ from upstream's as upstream's do from themselves where the input's last digits are others.
    """
    ours, theirs = pair("activations too", way)
    expected, products = run(name, theirs)
    found, our_products = run(name, ours)
    assert our_products == products > 0
    nudged = [distance(run(name, theirs, nudge)[0], expected) for nudge in range(10, 60, 10)]
    assert distance(found, expected) <= 3 * max(nudged)


def distance(results, expected):
    """The largest norm of a difference relative to that of what is expected."""
    pairs = zip(results, expected, strict=True)
    return max(((x - y).norm() / y.norm()).item() for x, y in pairs if x is not None)
