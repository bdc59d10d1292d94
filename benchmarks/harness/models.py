"""Whole models, ours and upstream's with the same weights, and functions that run them."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import peers, upstream
from benchmarks.harness.check import ModelCheck, Results, draws_of_float32, gradients_of
from benchmarks.harness.machine import DEVICE
from benchmarks.harness.op_jobs import no_compiler
from benchmarks.harness.peers import Prepared, Run, Unserved
from benchmarks.harness.timing import captured
from zipformer_kernels.modules.encoder import Zipformer
from zipformer_kernels.modules.subsampling import Conv2dSubsampling
from zipformer_kernels.presets import FBANK_BINS, preset

PEERS = ("upstream", "upstream as shipped", "upstream compiled", "ours")
"""Upstream with its activations called, with them compiled as it ships, and compiled as a whole; ours on `auto`."""

OURS_AS_GRAPH = "ours, CUDA graph"
OURS_IN_BFLOAT16 = "ours, bf16 weights"

BATCH_COUNT = 10000.0  # of training steps done: where schedules have mostly settled
FEATURES_PER_SECOND, FRAMES_PER_SECOND = 100, 50  # into the conv embed and into the encoder


class Model(nn.Module):
    """A conv embed and an encoder, from features (batch, T, 80) of full length to (frames, batch, channels)."""

    def __init__(self, embed: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.embed, self.encoder = embed, encoder

    def forward(self, features: Tensor) -> Tensor:
        lengths = torch.full((features.shape[0],), features.shape[1], device=features.device)
        x, lengths = self.embed(features, lengths)
        return self.encoder(x.transpose(0, 1), lengths, no_padding(x.transpose(0, 1)))[0]


class Embed(nn.Module):
    """A conv embed on features (batch, T, 80) of full length."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, features: Tensor) -> Tensor:
        lengths = torch.full((features.shape[0],), features.shape[1], device=features.device)
        return self.embed(features, lengths)[0]


class Encoder(nn.Module):
    """An encoder on sequences (T, batch, channels) of full length."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.full((x.shape[1],), x.shape[0], device=x.device)
        return self.encoder(x, lengths, no_padding(x))[0]


class Streaming(nn.Module):
    """A causal encoder on one chunk, so that what is compiled is what is called."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, lengths: Tensor, states: list[Tensor], padding: Tensor) -> Any:
        return self.encoder.streaming_forward(x, lengths, states, padding)


def no_padding(x: Tensor) -> Tensor:
    """The mask of sequences (T, batch, channels) that all have full length."""
    return torch.zeros(x.shape[1], x.shape[0], dtype=torch.bool, device=x.device)


def encoder(peer: str, name: str, **options: Any) -> nn.Module:
    """A peer's encoder of a preset: `options` are arguments of `Zipformer`. All peers' weights are the same."""
    seed(0)
    ours = Zipformer.from_preset(name, **options)
    if is_ours(peer):
        return ours
    (module,) = upstream.load("zipformer")
    with upstream.activations(compiled=peer == "upstream as shipped"):
        theirs = module.Zipformer(**preset(name) | options)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def conv_embed(peer: str, name: str) -> nn.Module:
    """A peer's conv embed of a preset."""
    seed(0)
    ours = Conv2dSubsampling.from_preset(name)
    if is_ours(peer):
        return ours
    module, scaling = upstream.load("subsampling", "scaling")
    dropout = scaling.ScheduledFloat((0.0, 0.3), (20000.0, 0.1))
    with upstream.activations(compiled=peer == "upstream as shipped"):
        theirs = module.Conv2dSubsampling(FBANK_BINS, preset(name)["encoder_dim"][0], dropout=dropout)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def model(peer: str, name: str) -> Model:
    """A peer's conv embed and encoder."""
    return Model(conv_embed(peer, name), encoder(peer, name))


def features(batch: int, seconds: int) -> Tensor:
    """Random features, (batch, T, 80)."""
    return torch.randn(batch, seconds * FEATURES_PER_SECOND, FBANK_BINS, device=DEVICE)


def frames(name: str, batch: int, seconds: int) -> Tensor:
    """Random frames for a preset's encoder, (T, batch, channels)."""
    return torch.randn(seconds * FRAMES_PER_SECOND, batch, preset(name)["encoder_dim"][0], device=DEVICE)


def seed(number: int) -> None:
    """Seeds both generators that training draws from."""
    random.seed(number)
    torch.manual_seed(number)


def is_ours(peer: str) -> bool:
    """Whether a peer runs our model."""
    return peer in ("ours", OURS_AS_GRAPH, OURS_IN_BFLOAT16)


