"""The reference of swoosh_linear and of its variant as a backend, which serves every call."""

from __future__ import annotations

from dataclasses import replace

from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.swoosh_linear.product import around_product
from zipformer_kernels.ops.swoosh_linear.reference import activate, differentiate, feed_forward

launchers = replace(
    around_product(activate, differentiate, lambda *_: None),
    variants={"feed_forward": Launchers(lambda *_: None, lambda *args: (feed_forward(*args),), None)},
)
