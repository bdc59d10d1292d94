"""The feed-forward module."""

from __future__ import annotations

from torch import Tensor, nn

from zipformer_kernels.branch.branch import Branch
from zipformer_kernels.branch.middles.swoosh_linear import SwooshMiddle
from zipformer_kernels.branch.node import Plan, Site, acting
from zipformer_kernels.branch.plain import balancer, made_of
from zipformer_kernels.core.op import SettledBackend
from zipformer_kernels.modules.activation_dropout_linear import ACTIVATIONS, ActivationDropoutAndLinear
from zipformer_kernels.ops.swoosh import swoosh_
from zipformer_kernels.ops.swoosh_linear import infer_feed_forward
from zipformer_kernels.training import Balancer, FloatLike, Whiten, whitening_schedule


@made_of(in_proj=nn.Linear, hidden_balancer=balancer(-1), out_proj=ActivationDropoutAndLinear, out_whiten=Whiten)
class FeedforwardModule(Branch):
    """Linear, SwooshL, dropout with a mask shared over time, linear.

    Args:
        embed_dim: channels of x and of the result.
        feedforward_dim: hidden channels.
        dropout: the rate of the dropout, or its schedule.
    """

    def __init__(self, embed_dim: int, feedforward_dim: int, dropout: FloatLike) -> None:
        super().__init__()
        self.in_proj = nn.Linear(embed_dim, feedforward_dim)
        self.hidden_balancer = Balancer(
            feedforward_dim,
            channel_dim=-1,
            min_positive=0.3,
            max_positive=1.0,
            min_abs=0.75,
            max_abs=5.0,
        )
        self.out_proj = ActivationDropoutAndLinear(
            feedforward_dim,
            embed_dim,
            activation="SwooshL",
            dropout_p=dropout,
            dropout_shared_dim=0,
            bias=True,
            initial_scale=0.1,
        )
        self.out_whiten = Whiten(
            num_groups=1, whitening_limit=whitening_schedule(7.5), prob=(0.025, 0.25), grad_scale=0.01
        )

    def forward(self, x: Tensor) -> Tensor:
        """From (T, batch, embed_dim) to the same shape."""
        return self.out_whiten(self.out_proj(self.middle(self.in_proj(x), None)[0]))

    def middle(self, hidden: Tensor, state: None) -> tuple[Tensor, None]:
        return self.hidden_balancer(hidden), None

    def activated(self, x: Tensor) -> Tensor:
        return self.out_proj.activated(x)

    def plan(self, site: Site) -> Plan | None:
        last, (_, batch, _) = self.out_proj, site.shape
        if last.dropout_shared_dim != 0:
            return None
        change = self.hidden_balancer.change(site.hidden, last.weight.shape[1])
        draws, rate = last.draws((1, batch, last.weight.shape[1]), site.low, site.device)
        whiten = self.out_whiten.change(site.result, site.shape[2])
        return Plan(SwooshMiddle(ACTIVATIONS[last.activation], rate, change), (draws,), acting(whiten))

    def in_place(self, backend: SettledBackend, hidden: Tensor, state: None) -> tuple[Tensor, None]:
        kind = ACTIVATIONS[self.out_proj.activation]
        return swoosh_(hidden, kind, self.in_proj.bias, backend=backend), None

    def one_kernel(self, backend: SettledBackend, src: Tensor, state: None) -> tuple[Tensor, None]:
        first, last = self.in_proj, self.out_proj
        weights = first.weight, first.bias, last.weight, last.bias
        return infer_feed_forward(src, *weights, ACTIVATIONS[last.activation], backend=backend), None
