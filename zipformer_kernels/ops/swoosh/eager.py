"""The reference of swoosh as a backend, which serves every call."""

from __future__ import annotations

from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.swoosh.reference import backward, forward

launchers = Launchers(lambda *_: None, forward, backward)
