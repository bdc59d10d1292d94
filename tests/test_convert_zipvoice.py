"""`convert` on the layers and stacks of ZipVoice, which are told a time, as edits of upstream's source."""

import copy
import re

import pytest
import torch
from test_encoder_upstream import CONFIG
from torch import nn
from upstream_models import assert_same_run, icefall, set_batch_count

from zipformer_kernels.convert import convert, revert
from zipformer_kernels.modules import TimedDownsampledEncoder, TimedEncoder, TimedEncoderLayer

ADD_TIME = "        if time_emb is not None:\n            src = src + time_emb\n\n"
RATE = """        if torch.jit.is_scripting() or torch.jit.is_tracing():
            conv_skip_rate = 0.0
        else:
            conv_skip_rate = float(self.conv_skip_rate) if self.training else 0.0
"""


def convolution(number):
    """The edit of a layer's convolution module."""
    call = f"""        src = src + self.sequence_dropout(
            self.conv_module{number}(
                src, chunk_size=chunk_size, src_key_padding_mask=src_key_padding_mask
            ),
            conv_skip_rate,
        )
"""
    timed = RATE + "\n" + ADD_TIME + call.replace("chunk_size=chunk_size, ", "")
    return RATE + call, "        if self.use_conv:\n" + re.sub("^(?=.)", "    ", timed, flags=re.MULTILINE)


CHUNKS = "        chunk_size: int = -1,\n"
MASKS = "        feature_mask: Union[torch.Tensor, float] = 1.0,\n"
TIME = "        time_emb: Optional[torch.Tensor] = None,\n"
UNUSED = """        # TODO: remove it
        self.bypass_scale = torch.nn.Parameter(torch.full((embed_dim,), 0.5))
"""
FEED_FORWARD = """        src = src + self.feed_forward1(src)

        self_attn_dropout_mask"""
BEFORE_LAYERS = """        pos_emb = self.encoder_pos(src)
        output = src

        if not torch.jit.is_scripting() and not torch.jit.is_tracing():
            output = output * feature_mask
"""
BEFORE_TIMED_LAYERS = """        pos_emb = self.encoder_pos(src)
        if self.time_emb is not None:
            assert time_emb is not None
            time_emb = self.time_emb(time_emb)
        else:
            assert time_emb is None
        output = src
"""
AFTER_LAYER = """            if not torch.jit.is_scripting() and not torch.jit.is_tracing():
                output = output * feature_mask
"""
AT_LOWER_RATE = """        if attn_mask is not None:
            attn_mask = attn_mask[::ds, ::ds]
"""
TIME_AT_LOWER_RATE = """        if time_emb is not None and time_emb.dim() == 3:
            time_emb = time_emb[::ds]
"""
PADDING_AT_LOWER_RATE = """        if src_key_padding_mask is not None:
            src_key_padding_mask = src_key_padding_mask[..., ::ds]
"""
ZIPVOICE = (
    ("def streaming_forward(", "def _streaming_forward("),
    (UNUSED, "        self.use_conv = True\n"),
    (CHUNKS + MASKS, TIME),
    (CHUNKS + "        attn_mask: Optional", TIME + "        attn_mask: Optional"),
    (FEED_FORWARD, ADD_TIME + FEED_FORWARD),
    convolution(1),
    convolution(2),
    ("        self.num_layers = num_layers\n", "        self.num_layers = num_layers\n        self.time_emb = None\n"),
    (BEFORE_LAYERS, BEFORE_TIMED_LAYERS),
    (
        "                chunk_size=chunk_size,\n                attn",
        "                time_emb=time_emb,\n                attn",
    ),
    (AFTER_LAYER, ""),
    (AT_LOWER_RATE, TIME_AT_LOWER_RATE + AT_LOWER_RATE + PADDING_AT_LOWER_RATE),
    ("chunk_size=chunk_size // ds,\n            feature_mask=feature_mask,\n", "time_emb=time_emb,\n"),
)
CHANNELS, TIME_CHANNELS, FRAMES = CONFIG["encoder_dim"][1], 6, 21


