"""Trains a very small model to tell where somebody speaks, on the demo's recordings but one, and shows it on that one.

A frame counts as speech where it is louder than the mean. Any recipe trains in the same way: batches, schedules, the
balancers and whitening of training mode, ScaledAdam and Eden.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor, nn

from zipformer_kernels import Conv2dSubsampling, Eden, ScaledAdam, Zipformer
from zipformer_kernels.commands.audio import features_of
from zipformer_kernels.presets import FBANK_BINS

*TRAINING, UNHEARD = sorted((Path(__file__).parent.parent / "demo" / "recordings").glob("*.wav"))
PIECE = 150  # frames of a recording in a batch: 1.5 seconds
SMALL = {
    "downsampling_factor": (1, 2),
    "encoder_dim": (32, 48),
    "encoder_unmasked_dim": (24, 32),
    "num_encoder_layers": 1,
    "num_heads": 2,
    "query_head_dim": 16,
    "feedforward_dim": (64, 96),
    "cnn_module_kernel": (15, 7),
    "dropout": 0.0,
    "warmup_batches": 20.0,
    "output_downsampling_factor": 1,
}


class Model(nn.Module):
    """Filterbank features to the logit of speech, 50 times a second."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Conv2dSubsampling(FBANK_BINS, SMALL["encoder_dim"][0], 4, 8, 16)
        self.encoder = Zipformer(**SMALL)
        self.speech = nn.Linear(max(SMALL["encoder_dim"]), 1)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        x, lengths = self.embed(features, lengths)
        padding = torch.arange(x.shape[1]) >= lengths[:, None]
        x, _ = self.encoder(x.transpose(0, 1), lengths, padding)
        return self.speech(x).squeeze(2).T  # (batch, frames)


def speech_in(features: Tensor) -> Tensor:
    """Whether each of the model's frames is louder than the mean of its recording; features (frames, bins)."""
    loudness = features.mean(1)
    return (loudness > loudness.mean())[3:-4:2]  # frame j of the conv embed sees 2 j to 2 j + 7


def batch_of(recordings: list[Tensor], size: int = 8) -> tuple[Tensor, Tensor]:
    """Random pieces of random recordings, (size, PIECE, bins), and where there is speech in them."""
    pieces, labels = [], []
    for recording in random.choices(recordings, k=size):
        start = 2 * random.randrange((len(recording) - PIECE) // 2)
        pieces.append(recording[start : start + PIECE])
        labels.append(speech_in(recording)[start // 2 :][: (PIECE - 7) // 2])
    return torch.stack(pieces), torch.stack(labels).float()


def drawn(speech: Tensor) -> str:
    """A line with a mark for each tenth of a second of speech."""
    return "".join("#" if piece.float().mean() > 0.5 else "." for piece in speech.split(5))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of the optimizer")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate of ScaledAdam; recipes take 0.045")
    options = parser.parse_args(arguments)

    random.seed(0)
    torch.manual_seed(0)
    recordings = [features_of(path) for path in TRAINING]
    model = Model()
    optimizer = ScaledAdam(model.parameters(), lr=options.lr)
    scheduler = Eden(optimizer, lr_batches=100, lr_epochs=4, warmup_batches=10)
    for step in range(options.steps):
        for module in model.modules():
            if hasattr(module, "batch_count"):
                module.batch_count = float(step)  # by which schedules go, as icefall's set_batch_count writes it
        features, labels = batch_of(recordings)
        logits = model(features, torch.full((len(features),), PIECE))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step_batch(step)
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step:3}: loss {loss.item():.3f}")

    features = features_of(UNHEARD)
    with torch.inference_mode():
        found = model.eval()(features[None], torch.tensor([len(features)]))[0] > 0
    speech = speech_in(features)[: len(found)]
    print(f"{UNHEARD.name}, which it has not heard: {(found == speech).float().mean():.0%} of the frames are right")
    print(f"speech {drawn(speech)}")
    print(f"model  {drawn(found)}")


if __name__ == "__main__":
    main()
