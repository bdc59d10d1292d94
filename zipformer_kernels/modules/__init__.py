"""The modules of a Zipformer encoder, with upstream's names, arguments and state_dict keys."""

from zipformer_kernels.modules.activation_dropout_linear import ActivationDropoutAndLinear
from zipformer_kernels.modules.attention import RelPositionMultiheadAttentionWeights, SelfAttention
from zipformer_kernels.modules.bias_norm import BiasNorm
from zipformer_kernels.modules.bypass import BypassModule
from zipformer_kernels.modules.convolution import ChunkCausalDepthwiseConv1d, ConvolutionModule
from zipformer_kernels.modules.feedforward import FeedforwardModule
from zipformer_kernels.modules.layer import ZipformerEncoderLayer
from zipformer_kernels.modules.nonlin_attention import NonlinAttention
from zipformer_kernels.modules.positional import CompactRelPositionalEncoding
from zipformer_kernels.modules.resample import SimpleDownsample, SimpleUpsample
from zipformer_kernels.modules.scaled_init import ScaledConv2d, ScaledLinear
from zipformer_kernels.modules.stack import DownsampledZipformerEncoder, ZipformerEncoder
from zipformer_kernels.modules.subsampling import Conv2dSubsampling, ConvNeXt
from zipformer_kernels.modules.swoosh import SwooshL, SwooshR
from zipformer_kernels.modules.timed import TimedDownsampledEncoder, TimedEncoder, TimedEncoderLayer

__all__ = [
    "ActivationDropoutAndLinear",
    "BiasNorm",
    "BypassModule",
    "ChunkCausalDepthwiseConv1d",
    "CompactRelPositionalEncoding",
    "Conv2dSubsampling",
    "ConvNeXt",
    "ConvolutionModule",
    "DownsampledZipformerEncoder",
    "FeedforwardModule",
    "NonlinAttention",
    "RelPositionMultiheadAttentionWeights",
    "ScaledConv2d",
    "ScaledLinear",
    "SelfAttention",
    "SimpleDownsample",
    "SimpleUpsample",
    "SwooshL",
    "SwooshR",
    "TimedDownsampledEncoder",
    "TimedEncoder",
    "TimedEncoderLayer",
    "ZipformerEncoder",
    "ZipformerEncoderLayer",
]
