"""The base of every module here."""

from __future__ import annotations

from torch import nn


class Module(nn.Module):
    """A torch.nn.Module that torch.jit.script refuses at once, alone and as a part of another module."""

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script asks of every module before it compiles any.

        Raises:
            NotImplementedError: always. TorchScript compiles the source of every method, and has no words for the
                choice of a backend, handles of attention weights, rules of masks and context managers.
        """
        raise NotImplementedError(
            f"torch.jit.script cannot compile {type(self).__name__}. torch.jit.trace makes TorchScript of it, for "
            f"every length and batch size. To script a converted model, call zipformer_kernels.revert(model) first. "
            f"The weights of a model built here load into upstream's class, which has the same names"
        )
