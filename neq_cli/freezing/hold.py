"""A Hold puts frozen sets in force on a model: fewer gradients are computed, and rows stand still."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from neq_cli.freezing.anatomy import Anatomy
from neq_cli.freezing.backward.dispatch import Dispatch
from neq_cli.freezing.backward.sliced import BackwardMode, SlicedBackward
from neq_cli.freezing.changes import Places
from neq_cli.freezing.model.front import NO_REST
from neq_cli.freezing.rows.handed_over import Hand
from neq_cli.freezing.rows.keeper import RowKeeper
from neq_cli.freezing.rows.zeroed import Unreached


class Hold:
    """Holds what is frozen in a model and its optimiser, as they were when the ``anatomy`` was studied.

    The Freezer makes one, and another when it finds that model or optimiser have changed. ``wrapped``: the model is
    inside a DistributedDataParallel, which would give zeros to parameters that no error reaches. ``seen``: of a sharded
    model, what stands in a parameter's place while its module runs.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        anatomy: Anatomy,
        mode: BackwardMode,
        dispatch: Dispatch,
        *,
        compiled: bool,
        wrapped: bool,
        discard_momentum: bool,
        row_wise: bool,
        seen: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.anatomy = anatomy
        self.mode = mode
        self.compiled = compiled
        self.wrapped = wrapped
        self.trainable: Mapping[str, Tensor] = {}
        layers = anatomy.neurons.layers
        self.keeper = RowKeeper(model, optimizer, layers, discard_momentum=discard_momentum, row_wise=row_wise)
        # Weakly: gradient plans lie where compiled code finds them, and shall not keep model and optimiser in memory.
        keeper, through_autograd = weakref.ref(self.keeper), anatomy.attached or compiled

        def hand(name: str) -> Hand | None:
            there = keeper()
            return None if there is None or through_autograd else there.hand_for(name)

        self.slicing = SlicedBackward(
            model,
            layers,
            anatomy.functional,
            anatomy.dense_because,
            mode,
            dispatch,
            compiled=compiled,
            attached=anatomy.attached,
            hand=hand,
            seen=seen,
        )
        self.unreached = Unreached([], [])
        self._places = Places(model, ())
        self._settling: list[RemovableHandle] = [
            one.register_step_post_hook(self.slicing.settle) for one in self.keeper.optimizers
        ]

    def put_in_force(
        self, trainable: Mapping[str, Tensor], still: frozenset[str] = frozenset(), *, rests: bool = False
    ) -> None:
        """Hold from now on what ``trainable`` (bool, [neurons], by layer) leaves out, as it is at this moment.

        ``still``: parameters outside neurons that are held as well. ``rests``: the front of it runs as at inference.
        """
        self.trainable = trainable
        self.slicing.remove()  # modules are looked at as they are of their own
        rest = self.anatomy.rest(self.model, trainable, still) if rests else NO_REST
        self.slicing.put_in_force(trainable, still, rest)
        held = trainable
        if self.mode == "truncated":
            # What no error reaches has nothing to learn from: it is paused like what is frozen.
            reached = self.anatomy.reached(trainable, self.mode, compiled=self.compiled, still=still)
            self._leave_unreached()
            held = {name: rows & (name in reached) for name, rows in trainable.items()}
        self.keeper.keep(held, still)
        frozen = [name for name, rows in held.items() if not bool(rows.all())]
        layers = self.anatomy.neurons.layers
        self._places = Places(self.model, {rows.parameter for name in frozen for rows in layers[name].rows})

    def replaced(self) -> list[str]:
        """Return the layers with frozen rows whose parameters the model does not have any more."""
        started = time.perf_counter()
        left = self._places.left()
        layers = self.anatomy.neurons.layers.items() if left else ()
        names = [name for name, layer in layers if any(rows.parameter in left for rows in layer.rows)]
        self.keeper.seconds += time.perf_counter() - started
        return names

    @property
    def frozen_whole(self) -> frozenset[str]:
        """The names of the parameters that nothing is known to change while the sets are in force."""
        # Other optimisers may put averages into a model's weights and take them out again.
        whole = {id(one) for one in self.keeper.discarding.whole} if self.keeper.by_element else set()
        return frozenset(name for name, one in self.keeper.parameters.items() if id(one) in whole)

    def rows_computed(self) -> dict[str, int]:
        """Return by layer how many rows the last backward pass computed, where that is known."""
        computed = {name: plan.rows_computed() for name, plan in self.slicing.plans.items()}
        return {name: rows for name, rows in computed.items() if rows is not None}

    @property
    def suspended(self) -> bool:
        """Whether gradients are PyTorch's own at present."""
        return self.slicing.suspended

    def suspend(self) -> None:
        """Have PyTorch compute all gradients until ``resume``; rows are held around the optimiser's steps as ever."""
        self.slicing.suspend()
        self.keeper.suspend()
        self.unreached.remove()

    def resume(self) -> None:
        """Compute fewer gradients again."""
        self.slicing.resume()
        self.keeper.resume()
        self._leave_unreached()

    def take_over(self, before: Hold) -> None:
        """Go on in the place of the hold ``before``, which lets go."""
        before.remove()
        self.keeper.seconds = before.keeper.seconds
        self.keeper.suspended, self.slicing.suspended = before.keeper.suspended, before.slicing.suspended

    def remove(self) -> None:
        """Put model and optimiser back as they were; nothing is in force any more."""
        self.trainable = {}
        for hook in self._settling:
            hook.remove()
        self.keeper.remove()
        self.slicing.remove()
        self.unreached.remove()
        self._places = Places(self.model, ())

    def _leave_unreached(self) -> None:
        """Leave parameters outside neurons that nothing reaches without a gradient; a wrapper would give them zeros."""
        self.unreached.remove()
        # What is compiled passes zeros on to all of them, wrapped or not.
        cut_off = self.mode == "truncated" and self.wrapped and not self.compiled and not self.suspended
        names = self.anatomy.unreached_outside(self.trainable) if cut_off and self.trainable else []
        parameters = self.keeper.parameters
        own = [parameters[name] for name in names]
        self.unreached = Unreached(own, [one for name, one in parameters.items() if name not in names])
