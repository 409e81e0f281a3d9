"""Frozen rows stay bit-identical around ``optimizer.step()``, whatever row-wise optimiser: weights and its state."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from neq_cli.errors import FreezingError
from neq_cli.freezing.neurons import Layer, Layout

ROW_WISE_OPTIMIZERS = frozenset(
    ["SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta", "ASGD"]
)
MIXING_OPTIMIZERS: Mapping[str, str] = {
    "LBFGS": "its update mixes all parameters",
    "Adafactor": "its second moments mix the rows of a weight",
    "Muon": "it orthogonalises each weight, which mixes the rows",
    "SparseAdam": "it takes sparse gradients only",
}


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise FreezingError where the optimiser does not update row by row, so that frozen rows could not be kept.

    Classes outside torch.optim are tried on two small weights whose gradients agree in the first row only.
    """
    for kind in type(optimizer).__mro__:
        if _is_stock(kind) and kind.__name__ in MIXING_OPTIMIZERS:
            reason = MIXING_OPTIMIZERS[kind.__name__]
            raise FreezingError(
                f"optimizer: {kind.__name__} cannot freeze neurons ({reason}); use SGD, AdamW or RMSprop"
            )
    known = _is_stock(type(optimizer)) and type(optimizer).__name__ in ROW_WISE_OPTIMIZERS
    if not known and not _updates_row_by_row(optimizer):
        raise FreezingError(
            f"optimizer: {type(optimizer).__name__} mixes the rows of a weight, so that none can be frozen; "
            "use one that updates element by element, such as SGD or AdamW"
        )


def _is_stock(kind: type) -> bool:
    return kind.__module__.startswith("torch.optim")


def _updates_row_by_row(optimizer: torch.optim.Optimizer) -> bool:
    generator = torch.Generator().manual_seed(0)
    start, common = torch.randn(2, 4, 3, generator=generator, device="cpu")
    results = []
    for scale in (1.0, 3.0):
        weight = nn.Parameter(start.clone())
        settings = {key: value for key, value in optimizer.defaults.items() if key not in ("fused", "foreach")}
        try:
            # The same draws for both, where the optimiser adds noise; the caller's random numbers stay as they are.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                trial = type(optimizer)([weight], **settings)
                for _ in range(3):
                    weight.grad = common.clone()
                    weight.grad[1:] *= scale
                    trial.step()
        except Exception as error:
            name = type(optimizer).__name__
            raise FreezingError(f"optimizer: {name} could not be tried for row-wise updates: {error}") from error
        _row_state(trial, weight)
        results.append(weight.detach()[0])
    return torch.equal(*results)


