"""ScaledAdam as a torch.optim.Optimizer: its arguments, parameter groups, checkpoints and diagnostics.

The mathematics of the step is in `zipformer_kernels.ops.scaled_adam.reference`, the layout of the state in
`zipformer_kernels.optim.state`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zipformer_kernels.core.private import disable_dynamo
from zipformer_kernels.ops import scaled_adam
from zipformer_kernels.optim.diagnostics import GroupDiagnostics, PendingDiagnostics
from zipformer_kernels.optim.gradients import gradients
from zipformer_kernels.optim.loading import fitted
from zipformer_kernels.optim.packed import Packed, check_places
from zipformer_kernels.optim.rows import same_values
from zipformer_kernels.optim.shards import local, reducer
from zipformer_kernels.optim.state import gather


class ScaledAdam(Optimizer):
    """Adam with each tensor's step proportional to its root mean square, and with its scale learnt as well.

    It agrees with upstream's ``ScaledAdam`` step for step, and differs on purpose in these points only:

    - A step whose gradient norm is not finite, in any group, changes no parameter, moment or step count:
      training goes on as if that batch had never been. Such steps are counted (`diagnostics`). Upstream lets
      NaN into every parameter, and takes an infinite norm for a batch of zero gradients.
    - `step` never waits for the device and can be captured in a CUDA graph, after at least one step outside
      of it. Give `lr` as a tensor of one element if it is to change between replays.
    - Clipping is not logged, but told on request (`diagnostics`).
    - A group added with `add_param_group` is stepped; upstream passes over it.
    - float64 parameters have float64 state.

    A parameter without a gradient is treated as if its gradient were zero, so its momentum still moves it,
    whether it requires gradients or not. Gradients may have another floating dtype than their parameter. The
    state is two tensors a parameter, in its shape, in float32, and a few numbers. Under
    `torch.amp.GradScaler` gradients are unscaled on the fly, and overflow is handled without waiting.

    The step runs on the backend that `zipformer_kernels.use_backend` or the environment asks for, by default the best
    one for the parameters' device. Parameters may be DTensors (`fully_shard`, tensor parallelism): each process then
    steps its shards, and one all-reduce adds up the sums over tensors. Every process must call `step` together.

    Args:
        params: parameters; (name, parameter) pairs; or dicts with either under "params", or pairs under
            "named_params", and any of the options below, which then hold for that group. Names serve
            `diagnostics`.
        lr: learning rate, a number or a one-element tensor; recipes start near 0.04 and use `Eden`.
        clipping_scale: gradients are scaled down where their norm, over the group and weighted by each
            tensor's rms, exceeds this times the median of recent norms. None: no clipping.
        betas: decay rates of the momentum and of the second moment, in [0, 1).
        scalar_lr_scale: factor on the learning rate for the scales of tensors and for one-element parameters.
        eps: added to every denominator, positive.
        param_min_rms: a tensor of smaller rms steps as if it had this one, and its scale is not moved.
        param_max_rms: a tensor's scale is moved so that its rms stays below this.
        scalar_max: one-element parameters are clamped to [-scalar_max, scalar_max].
        size_update_period: steps between updates of the scales. Fixed once a group has stepped.
        clipping_update_period: steps over which the median of norms is taken. Fixed once a group has stepped.
        parameters_names: the names of each group's parameters, as older recipes give them.

    Raises:
        ValueError: an option is out of its range, a parameter appears twice, or the parameters of a group
            are on several devices (at the first step).
        TypeError: a parameter is no floating-point tensor; a gradient is not dense (in `step`).

    Source: ``ScaledAdam`` in upstream's ``optim.py``; section 3.5 and appendix A of the paper
    (arXiv:2310.11230).
    """

    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf here instead of waiting

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 3e-02,
        clipping_scale: float | None = None,
        betas: tuple[float, float] = (0.9, 0.98),
        scalar_lr_scale: float = 0.1,
        eps: float = 1.0e-08,
        param_min_rms: float = 1.0e-05,
        param_max_rms: float = 3.0,
        scalar_max: float = 10.0,
        size_update_period: int = 4,
        clipping_update_period: int = 100,
        parameters_names: Sequence[Sequence[str]] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "clipping_scale": clipping_scale,
            "betas": betas,
            "scalar_lr_scale": scalar_lr_scale,
            "eps": eps,
            "param_min_rms": param_min_rms,
            "param_max_rms": param_max_rms,
            "scalar_max": scalar_max,
            "size_update_period": size_update_period,
            "clipping_update_period": clipping_update_period,
        }
        self._forget()
        super().__init__(params, defaults)
        if parameters_names is not None:
            if len(parameters_names) != len(self.param_groups):
                raise ValueError(
                    f"parameters_names must have names for {len(self.param_groups)} groups, got {len(parameters_names)}"
                )
            for group, names in zip(self.param_groups, parameters_names, strict=True):
                _check_parameters(group["params"], names)
                group["param_names"] = list(names)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, in any form that the constructor takes. Parameters without a name are numbered."""
        group = dict(param_group)
        if ("params" in group) == ("named_params" in group):
            raise ValueError(f"a parameter group needs 'params' or 'named_params', got the keys {sorted(group)}")
        entries = group.pop("named_params") if "named_params" in group else group["params"]
        if isinstance(entries, set):
            raise TypeError("params must be in a fixed order, got a set")
        entries = [entries] if isinstance(entries, Tensor) else list(entries)
        place = len(self.param_groups)
        names = [entry[0] if isinstance(entry, tuple) else f"{place}.{i}" for i, entry in enumerate(entries)]
        group["param_names"] = list(group.get("param_names", names))
        group["params"] = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
        _check_parameters(group["params"], group["param_names"])
        _check_options({**self.defaults, **group})
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Takes one step.

        Args:
            closure: evaluates the model and its gradients, and returns the loss, which is passed on.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @disable_dynamo  # a compiled training step breaks off here: addresses are nothing that it could record
    def _step(self) -> None:
        groups = self._bind()
        found_inf = getattr(self, "found_inf", None)  # GradScaler's sum over no gradients is a plain 0
        if groups:
            scaled_adam.step(
                groups,
                loss_scale=getattr(self, "grad_scale", None),
                found_inf=local(found_inf) if isinstance(found_inf, Tensor) else None,
                reduce=self._reduce,
                memory=self._memory,
            )

    def diagnostics(self) -> list[GroupDiagnostics]:
        """How clipping has been doing, for each group that has stepped. Waits for the device."""
        return self.start_diagnostics().result()

    def start_diagnostics(self) -> PendingDiagnostics:
        """Starts to read how clipping has been doing as of now, without waiting for the device."""
        return PendingDiagnostics(
            [(packed.statistics, self.param_groups[i]) for i, packed in sorted(self._packed.items())]
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, copying it, onto the parameters' devices.

        Args:
            state_dict: what `state_dict` returned, or that of upstream's ScaledAdam (in an icefall checkpoint, its
                "optimizer"), with which training goes on as it would have there. Parameters are told apart by their
                names where both have names, and else by their order.
        Raises:
            ValueError: it is not such a state, or does not fit the parameters.
        """
        # torch casts the state to the parameters' dtype: take it as it was when all hooks had had their say.
        given: dict[str, Any] = {}

        def fit(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            given.update(fitted(final, self.param_groups))
            return given

        hook = self.register_load_state_dict_pre_hook(fit)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for saved, group in zip(given["param_groups"], self.param_groups, strict=True):
            for index, p in zip(saved["params"], group["params"], strict=True):
                if index in given["state"]:
                    self.state[p] = {
                        name: value.to(p.device, copy=True) if isinstance(value, Tensor) else value
                        for name, value in given["state"][index].items()
                    }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Drops what is only a faster way to the state and the parameters; the next step makes it again."""
        self._packed: dict[int, Packed] = {}  # by position in param_groups
        self._entries: list[Any] = []  # of `state`, as it was when the last step had packed it
        self._memory: dict[Any, Any] = {}  # the backends'
        self._reduce: Callable[[Tensor], None] | None = None

    def _reducer(self) -> Callable[[Tensor], None] | None:
        groups = [group for group in self.param_groups if group["params"]]
        return reducer(
            [p for group in groups for p in group["params"]],
            [name for group in groups for name in group["param_names"]],
        )

    def _bind(self) -> list[scaled_adam.Group]:
        """The groups as the step takes them, packed again where anything has become of parameters or state."""
        intact = same_values(self.state, self._entries)
        packed: dict[int, Packed] = {}
        for i, group in enumerate(self.param_groups):
            if not group["params"]:
                continue
            previous = self._packed.get(i)
            if intact and previous is not None and previous.holds(group["params"]):
                packed[i] = previous
                continue
            _check_parameters(group["params"], group["param_names"])
            packed[i] = gather(group, self.state, previous)
        if packed != self._packed:
            self._packed, self._entries = packed, list(self.state.values())
            self._memory.clear()
            self._reduce = self._reducer()
        if any(state.moved for state in packed.values()):
            names = [self.param_groups[i]["param_names"] for i in packed]
            check_places([pair for pair in zip(packed.values(), names, strict=True) if pair[0].unreadable is None])
            for state in packed.values():
                state.moved = False
        return [self._group(i) for i in packed]

    def _group(self, index: int) -> scaled_adam.Group:
        """One group as the step takes it: its state, its gradients and options."""
        group, packed = self.param_groups[index], self._packed[index]
        names = group["param_names"]
        for option, vector in (
            ("size_update_period", packed.statistics.scale_grads),
            ("clipping_update_period", packed.statistics.norms),
        ):
            if group[option] != len(vector):
                raise ValueError(f"{option} is fixed once a group has stepped: got {group[option]} after {len(vector)}")
        look, dtypes, reason = gradients(packed, names)
        reason = packed.unreadable or reason
        return scaled_adam.Group(
            packed.tensors(),
            look.grads,
            packed.exp_avg_sq,
            packed.delta,
            packed.single,
            packed.statistics,
            scaled_adam.Hyper(**{name: group[name] for name in _HYPER}),
            packed.dtypes | dtypes,
            reason,
            look.places if reason is None else None,
        )


