"""The reference of attention and of its variants as a backend, which serves every call."""

from __future__ import annotations

from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.attention import reference

launchers = Launchers(
    lambda *_: None,
    reference.forward,
    reference.backward,
    variants={
        "softmax": Launchers(lambda *_: None, lambda *args: (reference.softmax_rows(*args),), None),
        "weights": Launchers(lambda *_: None, lambda *args: (reference.weights(*args),), reference.weights_backward),
        "stream": Launchers(lambda *_: None, reference.stream, None),
    },
)
