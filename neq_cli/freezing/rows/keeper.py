"""A RowKeeper keeps frozen rows and their optimiser state bit-identical around ``optimizer.step()``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from neq_cli.freezing.model.layers import Layer
from neq_cli.freezing.model.layouts import RowLayout
from neq_cli.freezing.only_here import OnlyHere
from neq_cli.freezing.rows.frozen_rows import FrozenRows
from neq_cli.freezing.rows.handed_over import Hand, hand_for
from neq_cli.freezing.rows.optimizers import (
    check_optimizer,
    first_after_step,
    keeps_no_state,
    make_hookable,
    refuse_by_name,
    row_state,
    steps_by_element,
    with_inner,
)
from neq_cli.freezing.rows.shards import own_rows
from neq_cli.freezing.rows.stepping import SteppingRows
from neq_cli.freezing.rows.writing import WriteBack
from neq_cli.freezing.rows.zeroed import Discarding


class RowKeeper:
    """Keeps the frozen rows of an optimiser's parameters, and their row-shaped state, from one epoch to the next.

    Of a sharded parameter each process keeps the part that it holds.
    Where the optimiser is known to treat each element by itself, a large parameter's few trainable rows step alone,
    from when its state is born. Of what else has frozen rows these are written back after each step.

    When backward ends, a parameter with some frozen rows has zeros there and one with all rows frozen has no gradient,
    so that gradient clipping and GradScaler see what trains. ``discard_momentum`` follows the authors' code: frozen
    rows' momentum (SGD's buffer, Adam's exp_avg) is zeroed and Adam's exp_avg_sq decays, instead of being held.
    ``seconds`` is what the hooks around the optimiser's steps took so far, on the clock of the host.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
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
        self.held: list[FrozenRows] = []  # what is held by either way
        self.unborn: list[FrozenRows] = []  # those that no step has updated yet, so that state may still come
        self.by_element = not discard_momentum and len(self.optimizers) == 1 and steps_by_element(optimizer)
        self.stepping = SteppingRows(optimizer)
        self.writing = WriteBack(self.optimizers, state_later=self.by_element, discard_momentum=discard_momentum)
        self.stale = False
        self.suspended = False
        self.seconds = 0.0
        self.hooks: list[RemovableHandle] = []
        for one in self.optimizers:
            self._put_around_steps(one)
        if self.by_element:
            self._put_around_saves(optimizer)
        # On every module, for a part of the model may be loaded alone.
        for module in model.modules():
            forgetting = OnlyHere(lambda *_: self.forget())
            self.hooks.append(module.register_load_state_dict_post_hook(forgetting))  # type: ignore[no-untyped-call]

    def _put_around_steps(self, optimizer: Optimizer) -> None:
        make_hookable(optimizer)
        self.hooks += [
            optimizer.register_step_pre_hook(lambda _, *call: self._before_step(*call)),
            # Before other hooks there, which may average the weights: they shall see the rows as they are held.
            first_after_step(optimizer, lambda *_: self._after_step(optimizer)),
            optimizer.register_load_state_dict_post_hook(lambda *_: self._lose_state()),
        ]

    def _put_around_saves(self, optimizer: Optimizer) -> None:
        """Have ``state_dict()``, copies and pickles tell the state of all rows."""
        self.hooks += [
            optimizer.register_state_dict_pre_hook(lambda *_: self.writing.write_state()),
            optimizer.register_state_dict_post_hook(self.stepping.complete),
        ]
        vars(optimizer)["__getstate__"] = self._state_for_copies

    def _state_for_copies(self) -> dict[str, Any]:
        self.writing.write_state()
        return self.stepping.state_for_copies()

    def keep(self, trainable: Mapping[str, Tensor], still: Iterable[str] = ()) -> None:
        """Keep from now on what ``trainable`` (bool, [neurons], per layer) leaves out, as it is at this moment.

        ``still``: parameters outside neurons that are kept as well, whole.
        """
        frozen = [_whole(self.parameters[name]) for name in still]
        for name, (layout, mask) in self._frozen_rows(trainable).items():
            parameter, whole = self.parameters[name], bool(mask.all())
            own_layout, own = own_rows(parameter, layout, mask)
            if whole or own.any():
                frozen.append(FrozenRows(parameter, own_layout, own, whole=whole))
        self.discarding.remove()
        self.discarding = Discarding(frozen)
        self.discarding.everything()
        if self.suspended:
            self.discarding.remove()
        self._let_go()
        # The optimiser skips what has no gradient: a parameter whose rows are all frozen stays as it is.
        self.held = [one for one in frozen if self.discard_momentum or not one.whole]
        self._take_hold()
        if any(group.get("train_mode") is False for one in self.optimizers for group in one.param_groups):
            # A schedule-free optimiser shows its average now; the weights that it trains come back before it steps.
            self.forget()

    @property
    def partly(self) -> list[FrozenRows]:
        """The parameters with both kinds of rows."""
        return [one for one in self.held if not one.whole]

    def hand_for(self, name: str) -> Hand | None:
        """Return what takes the gradient of a parameter's trainable rows in the running backward pass, if anything."""
        parameter = self.parameters[name]
        rows = self.stepping.rows.get(id(parameter))
        return None if rows is None or rows.dimension or self.suspended else hand_for(parameter, rows.training)

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

    def remove(self) -> None:
        """Take all hooks off again."""
        self.discarding.remove()
        self._let_go()
        for hook in self.hooks:
            hook.remove()
        vars(self.optimizers[0]).pop("__getstate__", None)
        self.discarding, self.held, self.unborn = Discarding([]), [], []

    def _frozen_rows(self, trainable: Mapping[str, Tensor]) -> dict[str, tuple[RowLayout, Tensor]]:
        """Return each owned parameter's layout and which rows are frozen; shared rows train if any owner does."""
        masks: dict[str, tuple[RowLayout, Tensor]] = {}
        for name, layer in self.layers.items():
            for rows in layer.rows:
                if rows.parameter not in masks:
                    # Of the shape alone: a sharded parameter cannot be viewed by its rows.
                    shape = self.parameters[rows.parameter].shape
                    count = rows.layout.count(torch.empty(shape, device="meta"))
                    masks[rows.parameter] = (rows.layout, torch.ones(count, dtype=torch.bool, device="cpu"))
                layout, mask = masks[rows.parameter]
                if rows.layout == layout:  # else shared along different dimensions, and always trainable
                    mask[rows.start : rows.start + rows.count] &= ~rows.of(trainable[name])
        return masks

    def _take_hold(self) -> None:
        """Hold what is frozen at what it is now, each in its way."""
        self.stale = False
        alone = [one for one in self.held if self._steps_alone(one) and self._is_born(one)]
        written = [one for one in self.held if one not in alone]
        self.stepping.add(alone)
        self.writing.hold(written)
        self.unborn = [one for one in written if not one.whole]

    def _let_go(self) -> None:
        """Make the optimiser's state what it is held at."""
        self.writing.write_state()
        self.writing.hold([])
        self.stepping.remove()

    def _steps_alone(self, one: FrozenRows) -> bool:
        return self.by_element and one.few_train

    def _is_born(self, one: FrozenRows) -> bool:
        return bool(row_state(self.optimizers, one.parameter)) or keeps_no_state(self.optimizers[0], one.parameter)

    def _lose_state(self) -> None:
        self.writing.lose_state()
        self.forget()

    def _before_step(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        call = self.stepping.with_closure_called(arguments, keywords)
        started = time.perf_counter()
        if self.stale:
            self._let_go()
            self._take_hold()
        # Once more: what combines gradients after backward (DDP) may have written them again. A parameter without a
        # gradient must be skipped, and state born in this step shall know none of a frozen row; else rows are written
        # back anyway, whatever their gradient was.
        if any(one.parameter.grad is not None for one in self.unborn):
            self.discarding.everything()
        else:
            self.discarding.drop_whole()
        in_the_optimizer = self.stepping.step()
        self.seconds += time.perf_counter() - started - in_the_optimizer
        return call

    def _after_step(self, optimizer: Optimizer) -> None:
        started = time.perf_counter()
        self.stepping.give_gradients_back()
        self.writing.after_step(optimizer)
        born = [one for one in self.unborn if one.parameter.grad is not None]
        if born:
            self.unborn = [one for one in self.unborn if one not in born]
            alone = [one for one in born if self._steps_alone(one)]
            self.writing.release(alone)
            self.stepping.add(alone)
        self.seconds += time.perf_counter() - started


def _whole(parameter: nn.Parameter) -> FrozenRows:
    every = torch.ones(parameter.numel(), dtype=torch.bool, device="cpu")
    return FrozenRows(parameter, *own_rows(parameter, RowLayout("flat"), every), whole=True)
