"""The conv embed's ConvNeXt block."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zipformer_kernels.branch.branch import Branch
from zipformer_kernels.branch.plain import When, convolution, depthwise, made_of, plain_parts
from zipformer_kernels.branch.recompute import pointwise_branch
from zipformer_kernels.branch.ways import IN_PARTS, Given, settle
from zipformer_kernels.core import tuning
from zipformer_kernels.core.autograd import gradient_hook
from zipformer_kernels.core.call import watcher
from zipformer_kernels.modules.scaled_init import ScaledConv2d
from zipformer_kernels.modules.swoosh import SwooshL
from zipformer_kernels.ops.depthwise_conv2d import depthwise_conv2d
from zipformer_kernels.ops.swoosh import swoosh_, swoosh_backward_, swoosh_l
from zipformer_kernels.training import Balancer, FloatLike, ScheduledFloat, Whiten
from zipformer_kernels.training.balancer import Moments, balanced_gradient
from zipformer_kernels.training.randomness import number

ROWS = tuning.entry("convnext.rows")

POINTWISE = {"pointwise_conv1", "hidden_balancer", "activation", "pointwise_conv2"}
"""The parts whose calls are left out where the block goes in parts."""

_one_by_one = convolution(nn.Conv2d, kernel_size=(1, 1), stride=(1, 1), padding=(0, 0), groups=1)


def _pointwise(module: nn.Module, when: int) -> bool:
    return _one_by_one(module, when) and module.bias is not None


@made_of(
    depthwise_conv=depthwise(nn.Conv2d),
    pointwise_conv1=_pointwise,
    hidden_balancer=Balancer,
    activation=SwooshL,
    pointwise_conv2=_pointwise,
    out_balancer=Balancer,
    out_whiten=Whiten,
)
class ConvNeXt(Branch):
    """x + pointwise(SwooshL(pointwise(depthwise(x)))), after arXiv:2206.14747.

    Args:
        channels: channels of x.
        hidden_ratio: how many times as many channels between the pointwise convolutions.
        kernel_size: odd width of the depthwise convolution in time and frequency.
        layerdrop_rate: the probability, in training, that a sequence skips the module; by default from 0.2 to
            0.015 over 20000 batches.
    """

    def __init__(
        self,
        channels: int,
        hidden_ratio: int = 3,
        kernel_size: tuple[int, int] = (7, 7),
        layerdrop_rate: FloatLike | None = None,
    ) -> None:
        super().__init__()
        self.padding = ((kernel_size[0] - 1) // 2, (kernel_size[1] - 1) // 2)
        if layerdrop_rate is None:
            layerdrop_rate = ScheduledFloat((0.0, 0.2), (20000.0, 0.015))
        self.layerdrop_rate = layerdrop_rate
        hidden = channels * hidden_ratio
        self.depthwise_conv = nn.Conv2d(
            channels, channels, kernel_size=kernel_size, groups=channels, padding=self.padding
        )
        self.pointwise_conv1 = nn.Conv2d(channels, hidden, kernel_size=1)
        self.hidden_balancer = Balancer(
            hidden,
            channel_dim=1,
            min_positive=0.3,
            max_positive=1.0,
            min_abs=0.75,
            max_abs=5.0,
        )
        self.activation = SwooshL()
        self.pointwise_conv2 = ScaledConv2d(hidden, channels, kernel_size=1, initial_scale=0.01)
        self.out_balancer = Balancer(
            channels,
            channel_dim=1,
            min_positive=0.4,
            max_positive=0.6,
            min_abs=1.0,
            max_abs=6.0,
        )
        self.out_whiten = Whiten(num_groups=1, whitening_limit=5.0, prob=(0.025, 0.25), grad_scale=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, channels, T, frequencies) to the same shape."""
        mask = None
        if self.training:
            layerdrop_rate = number(self.layerdrop_rate)
            if layerdrop_rate != 0.0:
                mask = torch.rand((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device) > layerdrop_rate
        x = self.out_balancer(self._added(x, mask))
        if x.requires_grad:
            x = self.out_whiten(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # it wants channels last
        return x

    def streaming_forward(self, x: Tensor, cached_left_pad: Tensor) -> tuple[Tensor, Tensor]:
        """One chunk of a stream; P is ``padding[0]``, the frames the convolution sees to either side.

        Args:
            x: (batch, channels, T + P, frequencies): the chunk, then the first P frames of the next one.
            cached_left_pad: (batch, channels, P, frequencies), the frames before the chunk.

        Returns:
            (batch, channels, T, frequencies), and the next `cached_left_pad`.
        """
        pad, freq_pad = self.padding
        if cached_left_pad.shape[2] != pad:
            raise ValueError(
                f"cached_left_pad: wanted {pad} frames along dimension 2, got {tuple(cached_left_pad.shape)}"
            )
        frames = x.shape[2] - pad
        joined = torch.cat([cached_left_pad, x], dim=2)
        conv = self.depthwise_conv
        y = F.conv2d(joined, conv.weight, conv.bias, padding=(0, freq_pad), groups=conv.groups)
        return x[:, :, :frames] + self._after_depthwise(y), joined[:, :, frames : frames + pad]

    def _depthwise(self, x: Tensor) -> Tensor:
        conv = self.depthwise_conv
        if channels_last(x) and "depthwise_conv" in plain_parts(self, When.ANY):
            return depthwise_conv2d(x, conv.weight, conv.bias)
        return conv(x)

    def _added(self, src: Tensor, mask: Tensor | None) -> Tensor:
        """src and what the block adds to it, in the sequences that get the branch."""
        x = self._depthwise(src)
        settled = settle(self, src, (x,), When.ANY)
        if IN_PARTS in settled.ways and settled.fused >= POINTWISE:
            added = IN_PARTS.add(self, Given(None, src, None, (x, mask), {}, over=False))
            if added is not None:
                return added[0]
        branch = self._after_depthwise(x)
        return src + (branch if mask is None else branch * mask)

    def _after_depthwise(self, x: Tensor) -> Tensor:
        return self.pointwise_conv2(self.activation(self.hidden_balancer(self.pointwise_conv1(x))))

    def in_parts(self, src: Tensor, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """src and the pointwise branch of x, the depthwise convolution's result; None where channels do not lie last.

        Hidden channels are of some rows at a time, which costs less than to store and to load them. Backward computes
        them again.
        """
        if x.numel() == 0 or not all(y.is_contiguous(memory_format=torch.channels_last) for y in (src, x)):
            return None
        differentiates = x.requires_grad or any(p.requires_grad for p in self.pointwise_conv1.parameters())
        draws = torch.is_grad_enabled() and differentiates  # as the balancer does, which wants a gradient to act on
        activation = _Hidden(self.hidden_balancer.draw() if draws else None)
        chosen = [True] * len(x) if mask is None else mask.flatten().tolist()
        src_rows, rows = (image.permute(0, 2, 3, 1).flatten(1, 2) for image in (src, x))
        first, last = self.pointwise_conv1, self.pointwise_conv2
        weights = first.weight.flatten(1), first.bias, last.weight.flatten(1), last.bias
        y = pointwise_branch(activation, ROWS.value, chosen, src_rows, rows, *weights)
        return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class _Hidden:
    """SwooshL of the hidden channels behind their balancer, as `pointwise_branch` wants it.

    Args:
        limits: what the balancer drew: its limits, or None where it does not act.
    """

    def __init__(self, limits: dict[str, float] | None) -> None:
        self.limits, self.moments = limits, Moments()

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        if self.limits is not None:
            self.moments.add(hidden.add_(bias))
        return swoosh_(hidden, "l", bias if self.limits is None else None)

    def backward(self, grad: Tensor, hidden: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        if self.limits is None:
            return swoosh_backward_(grad, hidden, "l", bias)
        grad, a = swoosh_backward_(grad, hidden.add_(bias).clone(), "l")
        return balanced_gradient(grad, hidden, moments=self.moments.known, channel_dim=1, **self.limits), a

    def reference(self, hidden: Tensor) -> Tensor:
        if self.limits is not None:
            hidden = gradient_hook(hidden, partial(balanced_gradient, channel_dim=-1, **self.limits), hidden)
        return swoosh_l(hidden)


def channels_last(x: Tensor) -> bool:
    """Whether convolutions run with channels last in memory, which measured faster on the CPU."""
    return x.device.type == "cpu" and watcher() is None
