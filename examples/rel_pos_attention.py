"""A Conformer's attention with relative positions, written plainly and with `rel_pos_attention`: the same results.

The layer has the names of ESPnet's and wenet's `RelPositionMultiHeadedAttention` (Transformer-XL, arXiv:1901.02860), so
a checkpoint of theirs loads into either. What autograd keeps for the backward pass is shown for both: the plain one
keeps tensors of T x T scores for each head, the other none, or the attention weights alone while they are small.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zipformer_kernels import rel_pos_attention


class RelPositionMultiHeadedAttention(nn.Module):
    """Self-attention on x, (batch, T, channels), with embeddings of 2 T - 1 relative positions, the leftmost first."""

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        self.heads, self.head_channels = heads, channels // heads
        self.linear_q, self.linear_k, self.linear_v = (nn.Linear(channels, channels) for _ in range(3))
        self.linear_out = nn.Linear(channels, channels)
        self.linear_pos = nn.Linear(channels, channels, bias=False)
        self.pos_bias_u, self.pos_bias_v = (nn.Parameter(torch.empty(heads, self.head_channels)) for _ in range(2))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(self, x: Tensor, pos_emb: Tensor, padding: Tensor) -> Tensor:
        """The layer's result; `padding`, (batch, T), is True where a frame is padding."""
        q = self.split(self.linear_q(x)).transpose(1, 2)  # (batch, T, heads, channels), to add the biases
        q_u, q_v = (q + self.pos_bias_u).transpose(1, 2), (q + self.pos_bias_v).transpose(1, 2)
        k, v, pos = self.split(self.linear_k(x)), self.split(self.linear_v(x)), self.split(self.linear_pos(pos_emb))
        return self.linear_out(self.attend(q_u, q_v, k, v, pos, padding).transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        """From (batch, T, channels) to (batch, heads, T, channels)."""
        return x.unflatten(2, (self.heads, self.head_channels)).transpose(1, 2)

    def attend(self, q_u: Tensor, q_v: Tensor, k: Tensor, v: Tensor, pos: Tensor, padding: Tensor) -> Tensor:
        """As papers write it."""
        matrix_ac = q_u @ k.transpose(2, 3)
        matrix_bd = rel_shift(q_v @ pos.transpose(2, 3))
        scores = (matrix_ac + matrix_bd) / math.sqrt(self.head_channels)
        return scores.masked_fill(padding[:, None, None, :], float("-inf")).softmax(dim=-1) @ v


def rel_shift(x: Tensor) -> Tensor:
    """From scores by relative position, (..., T, 2 T - 1), to scores by source, (..., T, T)."""
    frames, positions = x.shape[-2:]
    rows = F.pad(x, (1, 0)).flatten(-2)[..., frames:]  # a row of T + T elements begins one element later each time
    return rows.unflatten(-1, (frames, positions))[..., :frames]


class Fused(RelPositionMultiHeadedAttention):
    """The same layer with the op."""

    def attend(self, q_u: Tensor, q_v: Tensor, k: Tensor, v: Tensor, pos: Tensor, padding: Tensor) -> Tensor:
        return rel_pos_attention(q_u, k, v, q_v, pos, key_padding_mask=padding)


def positions(frames: int, channels: int) -> Tensor:
    """Sinusoids of the distances T - 1 to -(T - 1): (1, 2 T - 1, channels)."""
    distance = torch.arange(frames - 1, -frames, -1.0).unsqueeze(1)
    angles = distance * torch.exp(torch.arange(0, channels, 2) * (-math.log(10000.0) / channels))
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1).unsqueeze(0)


def run(layer: nn.Module, x: Tensor, *rest: Tensor) -> tuple[list[Tensor], int, int]:
    """The result and all gradients, and the bytes kept for the backward pass: of the largest tensor, and of all."""
    kept: dict[int, int] = {}  # by storage: views of a tensor count once

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(x, *rest)
    gradients = torch.autograd.grad(out.square().mean(), [x, *layer.parameters()])
    return [out.detach(), *gradients], max(kept.values()), sum(kept.values())


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a multiple of the RMS."""
    return ((one - other).abs().max() / other.square().mean().sqrt()).item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1500, help="T; Conformers have 25 a second")
    parser.add_argument("--batch", type=int, default=2, help="sequences; the last is half as long")
    parser.add_argument("--heads", type=int, default=4, help="of the attention")
    parser.add_argument("--channels", type=int, default=256, help="of the layer")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    plain = RelPositionMultiHeadedAttention(options.heads, options.channels)
    fused = Fused(options.heads, options.channels)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(options.batch, options.frames, options.channels)
    lengths = torch.full((options.batch, 1), options.frames)
    lengths[-1] = (options.frames + 1) // 2
    batch = x, positions(options.frames, options.channels), torch.arange(options.frames) >= lengths

    expected, largest, total = run(plain, *batch)
    print(f"plain: keeps {total / 1e6:.1f} MB for the backward pass, the largest tensor has {largest / 1e6:.1f} MB")
    results, largest, total = run(fused, *batch)
    print(f"rel_pos_attention: keeps {total / 1e6:.1f} MB, the largest tensor has {largest / 1e6:.1f} MB")
    names = ["x", *(name for name, _ in plain.named_parameters())]
    # A bias of all keys moves all scores of a target alike, so its gradient vanishes but for rounding.
    gradients = {
        name: difference(one, other)
        for name, one, other in zip(names, results[1:], expected[1:], strict=True)
        if name != "linear_k.bias"
    }
    print(f"forward differs by {difference(results[0], expected[0]):.0e} of its RMS")
    print(f"{len(gradients)} gradients differ by {max(gradients.values()):.0e} of theirs at most")


if __name__ == "__main__":
    main()