def unserved(peer: str) -> str | None:
    """Why a peer cannot run here, or None if it can."""
    if is_ours(peer):
        return None
    return upstream.unavailable() or (None if peer == "upstream" else no_compiler())


def autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Autocast to a half-precision dtype; nothing for others."""
    return torch.autocast(DEVICE.type, dtype) if dtype.itemsize == 2 else contextlib.nullcontext()


def prepare(
    build: Callable[[str], nn.Module],
    make_run: Callable[[nn.Module], Callable[[], Tensor]],
    probe: Callable[[nn.Module, torch.dtype], Results],
    dtype: torch.dtype,
    wanted: Sequence[str],
    unchecked: Mapping[str, str] | None = None,
) -> Prepared:
    """Functions for the peers wanted. Where there are several, each was checked by itself, on the input of `probe`.

    Args:
        build: makes a peer's model.
        make_run: from a model to the function to time.
        probe: what to check: see `ModelCheck`.
        dtype: what is computed in, by autocast where it is half.
        wanted: the peers.
        unchecked: peers that cannot be checked, and why.
    """
    reason = upstream.unavailable()
    reasons = dict(unchecked or {})
    if reason is not None:
        reasons |= dict.fromkeys(filter(is_ours, wanted), f"against our own reference only: {reason}")
    model_check = ModelCheck(lambda peer: build(peer).to(DEVICE), probe, dtype, None if reason else "upstream")

    def make(peer: str) -> Run:
        reason = unserved(peer)
        if reason is not None:
            raise Unserved(reason)
        change = CHANGES.get(peer, lambda module: module)
        if len(wanted) > 1 and peer != "upstream" and peer not in (unchecked or {}):
            model_check.check(peer, is_ours(peer), change)
        made = build(peer).to(DEVICE)
        return captured(make_run(made)) if peer == OURS_AS_GRAPH else make_run(change(made))

    prepared = peers.prepare(wanted, make)
    prepared.unchecked = {peer: why for peer, why in reasons.items() if peer in prepared.runs}
    return prepared


class Replayed(nn.Module):
    """A model whose call is the replay of a CUDA graph of that call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return captured(partial(self.module, *args))()


class InBfloat16(nn.Module):
    """A model with weights in bfloat16, which casts what it is given, and runs without autocast."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.bfloat16()

    def forward(self, *args: Any) -> Any:
        with torch.autocast(DEVICE.type, enabled=False):
            return self.module(*(x.bfloat16() for x in args))


def compiled(module: nn.Module) -> nn.Module:
    """The model under torch.compile, which has forgotten all it compiled before."""
    torch.compiler.reset()
    return torch.compile(module)


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "upstream compiled": compiled,
    OURS_AS_GRAPH: Replayed,
    OURS_IN_BFLOAT16: InBfloat16,
}
"""What makes a peer of a model."""


def evaluated(make_x: Callable[[], Tensor], module: nn.Module, dtype: torch.dtype) -> Results:
    """The output of a model in eval mode on what `make_x` draws from one seed: a probe for `ModelCheck`."""
    return {"output": inference(make_x, dtype, module)().double()}


def trained(make_x: Callable[[], Tensor], module: nn.Module, dtype: torch.dtype) -> Results:
    """The output and all gradients of a training step on such x, with masks of float32: another probe."""
    in_training(module)
    seed(0)
    x = make_x().to(next(module.parameters()).dtype)
    with draws_of_float32():
        seed(0)
        with autocast(dtype):
            y = module(x)
        return gradients_of(module, y)


def inference(make_x: Callable[[], Tensor], dtype: torch.dtype, module: nn.Module) -> Callable[[], Tensor]:
    """A function that runs a model in eval mode on what `make_x` draws from one seed."""
    module.eval()
    seed(0)
    x = make_x().to(next(module.parameters()).dtype)

    def run() -> Tensor:
        with torch.no_grad(), autocast(dtype):
            return module(x)

    return run


def in_training(module: nn.Module) -> None:
    """Sets a model to training, with its schedules at `BATCH_COUNT`."""
    module.train()
    for part in module.modules():
        if hasattr(part, "batch_count"):
            part.batch_count = BATCH_COUNT


def training(make_x: Callable[[], Tensor], dtype: torch.dtype, module: nn.Module) -> Callable[[], Tensor]:
    """A function that runs a model forward and backward on such x; its k-th call draws from seed k."""
    in_training(module)
    seed(0)
    x, steps = make_x(), itertools.count()

    def run() -> Tensor:
        seed(next(steps))
        module.zero_grad(set_to_none=True)
        with autocast(dtype):
            y = module(x)
        y.float().square().mean().backward()
        return y

    return run
