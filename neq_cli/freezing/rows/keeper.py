"""A RowKeeper keeps frozen rows and their optimiser state bit-identical around ``optimizer.step()``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from neq_cli.freezing.model.neurons import Layer, RowLayout
from neq_cli.freezing.rows.frozen_rows import FrozenRows, Writer
from neq_cli.freezing.rows.optimizers import (
    check_optimizer,
    first_after_step,
    make_hookable,
    refuse_by_name,
    row_state,
    state_of,
    with_inner,
)
from neq_cli.freezing.rows.zeroed import Discarding


class RowKeeper:
    """Keeps the frozen rows of an optimiser's parameters, and their row-shaped state, from one epoch to the next.

    When backward ends, a parameter with some frozen rows has zeros there and one with all rows frozen has no gradient,
    so that gradient clipping and GradScaler see what trains. ``discard_momentum`` follows the authors' code: frozen
    rows' momentum (SGD's buffer, Adam's exp_avg) is zeroed and Adam's exp_avg_sq decays, instead of being held.
    ``seconds`` is what the hooks around the optimiser's steps took so far, on the clock of the host.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        layers: Mapping[str, Layer],
        *,
        discard_momentum: bool,
        row_wise: bool = False,
    ) -> None:
        self.parameters = dict(model.named_parameters())
        if row_wise:
            refuse_by_name(optimizer)
        else:
            check_optimizer(optimizer, layers, self.parameters)
        self.optimizers = with_inner(optimizer)
        self.layers = layers
        self.discard_momentum = discard_momentum
        self.discarding = Discarding([])
        self.kept: list[FrozenRows] = []
        self.unborn: list[FrozenRows] = []  # those that no step has updated yet, so that state may still come
        self.writer = Writer()
        self.stale = False
        self.suspended = False
        self.seconds = 0.0
        self.hooks: list[RemovableHandle] = []
        for one in self.optimizers:
            self._put_around_steps(one)
        # On every module, for a part of the model may be loaded alone.
        for module in model.modules():
            self.hooks.append(module.register_load_state_dict_post_hook(_ForgetOnLoad(self)))  # type: ignore[no-untyped-call]

    def _put_around_steps(self, optimizer: torch.optim.Optimizer) -> None:
        make_hookable(optimizer)
        self.hooks += [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            # Before other hooks there, which may average the weights: they shall see the rows as they are held.
            first_after_step(optimizer, lambda *_: self._after_step(optimizer)),
            optimizer.register_load_state_dict_post_hook(lambda *_: self.forget()),
        ]

    def keep(self, trainable: Mapping[str, Tensor], still: Iterable[str] = ()) -> None:
        """Keep from now on what ``trainable`` (bool, [neurons], per layer) leaves out, as it is at this moment.

        ``still``: parameters outside neurons that are kept as well, whole.
        """
        frozen = [_whole(self.parameters[name]) for name in still]
        for name, (layout, mask) in self._frozen_rows(trainable).items():
            parameter = self.parameters[name]
            if mask.any():
                frozen.append(FrozenRows(parameter, layout, mask))
        self.discarding.remove()
        self.discarding = Discarding(frozen)
        self.discarding.everything()
        if self.suspended:
            self.discarding.remove()
        # The optimiser skips what has no gradient: a parameter whose rows are all frozen stays as it is.
        self.kept = [one for one in frozen if not one.whole or self.discard_momentum]
        self.refresh()
        if any(group.get("train_mode") is False for one in self.optimizers for group in one.param_groups):
            # A schedule-free optimiser shows its average now; the weights that it trains come back before it steps.
            self.forget()

    def suspend(self) -> None:
        """Leave gradients alone until ``resume``; what is frozen is held around the optimiser's steps all the same."""
        self.suspended = True
        self.discarding.remove()

    def resume(self) -> None:
        """Discard frozen rows' gradients again, from the next backward pass on."""
        self.suspended = False
        self.discarding.attach()

    def forget(self) -> None:
        """Take what the rows and their state are at the next optimiser step as what they are held at."""
        self.stale = True

    def refresh(self) -> None:
        """Take the rows' present values and state as those to be held; needed after either was loaded."""
        self.stale = False
        for one in self.kept:
            one.held = {}
        self.unborn = [one for one in self.kept if not one.whole]
        self._look()
        self._write()

    def remove(self) -> None:
        """Take all hooks off again."""
        self.discarding.remove()
        for hook in self.hooks:
            hook.remove()
        self.discarding, self.writer = Discarding([]), Writer()
        self.kept = self.unborn = []

    def _frozen_rows(self, trainable: Mapping[str, Tensor]) -> dict[str, tuple[RowLayout, Tensor]]:
        """Return each owned parameter's layout and which rows are frozen; shared rows train if any owner does."""
        masks: dict[str, tuple[RowLayout, Tensor]] = {}
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
        # Once more: what combines gradients after backward (DDP) may have written them again. A parameter without a
        # gradient must be skipped, and state born in this step shall know none of a frozen row; else rows are written
        # back anyway, whatever their gradient was.
        if any(one.parameter.grad is not None for one in self.unborn):
            self.discarding.everything()
        else:
            self.discarding.drop_whole()
        self.seconds += time.perf_counter() - started

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        started = time.perf_counter()
        if self.discard_momentum:
            self._decay_second_moments(optimizer)
        if any(one.changed(state_of(self.optimizers, one.parameter)) for one in self.kept):
            self._look()
        self._write()
        self.unborn = [one for one in self.unborn if one.parameter.grad is None]
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def _look(self) -> None:
        """Find what is to be written: after rows were frozen or loaded, and where state was born or replaced."""
        self.writer = Writer()
        for one in self.kept:
            tensors = {"": one.parameter, **row_state(self.optimizers, one.parameter)}
            one.look(state_of(self.optimizers, one.parameter), tensors)
            for key, tensor in tensors.items():
                if key not in one.held:
                    one.held[key] = one.read(tensor)
                    if self.discard_momentum and key.split(" ")[0] in ("momentum_buffer", "exp_avg"):
                        one.held[key].zero_()
                self.writer.add(one, key, tensor)

    @torch.no_grad()
    def _write(self) -> None:
        self.writer.write()

    @torch.no_grad()
    def _decay_second_moments(self, optimizer: torch.optim.Optimizer) -> None:
        alike = [number for number, one in enumerate(self.optimizers) if one.state is optimizer.state]
        if self.optimizers[alike[-1]] is not optimizer:
            return  # a wrapper, which has the very state of the one inside
        key = f"exp_avg_sq {alike[0]}" if alike[0] else "exp_avg_sq"
        held = {id(one.parameter): one.held[key] for one in self.kept if key in one.held}
        # Set by GradScaler while a fused optimiser steps: where it is not zero, the step is none.
        skipped: Tensor | None = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            moments = [held[id(parameter)] for parameter in group["params"] if id(parameter) in held]
            if "betas" in group and moments:
                decay = group["betas"][1]
                torch._foreach_mul_(moments, decay if skipped is None else torch.where(skipped > 0, 1.0, decay))


def _whole(parameter: nn.Parameter) -> FrozenRows:
    return FrozenRows(parameter, RowLayout("flat"), torch.ones(parameter.numel(), dtype=torch.bool, device="cpu"))


class _ForgetOnLoad:
    """A hook on the model that copies and pickles of the model do not share: there it does nothing."""

    def __init__(self, keeper: RowKeeper | None = None) -> None:
        self.keeper = keeper

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        if self.keeper is not None:
            self.keeper.forget()

    def __reduce__(self) -> tuple[type[_ForgetOnLoad], tuple[()]]:
        return (_ForgetOnLoad, ())