def stack(recipe, use_conv):
    """A stack at a lower frame rate, somewhere in its training."""
    torch.manual_seed(0)
    encoder = recipe.zipformer.Zipformer2(**CONFIG).encoders[1]
    encoder.encoder.time_emb = nn.Sequential(recipe.scaling.SwooshR(), nn.Linear(TIME_CHANNELS, CHANNELS))
    for layer in encoder.encoder.layers:
        layer.use_conv = use_conv
        if not use_conv:
            del layer.conv_module1, layer.conv_module2
    encoder = encoder.double()
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    set_batch_count(encoder, 3000.0)
    return encoder


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("use_conv", [False, True], ids=["without convolutions", "with convolutions"])
def test_all_is_swapped_and_does_the_same(train, use_conv):
    with icefall(*ZIPVOICE) as recipe:
        model = stack(recipe, use_conv).train(train)
        theirs = copy.deepcopy(model)
        report = convert(model)
        assert not report.not_swapped
        assert report.layers == (2, 2)
        kinds = type(model), type(model.encoder), type(model.encoder.layers[0])
        assert kinds == (TimedDownsampledEncoder, TimedEncoder, TimedEncoderLayer)
        padding = torch.arange(FRAMES) >= torch.tensor([[FRAMES], [17]])
        src = torch.randn(FRAMES, 2, CHANNELS, dtype=torch.float64)
        mask = torch.ones(FRAMES, FRAMES, dtype=torch.bool).triu(4)
        for seed, (shape, attn_mask) in enumerate([((2, TIME_CHANNELS), None), ((FRAMES, 2, TIME_CHANNELS), mask)]):
            time = torch.randn(shape, dtype=torch.float64)
            kwargs = {"attn_mask": attn_mask, "src_key_padding_mask": padding}
            assert_same_run(model, theirs, [src, time], kwargs=kwargs, seed=seed, recipe=recipe)
        with torch.no_grad():
            assert_same_run(model, theirs, [src, time], kwargs=kwargs, recipe=recipe)
        revert(model)
        assert_same_run(model, theirs, [src, time], kwargs=kwargs, recipe=recipe)


def test_a_convolution_of_someone_elses_is_called_without_chunks():
    with icefall(*ZIPVOICE) as recipe:
        model = stack(recipe, True).eval()

        class Special(recipe.zipformer.ConvolutionModule):
            def forward(self, x, src_key_padding_mask=None):
                return 2 * super().forward(x, src_key_padding_mask)

        model.encoder.layers[0].conv_module1.__class__ = Special
        theirs = copy.deepcopy(model)
        assert [kept[1] for kept in convert(model).not_swapped] == ["Special"]
        args = [
            torch.randn(FRAMES, 2, CHANNELS, dtype=torch.float64),
            torch.randn(2, TIME_CHANNELS, dtype=torch.float64),
        ]
        assert_same_run(model, theirs, args, recipe=recipe)


def test_ours_built_from_arguments():
    """Upstream's layer has the same weights but the unused scale; a stack that gets no time refuses one."""
    layer = TimedEncoderLayer(8, 4, 2, 4, 2, 2, 16, cnn_module_kernel=5)
    names = set(dict(layer.named_parameters()))
    assert "bypass_scale" not in names
    assert "conv_module2.in_proj.weight" in names
    encoder = TimedDownsampledEncoder(TimedEncoder(layer, 2, 8, -1, 4, 0.0, 1.0), 8, 2)
    x = torch.randn(7, 2, 8)
    assert encoder(x).shape == x.shape
    with pytest.raises(ValueError, match="time_emb: got one, but this stack takes none"):
        encoder(x, torch.zeros(2, 8))
    with pytest.raises(ValueError, match="time_emb: missing"):
        TimedEncoder(layer, 1, 8, 3, 4, 0.0, 1.0)(x)