_HYPER = tuple(option.name for option in fields(scaled_adam.Hyper))


def _check_parameters(params: list[Tensor], names: list[str]) -> None:
    if len(params) != len(names):
        raise ValueError(f"param_names must name each of the {len(params)} parameters, got {len(names)} names")
    seen: dict[int, str] = {}
    for p, name in zip(params, names, strict=True):
        if not isinstance(p, Tensor):
            raise TypeError(f"params must hold tensors, got {type(p).__name__} for {name!r}")
        if not p.is_floating_point():
            raise TypeError(f"params must be real floating-point tensors, got {p.dtype} for {name!r}")
        if id(p) in seen:
            raise ValueError(f"a parameter must appear once, got it as {seen[id(p)]!r} and as {name!r}")
        seen[id(p)] = name


def _check_options(options: dict[str, Any]) -> None:
    def require(name: str, good: bool, wanted: str) -> None:
        if not good:
            raise ValueError(f"{name} must be {wanted}, got {options[name]}")

    lr, clipping_scale, betas = options["lr"], options["clipping_scale"], options["betas"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must be a number or a one-element tensor, got shape {tuple(lr.shape)}")
    else:
        require("lr", lr >= 0, "at least 0")
    require("clipping_scale", clipping_scale is None or clipping_scale > 0, "None or positive")
    require("betas", len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")
    for name in ("eps", "param_max_rms", "scalar_max"):
        require(name, options[name] > 0, "positive")
    for name in ("scalar_lr_scale", "param_min_rms"):
        require(name, options[name] >= 0, "at least 0")
    for name in ("size_update_period", "clipping_update_period"):
        require(name, isinstance(options[name], int) and options[name] >= 1, "an integer of at least 1")
