"""How arguments get into the compiled module: structs whose fields have one name on both sides."""

import pytest

from zipformer_kernels.core import backend
from zipformer_kernels.ops.attention import arguments as attention
from zipformer_kernels.ops.conv_module.arguments import Shape
from zipformer_kernels.ops.depthwise_conv2d import cpu as depthwise_conv2d
from zipformer_kernels.ops.nonlin_attention import native as nonlin_attention

pytestmark = pytest.mark.skipif(backend.missing["cpu"] is not None, reason=f"cpu: {backend.missing['cpu']}")

STRUCTS = {
    "AttentionRows": attention.Rows,
    "AttentionWeights": attention.Weights,
    "AttentionUse": attention.Use,
    "ConvModuleShape": Shape,
    "Image": depthwise_conv2d.Image,
    "NonlinRows": nonlin_attention.Rows,
}


@pytest.mark.parametrize("name", STRUCTS)
def test_named_tuples_have_the_fields_of_their_structs(name):
    assert STRUCTS[name]._fields == backend.native.fields[name]


def test_every_kernel_lists_its_fields():
    kernels = {name for name in vars(backend.native) if name.endswith(("_cpu", "_cuda"))}
    assert kernels <= set(backend.native.fields)


def bypass(*args, **named):
    return backend.native.bypass_forward_cpu(*args, **named)


SIZES = {"rows": 0, "channels": 1, "dtype": 0, "threads": 1}


def test_arguments_come_in_order_or_by_name():
    bypass(0, 0, 0, 0, 0, 1, 0, 1)
    bypass(0, 0, c=0, y=0, **SIZES)


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(TypeError, match="y is missing"):
        bypass(0, 0, 0, **SIZES)
    with pytest.raises(TypeError, match="wanted the arguments"):
        bypass(0, 0, 0, 0, more=1, **SIZES)
    with pytest.raises(TypeError, match="wanted the arguments"):
        bypass(0, 0, 0, 0, a=1, **SIZES)
    with pytest.raises(TypeError, match="integer"):
        bypass(0, 0, 0, None, **SIZES)
    with pytest.raises(TypeError, match="wanted a tuple of data, frame, sequence"):
        backend.native.nonlin_attention_open_cpu((0, 0, 0), (0, 0), 0, 0, 0, 0, 1, 0, 1)
