"""One call per epoch: observe every neuron, ask the policy, and hold what is frozen until the next call."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neq_cli.errors import FreezingError, did_you_mean
from neq_cli.freezing.anatomy import Anatomy, anatomy_of
from neq_cli.freezing.answers import settle
from neq_cli.freezing.backward.dispatch import Dispatch
from neq_cli.freezing.backward.sliced import MODES, BackwardMode, KernelUse
from neq_cli.freezing.changes import Standing, gradients_switched_on, standing
from neq_cli.freezing.coverage import Coverage, coverage_of
from neq_cli.freezing.earlier import PLACES, Earlier, Snapshot, snapshot
from neq_cli.freezing.equilibrium import Definition, Dynamics
from neq_cli.freezing.flops import Flops
from neq_cli.freezing.hold import Hold
from neq_cli.freezing.model.calling import Call, give_shapes, has_no_shapes, inputs_of
from neq_cli.freezing.model.layers import Layer, everything
from neq_cli.freezing.model.neurons import find_neurons
from neq_cli.freezing.model.observing import is_compiled, is_wrapped, outside_inference_mode, unwrap
from neq_cli.freezing.passed import Passed
from neq_cli.freezing.policies import FrontMode, NEq, Observation, Policy, Scope, observe
from neq_cli.freezing.probe import copied, device_of, first_probe_input, similarity
from neq_cli.freezing.processes.agreement import Agreement, as_bytes
from neq_cli.freezing.processes.sharding import sharding_of
from neq_cli.freezing.rows.optimizers import largest_learning_rate, unwrap_optimizer
from neq_cli.freezing.rows.zeroed import graph_task
from neq_cli.freezing.state import State, check_state, fixed_tensors, load_policy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)


class Freezer:
    """Stops updating the neurons that a policy chooses, in any PyTorch training loop.

    Make it once model and optimiser stand, call ``step()`` after every epoch; nothing else in the loop changes. The
    model is looked at when the Freezer is made: phi of epoch 1 compares with that moment.

    ``probe_loader`` yields held-out inputs, or (inputs, targets...); it is iterated once per epoch and should yield the
    same inputs in the same order each time. A mapping is passed as keywords, those that the model's forward takes; what
    is called in another way is by ``call(model, item)``. ``sample``: such an item with one sample in it, on which FLOPs
    are counted, the same in every process; it is needed where the first row of each of an item's tensors is none, as in
    lists of images, which are otherwise counted together. ``exclude`` are globs of layer names that are never frozen,
    beyond the output layer, which never is. ``probe_autocast``: run the probe under autocast with this dtype.

    ``backward``: ``exact`` computes the weight gradients of the trainable neurons only and the same errors as ever, so
    that training is what it would be without the saving, up to rounding. ``truncated`` is an approximation: frozen
    neurons of convolutions and linear layers pass no error to the layers below (a layer that no error reaches at all
    is paused until one does). ``dense`` computes every gradient and discards the frozen ones. ``dispatch`` holds the
    choices of kernels; by default they are timed, once for each kind of call. ``compiled``: torch.compile runs the
    model (default: whether the one given, or a part of it, is); then nothing is compiled again when the sets change.
    Modules with frozen neurons are of a subclass of their own class in the meantime; copies and pickles of them are
    not. backward/__init__.py lists all that is changed for others.

    ``process_group``: the processes that train copies of the model together; each one's ``probe_loader`` yields its
    share of the probe set. The sums are added up over the group, process 0 chooses, and all hold the same sets; the
    model that phi describes is process 0's. Every process must make the Freezer and call ``step()``, which compares the
    processes' sets before and after, so that what changed them during the epoch is found. The policies of the other
    processes are never asked, and their state is of no meaning.

    A model that ``fully_shard`` divides may be given: of its parameters each process holds the frozen rows of its part,
    and keeps its part of the weights before. ``process_group`` is that of all these processes then, and need not be
    given. When the model is looked at, all of it is in each process for a moment; in the probe a unit of it at a time.

    Inside ``with freezer.suspended():`` modules are of their own class and gradients PyTorch's own, for what needs them
    so: ``torch.jit.script``, or ``torch.autograd.grad`` with respect to a parameter that is frozen whole, which else
    "appears to not have been used in the graph". What transforms of ``torch.func``, forward-mode differentiation,
    ``torch.jit.trace`` and ``torch.export`` run is computed so without it.

    A model wrapped in DistributedDataParallel keeps every layer in its graph, for the wrapper to find it there; that
    costs what is saved by not propagating errors that nobody needs. ``Replica`` does not have that cost. ``wrapped``
    says whether it is, where the one given is the model inside (default: whether the one given is wrapped).

    ``row_wise`` vouches for an optimiser that is not known, which would be tried: that what it does to a row depends on
    that row alone. ``probe_snapshot``: the weights that the next probe compares with are kept where the model is, or on
    the ``cpu``, from where they come for the probe alone; of what is frozen whole none are kept. ``notes`` are lines on
    what a user should know of, such as this.

    Raises FreezingError where the optimiser mixes rows, the probe yields nothing, or the model owns no neurons.
    """

    @outside_inference_mode
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        probe_loader: Iterable[Any],
        policy: Policy | None = None,
        *,
        backward: BackwardMode = "exact",
        dispatch: Dispatch | None = None,
        compiled: bool | None = None,
        wrapped: bool | None = None,
        exclude: Sequence[str] = (),
        probe_autocast: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
        row_wise: bool = False,
        probe_snapshot: Snapshot = "device",
        call: Call | None = None,
        sample: Any = None,
    ) -> None:
        _check_choice("backward", backward, MODES, "a backward mode")
        _check_choice("probe_snapshot", probe_snapshot, PLACES, "a place for the weights before")
        self.model = unwrap(model)
        self.optimizer = unwrap_optimizer(optimizer)
        self.probe_loader = probe_loader
        self.policy: Policy = NEq() if policy is None else policy
        self.mu: float = getattr(self.policy, "mu", 0.5)
        self.definition: Definition = getattr(self.policy, "definition", "paper")
        self.scope: Scope = getattr(self.policy, "scope", "neuron")
        self.front_mode: FrontMode = getattr(self.policy, "front_mode", "train")
        self.still: frozenset[str] = frozenset()  # parameters outside neurons that stand still with the front
        self.at_rest = 0  # epochs up to now in which all that may freeze was frozen, and it still is
        self.probe_autocast = probe_autocast
        self._sharding = sharding_of(self.model)
        self.process_group = process_group or (self._sharding.group() if self._sharding else None)
        self.call, self.sample = call, sample
        self._idle: Any = None  # what a sharded model runs on in a process whose share of the probe is through
        self._agreement = Agreement(self.process_group)
        self.epoch = 0
        self.passed: Passed | None = None  # what the last step() ended
        self._bookkept = 0.0  # of `bookkeeping_seconds`, when it did
        self.notes: list[str] = []
        if row_wise:
            kind = type(self.optimizer).__name__
            self.notes.append(f"optimizer: {kind} was not tried; the user vouches that it updates row by row")

        self.backward: BackwardMode = backward
        self.dispatch = Dispatch() if dispatch is None else dispatch
        self.compiled = is_compiled(model) if compiled is None else compiled
        self._exclude, self._row_wise = exclude, row_wise
        self._wrapped = is_wrapped(model) if wrapped is None else wrapped
        if has_no_shapes(self.model):
            give_shapes(self.model, self._looked_at_with(), call)
        self._standing = standing(self.model, self.optimizer)
        self.hold = self._study(self._standing)
        self.notes += self.anatomy.notes
        self.dynamics = {name: Dynamics.start(layer.neurons) for name, layer in self.layers.items()}
        self.trainable: dict[str, Tensor] = everything(self.layers)
        self.hold.slicing.put_in_force(self.trainable)
        self._looking = self.optimizer.register_step_pre_hook(lambda *_: self._let_go())
        self._suspensions = 0
        self._computed: dict[str, int] = {}  # rows that backward computed before the state loaded was saved
        self._previous = Earlier(probe_snapshot)
        self._agreement.check(self._held(), "layers or settings")
        self._remember(snapshot(self.model))
        # DistributedDataParallel, made later, gives all processes the weights of process 0.
        self._agreement.overwrite(
            self._previous.tensors[name]
            for name, _ in self.model.named_parameters()
            if name not in self._sharding.parameters
        )

    @outside_inference_mode
    def step(self) -> dict[str, Observation]:
        """Observe the neurons, choose who trains next epoch, and hold the others from now on.

        Returns the observations by layer, in forward order; their ``trainable`` is the new set. Raises FreezingError
        where the policy answers with an unknown layer, a wrong shape or a wrong type; then nothing has changed.
        """
        started = time.perf_counter()
        self._sharding.reshard()
        self._agreement.check(self._held(), "frozen sets")
        trained, flops = dict(self.trainable), self.flops()  # now that it is known which kernels ran
        self._look_anew()
        phi = similarity(
            self.model,
            self._previous.on(device_of(self.model)),
            self.layers,
            self.probe_loader,
            definition=self.definition,
            autocast=self.probe_autocast,
            process_group=self.process_group,
            call=self.call,
            sharding=self._sharding,
            idle=self._idle,
        )
        phi = self._agreement.rounded_alike(phi)
        dynamics = {name: self.dynamics[name].next(phi[name], self.mu, self.definition) for name in self.layers}
        trainable = self._agreement.choose(lambda: self._chosen(dynamics), self.layers)
        self.epoch += 1
        self.at_rest = self.at_rest + 1 if self.all_frozen and self._all_frozen(trainable) else 0
        self.dynamics = dynamics
        self._remember(snapshot(self.model))
        self._put_in_force(trainable)
        self._agreement.check(self._held(), "frozen sets")
        observations = observe(dynamics, trainable)
        within, self._bookkept = self.bookkeeping_seconds - self._bookkept, self.bookkeeping_seconds
        seconds = within + time.perf_counter() - started
        self.passed = Passed(self.epoch, trained, flops, observations, seconds)
        return observations

    @property
    def anatomy(self) -> Anatomy:
        """What the last look at the model told."""
        return self.hold.anatomy

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers whose neurons are observed, by name, in forward order."""
        return self.hold.anatomy.neurons.layers

    @property
    def all_frozen(self) -> bool:
        """Whether everything that may freeze is frozen."""
        return self._all_frozen(self.trainable)

    @property
    def bookkeeping_seconds(self) -> float:
        """Seconds spent so far within training steps: keeping frozen rows as they are, and timing kernels."""
        return self.hold.keeper.seconds + self.dispatch.seconds

    def flops(self) -> Flops:
        """Return what one sample's back-propagation costs with the sets in force, in both accountings.

        What is executed depends on the kernels, which the first backward pass with these sets chooses: before it, the
        trainable rows are counted, after it, those that were computed.
        """
        return self.anatomy.flops(
            self.trainable,
            self.backward,
            rows_computed=self._rows_computed(),
            compiled=self.compiled,
            still=self.still,
        )

    def coverage(self) -> Coverage:
        """Return what share of the model its neurons are, and why the rest is none of them."""
        return coverage_of(self.anatomy, dict(self.model.named_parameters()))

    def kernels(self) -> dict[str, KernelUse]:
        """Return for every layer with frozen neurons how its gradients are computed, and why."""
        return self.hold.slicing.kernels(self.trainable)

    @outside_inference_mode
    def state_dict(self, *, whole: bool = False) -> dict[str, Any]:
        """Return all that the next ``step()`` depends on; nested dictionaries of tensors and plain values only.

        Of a sharded model it has DTensors, as the model's own ``state_dict()`` has, for torch.distributed.checkpoint.
        ``whole``: it has whole tensors on the CPU instead, for ``torch.save``, in process 0 alone; every process must
        ask, and the others get an empty dictionary.
        """
        self._sharding.reshard()
        # As the next step will find it; nothing of this Freezer changes by being saved.
        now = self._standing.now(self.model, self.optimizer)
        dynamics, trainable, previous, sharding = self.dynamics, self.trainable, self._previous, self._sharding
        if self._standing.differs(now):
            sharding = sharding_of(self.model)
            with gradients_switched_on(now.optimized), sharding.undivided(self.model, values=False) as there:
                optimized = [there.get(key, one) for key, one in now.optimized.items()]
                layers = find_neurons(self.model, optimized, self.anatomy.neurons.found).layers
            dynamics, trainable = self._standing.carried(now, self.layers, layers, self.dynamics, self.trainable)
            if self._standing.replaced(now):
                previous = Earlier(self._previous.place)
                previous.take(snapshot(self.model))
        computed = {name: rows for name, rows in self._rows_computed().items() if name in dynamics}
        if sharding and whole:
            tensors = sharding.gathered(previous.tensors, keep=self._agreement.is_first)
            if not self._agreement.is_first:
                return {}
        else:
            tensors = sharding.named(previous.tensors)
        policy = self.policy.state_dict()
        return State(self.epoch, dynamics, trainable, tensors, policy, computed, self.at_rest).to_dict()

    @outside_inference_mode
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``. Load model and optimiser before: frozen rows are held as they are now.

        Raises FreezingError where the state is damaged or belongs to another model; then nothing has changed.
        """
        self._sharding.reshard()
        self._look_anew()
        check_state(state, self.layers, self._sharding.named(self._previous.tensors), fixed_tensors(self.model))
        found = State.of(state, self.layers)
        load_policy(self.policy, found.policy)
        self.epoch, self.at_rest, self.dynamics = found.epoch, found.at_rest, dict(found.dynamics)
        # Buffers without a tensor are lost where a state was flattened.
        empty = {name: None for name, tensor in self._previous.tensors.items() if tensor is None}
        previous = {name: self._sharding.own(name, one) for name, one in found.previous.items()}
        self._remember({**empty, **previous}, device_of(self.model))
        self._put_in_force(dict(found.trainable))
        self._computed = {name: rows for name, rows in found.computed.items() if name in self.hold.slicing.plans}

    @outside_inference_mode
    def detach(self) -> None:
        """Put model and optimiser back as they were; frozen neurons train again."""
        self._looking.remove()
        self._previous.keep_own()
        self.hold.remove()
        self.trainable, self.still, self._computed = everything(self.layers), frozenset(), {}
        self.at_rest = 0

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Compute gradients as without a Freezer inside: modules are of their own class, frozen rows' gradients are not
        discarded. What is frozen is still held around ``optimizer.step()``, and the sets in force come back as they
        were, or as ``step()`` chose meanwhile. May be nested. A compiled model is compiled once more for it. Over
        several processes a ``Replica`` averages the trainable rows only.
        """
        self._suspensions += 1
        if self._suspensions == 1:
            self.hold.suspend()
        try:
            yield
        finally:
            self._suspensions -= 1
            if not self._suspensions:
                self.hold.resume()

    def _remember(self, tensors: Mapping[str, Tensor | None], device: torch.device | None = None) -> None:
        parameters = {name for name, _ in self.model.named_parameters()}
        self._previous.take(self._agreement.buffers(tensors, parameters, device_of(self.model)), device)

    def _study(self, now: Standing) -> Hold:
        """Look at the model, and return what can hold its rows; nothing is frozen by it yet."""
        self._sharding = sharding_of(self.model)
        resting = self.scope == "front" and self.front_mode == "inference"
        self._sharding.check(compiled=self.compiled, resting=resting, processes=self._agreement.processes)
        inputs = self._looked_at_with()
        self._idle = inputs if self._sharding else None
        with self._sharding.undivided(self.model) as there:
            anatomy = anatomy_of(
                self.model,
                inputs,
                optimized=[there.get(key, one) for key, one in now.optimized.items()],
                exclude=self._exclude,
                definition=self.definition,
                attached=self._wrapped,
                call=self.call,
                single=self.sample is not None,
            )
        if self.front_mode == "inference" and self.compiled:
            raise FreezingError(
                "policy: front_mode inference is not for a model that torch.compile runs, which would be compiled anew "
                "for every front; use front_mode train"
            )
        if self.scope == "front" and not anatomy.trace.ordered:
            raise FreezingError(
                "policy: scope front asks which layer comes before which, and this model's forward pass does not show "
                "it (it runs without autograd); use scope layer or neuron"
            )
        return Hold(
            self.model,
            self.optimizer,
            anatomy,
            self.backward,
            self.dispatch,
            compiled=self.compiled,
            wrapped=self._wrapped,
            discard_momentum=self.definition == "reference",
            row_wise=self._row_wise,
            seen=self._sharding.seen if self._sharding else None,
        )

    def _looked_at_with(self) -> Any:
        if self.sample is not None:
            return copied(inputs_of(self.sample, self.call), device_of(self.model))
        return first_probe_input(self.model, self.probe_loader, self._agreement.sample, self.call)

    def _look_anew(self) -> None:
        """Take in what joined the optimiser, left it, or was replaced in the model since it was last looked at."""
        self._previous.follow(self.model)
        now = self._standing.now(self.model, self.optimizer)
        if not self._standing.differs(now):
            return
        self._standing.check(now, self.layers)
        self.hold.slicing.remove()
        try:
            with gradients_switched_on(now.optimized):
                hold = self._study(now)
        except BaseException:
            self.hold.slicing.put_in_force(self.trainable)
            raise
        hold.take_over(self.hold)
        layers = hold.anatomy.neurons.layers
        self.dynamics, trainable = self._standing.carried(now, self.layers, layers, self.dynamics, self.trainable)
        if self._standing.replaced(now):
            self._remember(snapshot(self.model))
        self._say(self._standing.told(now, layers))
        self.hold, self._standing = hold, now
        self._put_in_force(trainable)

    def _let_go(self) -> None:
        """Let layers train wholly, before an optimiser's step, whose parameters have been replaced since ``step()``."""
        if self._sharding:
            if graph_task() != -1:  # a step inside of a backward pass: what is gathered for it stands in the places
                return
            self._sharding.reshard()
        names = self.hold.replaced()
        if names:
            self._say(f"{', '.join(names)}: replaced in the model; trains wholly until step() takes it in")
            whole = everything(self.layers)
            self._put_in_force({**self.trainable, **{name: whole[name] for name in names}})

    def _all_frozen(self, trainable: Mapping[str, Tensor]) -> bool:
        names = self.anatomy.may_freeze
        return bool(names) and not any(bool(trainable[name].any()) for name in names)

    def _say(self, note: str) -> None:
        self.notes.append(f"epoch {self.epoch + 1}: {note}")
        logger.warning(note)

    def _put_in_force(self, trainable: dict[str, Tensor]) -> None:
        self.trainable, self._computed = trainable, {}
        self.still = self.anatomy.outside_front(trainable) if self.scope == "front" else frozenset()
        rests = self.scope == "front" and self.front_mode == "inference"
        self.hold.put_in_force(trainable, self.still, rests=rests)
        self._previous.share(self.model, self.hold.frozen_whole)

    def _chosen(self, dynamics: Mapping[str, Dynamics]) -> dict[str, Tensor]:
        if hasattr(self.policy, "look"):
            self.policy.look(self.anatomy, largest_learning_rate(self.optimizer))
        chosen = self.policy.choose(observe(dynamics, self.trainable), self.epoch + 1)
        return settle(chosen, type(self.policy).__name__, self.anatomy, dynamics)

    def _held(self) -> Iterator[bytes]:
        """Yield all in which the processes must agree."""
        changed = self._standing.compared(self._standing.now(self.model, self.optimizer))
        settings = f"{self.backward} {self.mu} {self.definition} {self.scope} {self.front_mode}"
        yield f"{self.epoch} {settings} {list(self.layers)} {changed}".encode()
        yield from as_bytes(self.trainable, [moved.phi for moved in self.dynamics.values()])

    def _rows_computed(self) -> dict[str, int]:
        """Return by layer how many rows the last backward pass computed, where that is known."""
        return {**self._computed, **self.hold.rows_computed()}


def _check_choice(name: str, value: object, known: Sequence[str], what: str) -> None:
    if value not in known:
        hint = did_you_mean(str(value), known) or f"; use {', '.join(known)}"
        raise FreezingError(f"{name}: {value!r} is not {what}{hint}")
