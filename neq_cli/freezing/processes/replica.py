"""A Replica averages gradients by DistributedDataParallel: what is frozen is neither sent nor waited for."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from neq_cli.errors import FreezingError
from neq_cli.freezing.freezer import Freezer
from neq_cli.freezing.model.observing import is_wrapped
from neq_cli.freezing.only_here import OnlyHere
from neq_cli.freezing.processes.agreement import overwrite_from_first
from neq_cli.freezing.processes.sending import Sending, average
from neq_cli.freezing.rows.shards import is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_IGNORED = "_ddp_params_and_buffers_to_ignore"


class Replica:
    """This process's copy of a model that several train together, wrapped for the frozen sets in force.

    ``model`` is the bare model, or what torch.compile made of it, that ``freezer`` was given; all processes begin with
    process 0's weights and buffers. ``current()`` is the wrapper to train with. Parameters without a trainable row are
    none of its business: they send nothing, and their layers stay cut from autograd's graph. Of the others the
    trainable rows are sent, where that was found to take less time than sending all.

    ``options`` are DistributedDataParallel's own, but for communication hooks. ``find_unused_parameters`` is set where
    the freezer's look at the model met parameters that its output does not depend on, and in truncated mode where
    frozen layers may cut off parameters outside neurons. Gradients are views of what is sent unless
    ``gradient_as_bucket_view`` is false.

    Averages of some rows and of all of them may differ in their last bit where three or more processes add them up,
    for a network adds piece by piece. What is sent is chosen by a rule where ``freezer.dispatch`` is ``fixed``, else
    timed once for each size and share and kept there; choices loaded into it must be loaded before.

    Raises FreezingError where the model is wrapped or sharded already.
    """

    def __init__(
        self,
        model: nn.Module,
        freezer: Freezer,
        process_group: ProcessGroup | None = None,
        *,
        device_ids: list[int] | None = None,
        **options: Any,
    ) -> None:
        if is_wrapped(model):
            raise FreezingError("model: DistributedDataParallel wraps it already; give the Replica the model inside")
        if any(is_sharded(parameter) for parameter in model.parameters()):
            raise FreezingError("model: fully_shard divides it already; train with it as it is, without a Replica")
        self.model = model
        self.freezer = freezer
        # Views: with `.grad` and bucket apart, all gradients would be in memory twice. Frozen rows are discarded in
        # either alike: both are written before `Discarding` is through.
        self.options = {"gradient_as_bucket_view": True, **options, "device_ids": device_ids, "init_sync": False}
        self.process_group = process_group or _default_group()
        overwrite_from_first([*model.parameters(), *model.buffers()], self.process_group)
        freezer.hold.keeper.forget()
        self._sending = Sending(self.process_group, freezer.dispatch)
        self._seen: object = None  # what stood for the sets in force when `_sending` last looked
        self._made_for: tuple[frozenset[int], bool] | None = None
        self._wrapper: DistributedDataParallel | None = None

    @property
    def bytes_sent(self) -> int:
        """Bytes of gradients that this process has handed to all-reduces so far; those of timing are not counted."""
        return self._sending.bytes

    def current(self) -> DistributedDataParallel:
        """Return the wrapper for the sets in force, made anew where it must be; call it when they may have changed.

        The wrapper before is of no use then. All processes must call it alike.
        """
        self._look()
        wanted = (self._ignored(), self._find_unused())
        if self._wrapper is None or wanted != self._made_for:
            if self._wrapper is not None:
                self._wrapper._remove_autograd_hooks()  # type: ignore[no-untyped-call]
                self._wrapper = None  # before the next one's buckets are allocated
            self._wrapper = self._wrap(*wanted)
            self._made_for = wanted
        return self._wrapper

    def _look(self) -> None:
        if self._seen is not self.freezer.hold.keeper.discarding:  # a new one for every new set
            self._seen = self.freezer.hold.keeper.discarding
            self._sending.send(self.freezer.hold.keeper)

    def _ignored(self) -> frozenset[int]:
        """Return the identities of the parameters without a trainable row."""
        if self.freezer.compiled:  # nothing is cut there, and nothing is to be compiled again
            return frozenset()
        whole = frozenset(map(id, self.freezer.hold.keeper.discarding.whole))
        # A wrapper around nothing at all is refused.
        return whole if any(p.requires_grad and id(p) not in whole for p in self.model.parameters()) else frozenset()

    def _find_unused(self) -> bool:
        anatomy, freezer = self.freezer.anatomy, self.freezer
        if "find_unused_parameters" in self.options:
            return bool(self.options["find_unused_parameters"])
        cut = freezer.backward == "truncated" and not freezer.compiled and bool(freezer.hold.keeper.discarding.whole)
        return bool(anatomy.trace.unused) or (cut and bool(anatomy.neurons.outside))

    def _wrap(self, ignored: frozenset[int], find_unused: bool) -> DistributedDataParallel:
        names = [name for name, p in self.model.named_parameters(remove_duplicate=False) if id(p) in ignored]
        own = getattr(self.model, _IGNORED, None)
        # The root's own parameters have another name where the reducer looks for them.
        names += [*(f".{name}" for name in names if "." not in name), *(own or ())]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, names)  # type: ignore[no-untyped-call]
        try:
            wrapper = DistributedDataParallel(
                self.model, process_group=self.process_group, **{**self.options, "find_unused_parameters": find_unused}
            )
        finally:
            self._put_back(own)
        # In a function of its own: annotations that are not evaluated are refused.
        wrapper.register_comm_hook(self._sending, lambda state, bucket: average(state, bucket))
        me = weakref.ref(self)  # the hook shall keep no Replica alive

        def check(module: nn.Module, arguments: Any) -> None:
            replica = me()
            if replica is not None and module.training:
                replica.check(module)

        wrapper.register_forward_pre_hook(OnlyHere(check))
        return wrapper

    def _put_back(self, own: Any) -> None:
        """Leave the model as it was: other wrappers of it are another matter."""
        if own is None:
            delattr(self.model, _IGNORED)
        else:
            setattr(self.model, _IGNORED, own)
        for name, parameter in self.model.named_parameters():
            if name not in (own or ()) and hasattr(parameter, "_ddp_ignored"):
                del parameter._ddp_ignored

    def check(self, wrapper: nn.Module) -> None:
        """Raise FreezingError unless ``wrapper`` fits the sets in force: else parameters would drift apart, unsent."""
        if self._seen is not self.freezer.hold.keeper.discarding:
            if self._made_for != (self._ignored(), self._find_unused()):
                raise FreezingError("replica: the frozen sets have changed; call current() after freezer.step()")
            self._look()
        if wrapper is not self._wrapper:
            raise FreezingError("replica: this wrapper is out of date; train with the one that current() returns")


def _default_group() -> ProcessGroup:
    from torch import distributed

    if not distributed.is_initialized() or distributed.group.WORLD is None:
        raise FreezingError("process_group: there is none; call torch.distributed.init_process_group() first")
    return distributed.group.WORLD
