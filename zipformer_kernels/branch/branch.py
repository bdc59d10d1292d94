"""What every residual branch has: two products, and what lies between them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zipformer_kernels.branch.node import Plan, Site
from zipformer_kernels.core.module import Module
from zipformer_kernels.core.op import SettledBackend


class Branch(Module):
    """A module that a layer adds to its input: ``out_proj(activated(middle(in_proj(src))))``.

    Attributes:
        defers_bias: whether `in_place` adds the first product's bias itself, where it reads the product.
        takes_handles: whether ``forward`` takes a handle of attention weights in place of a tensor.
    """

    defers_bias = True
    takes_handles = False

    def middle(self, hidden: Tensor, state: Tensor | None, *context: Any, **settings: Any) -> tuple[Tensor, Any]:
        """What lies between the products, as modules, on any device, with gradients or without.

        Args:
            hidden: the first product, bias included.
            state: left context in a stream; None offline.
            *context, **settings: other arguments of ``forward``, in a stream of ``streaming_forward``.

        Returns:
            What the last module takes, and the next `state`.
        """
        raise NotImplementedError

    def activated(self, x: Tensor) -> Tensor:
        """x behind the activation with which the last module begins, if it has one."""
        return x

    def plan(self, site: Site, *context: Any, **settings: Any) -> Plan | None:
        """How the module runs as one node of the graph, its draws included; None where it cannot, before any draw.

        Without gradients it then runs by `middle`.

        Args:
            site: where.
            *context, **settings: other arguments of ``forward``.
        """
        return None

    def in_place(
        self, backend: SettledBackend, hidden: Tensor, state: Tensor | None, *context: Any, **settings: Any
    ) -> tuple[Tensor, Any]:
        """`activated` of `middle`, without gradients and on a backend that was settled; may overwrite `hidden`."""
        x, state = self.middle(hidden, state, *context, **settings)
        return self.activated(x), state

    def in_parts(self, src: Tensor, *context: Any) -> Tensor | None:
        """src + self(src), of some rows at a time, with gradients or without; None where that cannot be."""
        return None

    def one_kernel(
        self, backend: SettledBackend, src: Tensor, state: Tensor | None, *context: Any, **settings: Any
    ) -> tuple[Tensor, Any] | None:
        """src + self(src) of few rows, and the next `state`; None where there is no kernel for that."""
        return None
