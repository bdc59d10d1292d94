"""The convolution module and its chunk-causal depthwise convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zipformer_kernels.branch.branch import Branch
from zipformer_kernels.branch.middles.conv_module import ConvMiddle
from zipformer_kernels.branch.node import Plan, Site, acting
from zipformer_kernels.branch.plain import When, balancer, depthwise, made_of, matches, plain_parts
from zipformer_kernels.core.joint import split
from zipformer_kernels.core.module import Module
from zipformer_kernels.core.op import SettledBackend
from zipformer_kernels.modules.activation_dropout_linear import ActivationDropoutAndLinear
from zipformer_kernels.modules.streaming import join_cache
from zipformer_kernels.ops.conv_module import chunk_conv_module, conv_module, in_layer, infer_conv_module
from zipformer_kernels.ops.conv_module.reference import chunk_convolution, chunk_factors
from zipformer_kernels.ops.conv_module.stream import stream_conv_module
from zipformer_kernels.ops.shapes import as_mask
from zipformer_kernels.ops.sizes import compact, fill
from zipformer_kernels.training import Balancer, ScheduledFloat, Whiten, whitening_schedule


@made_of(
    parameters=("chunkwise_conv_scale",),
    causal_conv=depthwise(nn.Conv1d, padded=False),
    chunkwise_conv=depthwise(nn.Conv1d),
)
class ChunkCausalDepthwiseConv1d(Module):
    """A depthwise convolution that sees all of the past in its kernel, but of the future only the same chunk.

    It is the sum of a causal convolution of half the width and of a full-width convolution inside each chunk;
    the latter is scaled by 1 plus a learned correction that depends on the distance to the chunk's left and
    right edge.

    Args:
        channels: channels of x.
        kernel_size: odd width K of the convolution within chunks; the causal one has (K + 1) / 2.
        initial_scale: factor on the initial weights.
        bias: whether the convolution within chunks has a bias; the causal one always has.

    Raises:
        ValueError: `kernel_size` is even.
    """

    def __init__(self, channels: int, kernel_size: int, initial_scale: float = 1.0, bias: bool = True) -> None:
        super().__init__()
        _check_odd(kernel_size)
        self.causal_conv = nn.Conv1d(channels, channels, (kernel_size + 1) // 2, groups=channels)
        self.chunkwise_conv = nn.Conv1d(
            channels, channels, kernel_size, groups=channels, padding=kernel_size // 2, bias=bias
        )
        # The corrections near the left edge, then those near the right edge.
        self.chunkwise_conv_scale = nn.Parameter(torch.zeros(2, channels, kernel_size))
        self.kernel_size = kernel_size
        with torch.no_grad():
            self.causal_conv.weight *= initial_scale
            self.chunkwise_conv.weight *= initial_scale
            if bias:
                self.causal_conv.bias.uniform_(-0.1 * initial_scale, 0.1 * initial_scale)

    def forward(self, x: Tensor, chunk_size: int = -1) -> Tensor:
        """Convolves x, in chunks that need not divide its length.

        Args:
            x: (batch, channels, T).
            chunk_size: frames per chunk; negative for one chunk of all frames.

        Returns:
            (batch, channels, T).
        """
        return chunk_convolution(x, self.causal_conv, self.chunkwise_conv, self.chunkwise_conv_scale, chunk_size)

    def parameters_of_op(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        """The parameters, in the order in which `chunk_conv_module` takes them."""
        within, causal = self.chunkwise_conv, self.causal_conv
        return within.weight, within.bias, causal.weight, causal.bias, self.chunkwise_conv_scale

    def streaming_forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Convolves one chunk.

        Args:
            x: (batch, channels, T), the whole chunk.
            cache: (batch, channels, K // 2), the frames before it.

        Returns:
            (batch, channels, T), and the next `cache`.
        """
        joined, cache = join_cache("cache", cache, x, self.kernel_size // 2, dim=2)
        within = self.chunkwise_conv(x) * chunk_factors(self.chunkwise_conv_scale, x.shape[2], x.shape[2])
        return within + self.causal_conv(joined), cache


def _causal_or_not(module: nn.Module, when: int) -> bool:
    """Expects either of the convolutions that a module can have."""
    if type(module) is ChunkCausalDepthwiseConv1d:
        return matches(module, ChunkCausalDepthwiseConv1d, when)
    return _plain_depthwise(module, when)


_plain_depthwise = depthwise(nn.Conv1d)


def _swoosh_r(module: nn.Module, when: int) -> bool:
    """Expects the activation that kernels of the whole module have."""
    return matches(module, ActivationDropoutAndLinear, when) and module.activation == "SwooshR"


@made_of(
    {
        "balancer1": balancer(-1),
        "activation1": nn.Identity,
        "activation2": nn.Identity,
        "balancer2": balancer(1),
        "whiten": Whiten,
    },
    in_proj=nn.Linear,
    sigmoid=nn.Sigmoid,
    depthwise_conv=_causal_or_not,
    out_proj=_swoosh_r,
)
class ConvolutionModule(Branch):
    """Linear with a sigmoid gate, zeros on padding, depthwise convolution, SwooshR, linear.

    Args:
        channels: channels of x and of the result.
        kernel_size: odd width of the depthwise convolution.
        causal: use the chunk-causal convolution.

    Raises:
        ValueError: `kernel_size` is even.
    """

    def __init__(self, channels: int, kernel_size: int, causal: bool) -> None:
        super().__init__()
        _check_odd(kernel_size)
        self.causal = causal
        self.in_proj = nn.Linear(channels, 2 * channels)
        # Keeps the gate's input from growing so large that its gradients become sparse.
        self.balancer1 = Balancer(
            channels,
            channel_dim=-1,
            min_positive=ScheduledFloat((0.0, 0.05), (8000.0, 0.025)),
            max_positive=1.0,
            min_abs=1.5,
            max_abs=ScheduledFloat((0.0, 5.0), (8000.0, 10.0), default=1.0),
        )
        # Named places for diagnostics to hook into.
        self.activation1 = nn.Identity()
        self.sigmoid = nn.Sigmoid()
        self.activation2 = nn.Identity()
        self.depthwise_conv = (
            ChunkCausalDepthwiseConv1d(channels, kernel_size)
            if causal
            else nn.Conv1d(channels, channels, kernel_size, groups=channels, padding=kernel_size // 2)
        )
        self.balancer2 = Balancer(
            channels,
            channel_dim=1,
            min_positive=ScheduledFloat((0.0, 0.1), (8000.0, 0.05)),
            max_positive=1.0,
            min_abs=ScheduledFloat((0.0, 0.2), (20000.0, 0.5)),
            max_abs=10.0,
        )
        self.whiten = Whiten(num_groups=1, whitening_limit=whitening_schedule(7.5), prob=(0.025, 0.25), grad_scale=0.01)
        self.out_proj = ActivationDropoutAndLinear(
            channels, channels, activation="SwooshR", dropout_p=0.0, initial_scale=0.05
        )

    def forward(self, x: Tensor, src_key_padding_mask: Tensor | None = None, chunk_size: int = -1) -> Tensor:
        """Offline, or chunk-causal where `causal`.

        Args:
            x: (T, batch, channels).
            src_key_padding_mask: bools or integers (batch, T), True for padding, which the convolution sees as zeros.
            chunk_size: frames per chunk; -1 for no chunks.

        Returns:
            (T, batch, channels).

        Raises:
            ValueError: there are chunks but the module was not made causal.
        """
        self._check_chunks(chunk_size)
        hidden = self.in_proj(x)
        return self.out_proj(
            self.middle(hidden, None, src_key_padding_mask=src_key_padding_mask, chunk_size=chunk_size)[0]
        )

    def streaming_forward(self, x: Tensor, cache: Tensor, src_key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """One chunk of a stream.

        Args:
            x: (T, batch, channels).
            cache: (batch, channels, kernel_size // 2), left context of the convolution.
            src_key_padding_mask: bools or integers (batch, T), True for padding.

        Returns:
            (T, batch, channels), and the next `cache`.
        """
        x, cache = self.middle(self.in_proj(x), cache, src_key_padding_mask=src_key_padding_mask)
        return self.out_proj(x), cache

    def middle(
        self, hidden: Tensor, state: Tensor | None, *, src_key_padding_mask: Tensor | None, chunk_size: int = -1
    ) -> tuple[Tensor, Tensor | None]:
        if state is None:
            x = self._convolve(hidden, src_key_padding_mask, chunk_size)
            return self.whiten(self.balancer2(x.permute(1, 2, 0)).permute(2, 0, 1)), None
        if not self.causal:
            raise ValueError("a stream needs a module made with causal=True")
        x, s = hidden.chunk(2, dim=2)
        _check_padding(src_key_padding_mask, *x.shape[:2])
        x = _gated(x * self.sigmoid(s), src_key_padding_mask)
        x, state = self.depthwise_conv.streaming_forward(x, cache=state)
        return x.permute(2, 0, 1), state

    def activated(self, x: Tensor) -> Tensor:
        return self.out_proj.activated(x)

    def plan(self, site: Site, *, src_key_padding_mask: Tensor | None, chunk_size: int = -1) -> Plan | None:
        if self.out_proj.dropout_p != 0.0:  # also a schedule
            return None
        self._check_chunks(chunk_size)
        frames, batch, channels = site.shape
        _check_padding(src_key_padding_mask, frames, batch)
        if chunk_size == 0:
            raise ValueError("chunk_size must not be 0")
        conv, padding = _parameters_of(self.depthwise_conv), as_mask("src_key_padding_mask", src_key_padding_mask)
        if len(conv) == 2:  # whatever `causal` says
            if chunk_size >= 0:
                return None
            conv = *conv, None, None, None
        gate = self.balancer1.change(site.hidden, channels)
        trained = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in conv)
        result = site.hidden or trained
        changes = acting(self.balancer2.change(result, channels), self.whiten.change(result, channels))
        launchers = in_layer(site.device, site.low)
        return Plan(ConvMiddle(launchers, chunk_size, gate, changes), (*conv, padding))

    def in_place(
        self,
        backend: SettledBackend,
        hidden: Tensor,
        state: Tensor | None,
        *,
        src_key_padding_mask: Tensor | None,
        chunk_size: int = -1,
    ) -> tuple[Tensor, Tensor | None]:
        self._check(hidden, state, src_key_padding_mask, chunk_size)
        where = {"chunk_size": chunk_size} if state is None else {"left": state.contiguous()}
        conv = _parameters_of(self.depthwise_conv)
        masked = {"key_padding_mask": src_key_padding_mask, **where}
        return infer_conv_module(hidden, self.in_proj.bias, *conv, **masked, backend=backend)

    def one_kernel(
        self,
        backend: SettledBackend,
        src: Tensor,
        state: Tensor | None,
        *,
        src_key_padding_mask: Tensor | None,
        chunk_size: int = -1,
    ) -> tuple[Tensor, Tensor] | None:
        if state is None:
            return None
        self._check(src, state, src_key_padding_mask, chunk_size)
        first, last, conv = self.in_proj, self.out_proj, self.depthwise_conv.parameters_of_op()
        inside = first.weight, first.bias, state, *conv, src_key_padding_mask
        return stream_conv_module(src, *inside, last.weight, last.bias, backend=backend)

    def _check_chunks(self, chunk_size: int) -> None:
        if chunk_size >= 0 and not self.causal:
            raise ValueError(f"chunk_size: {chunk_size} needs a module made with causal=True")

    def _check(self, x: Tensor, state: Tensor | None, padding: Tensor | None, chunk_size: int) -> None:
        """Raises what the modules would."""
        _check_padding(padding, *x.shape[:2])
        if chunk_size == 0:
            raise ValueError("chunk_size must not be 0")
        self._check_chunks(chunk_size)
        if state is None:
            return
        if not self.causal:
            raise ValueError("a stream needs a module made with causal=True")
        if state.shape[2] != self.depthwise_conv.kernel_size // 2:
            wanted = self.depthwise_conv.kernel_size // 2
            raise ValueError(f"cache: wanted {wanted} frames along dimension 2, got {tuple(state.shape)}")

    def _convolve(self, projected: Tensor, padding: Tensor | None, chunk_size: int) -> Tensor:
        """Gate, zeros on padding and convolution, (T, batch, channels): one op, where it may leave out all calls."""
        x, s = split(projected, [projected.shape[2] // 2] * 2)
        _check_padding(padding, *x.shape[:2])
        s = self.balancer1(s)
        x = self.activation1(x)
        conv = self.depthwise_conv
        if not plain_parts(self, When.ANY) >= {"sigmoid", "activation2", "depthwise_conv"}:
            x = _gated(self.activation2(x * self.sigmoid(s)), padding)
            x = conv(x) if chunk_size < 0 else conv(x, chunk_size=chunk_size)
            return compact(x.permute(2, 0, 1))
        if isinstance(conv, ChunkCausalDepthwiseConv1d):
            return chunk_conv_module(x, s, *_parameters_of(conv), chunk_size, padding)
        return conv_module(x, s, conv.weight, conv.bias, padding)


def _parameters_of(conv: nn.Module) -> tuple[Tensor | None, ...]:
    """The parameters of either convolution, in the order in which the ops take them."""
    return conv.parameters_of_op() if isinstance(conv, ChunkCausalDepthwiseConv1d) else (conv.weight, conv.bias)


def _gated(x: Tensor, padding: Tensor | None) -> Tensor:
    """The gated input (T, batch, channels) with zeros on padding, as (batch, channels, T)."""
    x = x.permute(1, 2, 0)
    padding = as_mask("src_key_padding_mask", padding)
    return x if padding is None else fill(x, padding.unsqueeze(1), 0.0)


def _check_padding(padding: Tensor | None, frames: int, batch: int) -> None:
    if padding is not None and padding.shape != (batch, frames):
        raise ValueError(f"src_key_padding_mask: wanted shape {(batch, frames)}, got {tuple(padding.shape)}")


def _check_odd(kernel_size: int) -> None:
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
