"""Jobs of whole models: encoder forward, conv embed, training step, streaming chunk, Conformer beside.

On a CPU presets S and M in float32, batches of 4 x 16 s; on a GPU preset L in bfloat16 by autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import models, peers
from benchmarks.harness.check import Results
from benchmarks.harness.conformer import conformer_l
from benchmarks.harness.job import Job
from benchmarks.harness.machine import DEVICE
from benchmarks.harness.models import PEERS
from benchmarks.harness.peers import Prepared, Run
from zipformer_kernels.presets import preset

ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
FORWARD = [("L", 1, 30), ("L", 64, 30)] if ON_GPU else [("S", 4, 16), ("M", 4, 16)]
TRAINING = [("L", 30, 30), ("L", 15, 30), ("L", 8, 30)] if ON_GPU else [("S", 4, 16)]  # upstream may fit the last only
CONFORMER = ("L", 30, 30) if ON_GPU else ("L", 1, 16)
ROUNDS = {"forward": 7, "both": 3}
CHUNK, LEFT_CONTEXT = 16, 128  # frames at 50 Hz: 320 ms
CHUNKS = 100
CHECKED = (2, 3)  # sequences, and their seconds, on which models are checked
CHECKED_CHUNKS = 10  # a left context, and more


def sizes(name: str, batch: int, seconds: int) -> str:
    """The name of a case."""
    return f"{name}, {batch} x {seconds} s"


def encoder_forward(every: bool = False) -> Iterator[Job]:
    """The encoder in eval mode; on a GPU also as the replay of a CUDA graph, and with weights in bfloat16."""
    peers = (*PEERS, models.OURS_AS_GRAPH, models.OURS_IN_BFLOAT16) if ON_GPU else PEERS
    for name, batch, seconds in FORWARD:
        yield Job(
            *("encoder-forward", sizes(name, batch, seconds), "forward", DTYPE, peers),
            partial(_forward, partial(_encoder, name), partial(models.frames, name), (batch, seconds)),
            rounds=ROUNDS["forward"],
            apart=True,
        )


def conv_embed(every: bool = False) -> Iterator[Job]:
    """The conv embed in eval mode."""
    for name, batch, seconds in FORWARD[:1]:
        yield Job(
            *("conv-embed", sizes(name, batch, seconds), "forward", DTYPE, PEERS),
            partial(_forward, partial(_embed, name), models.features, (batch, seconds)),
            apart=True,
        )


def training_step(every: bool = False) -> Iterator[Job]:
    """Forward and backward of conv embed and encoder in training; on a CPU compiled upstream only if `every`."""
    peers = PEERS if ON_GPU or every else tuple(peer for peer in PEERS if peer != "upstream compiled")
    for name, batch, seconds in TRAINING:
        yield Job(
            *("training-step", sizes(name, batch, seconds), "both", DTYPE, peers),
            partial(_training, name, (batch, seconds)),
            rounds=ROUNDS["both"],
            apart=True,
        )


def streaming_chunk(every: bool = False) -> Iterator[Job]:
    """One chunk of one stream by a causal encoder, which carries its states from call to call."""
    peers = PEERS if ON_GPU or every else tuple(peer for peer in PEERS if peer != "upstream compiled")
    for name in ("L",) if ON_GPU else ("S",):
        yield Job(
            *("streaming-chunk", f"causal {name}, 320 ms", "forward", torch.float32, peers),
            partial(
                models.prepare, partial(_streaming, name), partial(_stream, name), partial(_chunks, name), torch.float32
            ),
            rounds=CHUNKS,
            apart=True,
        )


def conformer(every: bool = False) -> Iterator[Job]:
    """Zipformer beside a Conformer of its size, with conv embeds; on a CPU only if `every`."""
    if not ON_GPU and not every:
        return
    name, batch, seconds = CONFORMER
    features = partial(models.features, batch, seconds)
    for direction, make_run in (
        ("forward", partial(models.inference, features, DTYPE)),
        ("both", partial(models.training, features, DTYPE)),
    ):
        yield Job(
            *("conformer", sizes(name, batch, seconds), direction, DTYPE, ("Conformer-L", "ours")),
            partial(_conformer, name, make_run),
            rounds=ROUNDS[direction],
        )


def _encoder(name: str, peer: str) -> nn.Module:
    return models.Encoder(models.encoder(peer, name))


def _embed(name: str, peer: str) -> nn.Module:
    return models.Embed(models.conv_embed(peer, name))


def _forward(
    build: Callable[[str], nn.Module], x: Callable[[int, int], Tensor], size: tuple[int, int], wanted: Sequence[str]
) -> Prepared:
    run = partial(models.inference, partial(x, *size), DTYPE)
    unchecked = {models.OURS_IN_BFLOAT16: "it rounds between layers; tests/test_bfloat16.py holds by how much"}
    return models.prepare(build, run, partial(models.evaluated, partial(x, *CHECKED)), DTYPE, wanted, unchecked)


def _training(name: str, size: tuple[int, int], wanted: Sequence[str]) -> Prepared:
    run = partial(models.training, partial(models.features, *size), DTYPE)
    probe = partial(models.trained, partial(models.features, *CHECKED))
    unchecked = {"upstream compiled": "inductor draws its own random numbers"}
    return models.prepare(partial(models.model, name=name), run, probe, DTYPE, wanted, unchecked)


def _streaming(name: str, peer: str) -> nn.Module:
    options = {"causal": True, "chunk_size": (CHUNK,), "left_context_frames": (LEFT_CONTEXT,)}
    return models.Streaming(models.encoder(peer, name, **options))


def _stream(name: str, module: nn.Module) -> Callable[[], Tensor]:
    """A function that feeds one chunk."""
    module.eval()
    dtype = next(module.parameters()).dtype
    x = torch.randn(CHUNK, 1, preset(name)["encoder_dim"][0], generator=torch.Generator().manual_seed(0))
    x = x.to(DEVICE, dtype)
    lengths = torch.full((1,), CHUNK, device=DEVICE)
    padding = torch.zeros(1, LEFT_CONTEXT + CHUNK, dtype=torch.bool, device=DEVICE)
    states = [state.to(DEVICE, dtype) for state in module.encoder.get_init_states(1)]

    def run() -> Tensor:
        nonlocal states
        with torch.no_grad():
            y, _, states = module(x, lengths, states, padding)
        return y

    return run


def _chunks(name: str, module: nn.Module, dtype: torch.dtype) -> Results:
    """Some chunks on end, as a probe for `ModelCheck`."""
    run = _stream(name, module)
    return {"output": torch.cat([run() for _ in range(CHECKED_CHUNKS)]).double()}


def _conformer(name: str, make_run: Callable[[nn.Module], Callable[[], Tensor]], wanted: Sequence[str]) -> Prepared:
    def make(peer: str) -> Run:
        made = models.model("ours", name) if peer == "ours" else conformer_l()
        return make_run(made.to(DEVICE))

    prepared = peers.prepare(wanted, make)
    prepared.unchecked = dict.fromkeys(prepared.runs, "the other is another model")
    return prepared
