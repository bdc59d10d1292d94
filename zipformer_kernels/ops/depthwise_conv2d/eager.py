"""The reference of depthwise_conv2d as a backend, which serves every call."""

from __future__ import annotations

from zipformer_kernels.core.autograd import backward_of
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.depthwise_conv2d.reference import depthwise_conv2d, forward

launchers = Launchers(lambda *_: None, forward, backward_of(depthwise_conv2d))