def _row_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the parameter's state tensors that have its shape; scalars, such as Adam's ``step``, advance."""
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for key, value in tensors.items():
        if value.shape != parameter.shape and value.numel() != 1:
            raise FreezingError(
                f"optimizer: {type(optimizer).__name__}'s state {key!r} has shape {list(value.shape)} beside a "
                f"parameter of shape {list(parameter.shape)}, so that no row of it can be held"
            )
    # A parameter of one element is all row; a scalar beside it is told apart by its number of dimensions.
    return {key: value for key, value in tensors.items() if value.shape == parameter.shape}


@dataclass(frozen=True)
class _Selection:
    """The frozen rows of a parameter, which may be read and written in anything of its shape."""

    layout: Layout
    index: tuple[Tensor, ...]  # of the frozen rows in the layout's view, on the parameter's device
    whole: bool  # every row of the parameter is frozen

    def read(self, tensor: Tensor) -> Tensor:
        return self.layout.view(tensor.detach())[self.index]  # a copy, as indexing with tensors is

    def write(self, tensor: Tensor, values: Tensor | float) -> None:
        view = self.layout.view(tensor.detach())
        if isinstance(values, float):
            view[self.index] = values
        else:
            view.index_put_(self.index, values.to(view))

    def discard_gradient(self, parameter: Tensor) -> None:
        if self.whole:
            parameter.grad = None
        elif parameter.grad is not None:
            self.write(parameter.grad, 0.0)


@dataclass
class _Frozen:
    """A parameter with frozen rows, and what they and their state are held at."""

    parameter: nn.Parameter
    rows: _Selection
    held: dict[str, Tensor]  # optimiser state by key, and the parameter itself under ""


class RowKeeper:
    """Keeps the frozen rows of an optimiser's parameters, and their row-shaped state, from one epoch to the next.

    When backward ends, a parameter with some frozen rows has zeros there and one with all rows frozen has no gradient,
    so that gradient clipping and GradScaler see what trains. ``discard_momentum`` follows the authors' code: frozen
    rows' momentum (SGD's buffer, Adam's exp_avg) is zeroed and Adam's exp_avg_sq decays, instead of being held.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, layers: Mapping[str, Layer], *, discard_momentum: bool
    ) -> None:
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self.layers = layers
        self.discard_momentum = discard_momentum
        self.parameters = dict(model.named_parameters())
        self.frozen: list[_Frozen] = []
        self.gradient_hooks: list[RemovableHandle] = []
        self.stale = False
        self.seconds = 0.0  # spent around the optimiser's steps so far
        after_step = optimizer.register_step_post_hook(lambda *_: self._after_step())
        # Before other hooks there, which may average the weights: they shall see the rows as they are held.
        optimizer._optimizer_step_post_hooks.move_to_end(after_step.id, last=False)  # type: ignore[attr-defined]
        self.hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            after_step,
            optimizer.register_load_state_dict_post_hook(lambda *_: self.forget()),
            # On every module, for a part of the model may be loaded alone.
            *(m.register_load_state_dict_post_hook(_ForgetOnLoad(self)) for m in model.modules()),  # type: ignore[no-untyped-call]
        ]

    def keep(self, trainable: Mapping[str, Tensor]) -> None:
        """Keep from now on what ``trainable`` (bool, [neurons], per layer) leaves out, as it is at this moment."""
        self._remove_gradient_hooks()
        self.frozen = []
        for name, (layout, mask) in self._frozen_rows(trainable).items():
            parameter = self.parameters[name]
            # Where gradients were switched off since, there is nothing to keep.
            if not mask.any() or not parameter.requires_grad:
                continue
            rows = mask.nonzero().squeeze(1).to(parameter.device)
            selection = _Selection(layout, layout.index(parameter, rows), bool(mask.all()))
            self.frozen.append(_Frozen(parameter, selection, {}))
            selection.discard_gradient(parameter)
            # The hook knows no parameter: one that did would keep it in memory for ever, since autograd holds hooks
            # where Python's garbage collector does not look.
            hook = parameter.register_post_accumulate_grad_hook(selection.discard_gradient)  # type: ignore[no-untyped-call]
            self.gradient_hooks.append(hook)
        self.refresh()

    def forget(self) -> None:
        """Take what the rows and their state are at the next optimiser step as what they are held at."""
        self.stale = True

    def refresh(self) -> None:
        """Take the rows' present values and state as those to be held; needed after either was loaded."""
        self.stale = False
        for frozen in self.frozen:
            frozen.held = {}
        self._restore()

    def remove(self) -> None:
        """Take all hooks off again."""
        self._remove_gradient_hooks()
        for hook in self.hooks:
            hook.remove()
        self.frozen = []

    def _remove_gradient_hooks(self) -> None:
        for hook in self.gradient_hooks:
            hook.remove()
        self.gradient_hooks = []

    def _frozen_rows(self, trainable: Mapping[str, Tensor]) -> dict[str, tuple[Layout, Tensor]]:
        """Return each owned parameter's layout and which rows are frozen; shared rows train if any owner does."""
        masks: dict[str, tuple[Layout, Tensor]] = {}
        for name, layer in self.layers.items():
            for rows in layer.rows:
                if rows.parameter not in masks:
                    count = rows.layout.count(self.parameters[rows.parameter])
                    masks[rows.parameter] = (rows.layout, torch.ones(count, dtype=torch.bool, device="cpu"))
                layout, mask = masks[rows.parameter]
                if rows.layout == layout:  # else shared along different dimensions, and always trainable
                    mask[rows.start : rows.start + rows.count] &= ~trainable[name]
        return masks

    def _before_step(self) -> None:
        started = time.perf_counter()
        if self.stale:
            self.refresh()
        # Once more: what combines gradients after backward (DDP) may have written them again.
        for frozen in self.frozen:
            frozen.rows.discard_gradient(frozen.parameter)
        self.seconds += time.perf_counter() - started

    def _after_step(self) -> None:
        started = time.perf_counter()
        if self.discard_momentum:
            self._decay_second_moments()
        self._restore()
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def _restore(self) -> None:
        for frozen in self.frozen:
            for key, value in {"": frozen.parameter, **_row_state(self.optimizer, frozen.parameter)}.items():
                if key not in frozen.held:  # just frozen, loaded, or state born in this step
                    frozen.held[key] = frozen.rows.read(value)
                    if self.discard_momentum and key in ("momentum_buffer", "exp_avg"):
                        frozen.held[key].zero_()
                if not frozen.rows.whole or self.discard_momentum:
                    frozen.rows.write(value, frozen.held[key])

    def _decay_second_moments(self) -> None:
        decay = {
            id(p): group["betas"][1]
            for group in self.optimizer.param_groups
            if "betas" in group
            for p in group["params"]
        }
        for frozen in self.frozen:
            if "exp_avg_sq" in frozen.held:
                frozen.held["exp_avg_sq"].mul_(decay[id(frozen.parameter)])


class _ForgetOnLoad:
    """A hook on the model that copies and pickles of the model do not share: there it does nothing."""

    def __init__(self, keeper: RowKeeper | None = None) -> None:
        self.keeper = keeper

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        if self.keeper is not None:
            self.keeper.forget()

    def __reduce__(self) -> tuple[type[_ForgetOnLoad], tuple[()]]:
        return (_ForgetOnLoad, ())
