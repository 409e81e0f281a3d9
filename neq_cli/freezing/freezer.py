"""One call per epoch: observe every neuron, ask the policy, and hold what is frozen until the next call."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neq_cli.errors import FreezingError, did_you_mean
from neq_cli.freezing.anatomy import Anatomy, study
from neq_cli.freezing.answers import everything, settle
from neq_cli.freezing.backward.dispatch import Dispatch
from neq_cli.freezing.backward.sliced import MODES, KernelUse, Mode
from neq_cli.freezing.changes import Standing, gradients_switched_on, standing
from neq_cli.freezing.equilibrium import Definition, Dynamics
from neq_cli.freezing.flops import Flops
from neq_cli.freezing.hold import Hold
from neq_cli.freezing.model.neurons import Layer, find_neurons
from neq_cli.freezing.model.observing import (
    first_input,
    is_compiled,
    is_wrapped,
    outside_inference_mode,
    undisturbed,
    unwrap,
)
from neq_cli.freezing.policies import NEq, Observation, Policy
from neq_cli.freezing.probe import copied, device_of, follow, overwrite, similarity, snapshot
from neq_cli.freezing.processes.agreement import (
    check_agreement,
    chosen_by_first,
    first_sample,
    from_first,
    named_from_first,
    overwrite_from_first,
    pack,
)
from neq_cli.freezing.rows.optimizers import unwrap_optimizer
from neq_cli.freezing.state import STATE_VERSION, check_state, fixed_tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)


class Freezer:
    """Stops updating the neurons that a policy chooses, in any PyTorch training loop.

    Make it once model and optimiser stand, call ``step()`` after every epoch; nothing else in the loop changes. The
    model is looked at when the Freezer is made: phi of epoch 1 compares with that moment.

    ``probe_loader`` yields held-out inputs, or (inputs, targets...); it is iterated once per epoch and should yield the
    same inputs in the same order each time. ``exclude`` are globs of layer names that are never frozen, beyond the
    output layer, which never is. ``probe_autocast``: run the probe under autocast with this dtype.

    ``backward``: ``exact`` computes the weight gradients of the trainable neurons only and the same errors as ever, so
    that training is what it would be without the saving, up to rounding. ``truncated`` is an approximation: frozen
    neurons of convolutions and linear layers pass no error to the layers below (a layer that no error reaches at all
    is paused until one does). ``dense`` computes every gradient and
    discards the frozen ones. ``dispatch`` holds the choices of kernels; by default they are timed, once for each kind
    of call. ``compiled``: torch.compile runs the model (default: whether the one given is compiled); then nothing is
    compiled again when the frozen sets change. Modules with frozen neurons are of a subclass of their own class in the
    meantime; copies and pickles of them are not.

    ``process_group``: the processes that train copies of the model together; each one's ``probe_loader`` yields its
    share of the probe set. The sums are added up over the group, process 0 chooses, and all hold the same sets; the
    model that phi describes is process 0's. Every process must make the Freezer and call ``step()``, which compares the
    processes' sets before and after, so that what changed them during the epoch is found. The policies of the other
    processes are never asked, and their state is of no meaning.

    Inside ``with freezer.suspended():`` modules are of their own class and gradients PyTorch's own, for what needs them
    so: ``torch.jit.script``, or ``torch.autograd.grad`` with respect to a parameter that is frozen whole, which else
    "appears to not have been used in the graph". What transforms of ``torch.func``, forward-mode differentiation,
    ``torch.jit.trace`` and ``torch.export`` run is computed so without it.

    A model wrapped in DistributedDataParallel keeps every layer in its graph, for the wrapper to find it there; that
    costs what is saved by not propagating errors that nobody needs. ``Replica`` does not have that cost.

    ``row_wise`` vouches for an optimiser that is not known, which would be tried: that what it does to a row depends on
    that row alone. ``notes`` are lines on what a user should know of, such as this.

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
        backward: Mode = "exact",
        dispatch: Dispatch | None = None,
        compiled: bool | None = None,
        exclude: Sequence[str] = (),
        probe_autocast: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
        row_wise: bool = False,
    ) -> None:
        if backward not in MODES:
            hint = did_you_mean(str(backward), MODES) or f"; use {', '.join(MODES)}"
            raise FreezingError(f"backward: {backward!r} is not a backward mode{hint}")
        self.model = unwrap(model)
        self.optimizer = unwrap_optimizer(optimizer)
        self.probe_loader = probe_loader
        self.policy: Policy = NEq() if policy is None else policy
        self.mu: float = getattr(self.policy, "mu", 0.5)
        self.definition: Definition = getattr(self.policy, "definition", "paper")
        self.probe_autocast = probe_autocast
        self.process_group = process_group
        self.epoch = 0
        self.notes: list[str] = []
        if row_wise:
            kind = type(self.optimizer).__name__
            self.notes.append(f"optimizer: {kind} was not tried; the user vouches that it updates row by row")

        self.backward: Mode = backward
        self.dispatch = Dispatch() if dispatch is None else dispatch
        self.compiled = is_compiled(model) if compiled is None else compiled
        self._exclude, self._row_wise, self._wrapped = exclude, row_wise, is_wrapped(model)
        self._standing = standing(self.model, self.optimizer)
        self.hold = self._study(self._standing)
        self.dynamics = {name: Dynamics.start(layer.neurons) for name, layer in self.layers.items()}
        self.trainable: dict[str, Tensor] = everything(self.layers)
        self.hold.slicing.put_in_force(self.trainable)
        self._looking = self.optimizer.register_step_pre_hook(lambda *_: self._let_go())
        self._suspensions = 0
        self._computed: dict[str, int] = {}  # rows that backward computed before the state loaded was saved
        self._previous: dict[str, Tensor | None] = {}  # None: a buffer that had no tensor
        if process_group is not None:
            self._check_agreement("layers or settings")
        self._remember(snapshot(self.model))
        if process_group is not None:
            # DistributedDataParallel, made later, gives all processes the weights of process 0.
            own = (self._previous[name] for name, _ in self.model.named_parameters())
            overwrite_from_first((tensor for tensor in own if tensor is not None), process_group)

    @outside_inference_mode
    def step(self) -> dict[str, Observation]:
        """Observe the neurons, choose who trains next epoch, and hold the others from now on.

        Returns the observations by layer, in forward order; their ``trainable`` is the new set. Raises FreezingError
        where the policy answers with an unknown layer, a wrong shape or a wrong type; then nothing has changed.
        """
        self._check_agreement("frozen sets")
        self._look_anew()
        phi = similarity(
            self.model,
            self._previous,
            self.layers,
            self.probe_loader,
            definition=self.definition,
            autocast=self.probe_autocast,
            process_group=self.process_group,
        )
        if self.process_group is not None:  # whose sums may differ in their last bits where the network adds them up
            everything = from_first(torch.cat(list(phi.values())), self.process_group)
            phi = dict(zip(phi, torch.split(everything, [len(one) for one in phi.values()]), strict=True))
        dynamics = {name: self.dynamics[name].next(phi[name], self.mu, self.definition) for name in self.layers}
        trainable = self._chosen(dynamics)
        self.epoch += 1
        self.dynamics = dynamics
        self._remember(snapshot(self.model))
        self._put_in_force(trainable)
        self._check_agreement("frozen sets")
        return {name: self._observation(dynamics[name], trainable[name]) for name in self.layers}

    @property
    def anatomy(self) -> Anatomy:
        """What the last look at the model told."""
        return self.hold.anatomy

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers whose neurons are observed, by name, in forward order."""
        return self.hold.anatomy.neurons.layers

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
            self.trainable, self.backward, rows_computed=self._rows_computed(), compiled=self.compiled
        )

    def kernels(self) -> dict[str, KernelUse]:
        """Return for every layer with frozen neurons how its gradients are computed, and why."""
        return self.hold.slicing.kernels(self.trainable)

    @outside_inference_mode
    def state_dict(self) -> dict[str, Any]:
        """Return all that the next ``step()`` depends on; nested dictionaries of tensors and plain values only."""
        # As the next step will find it; nothing of this Freezer changes by being saved.
        now = self._standing.now(self.model, self.optimizer)
        dynamics, trainable, previous = self.dynamics, self.trainable, self._previous
        if self._standing.differs(now):
            with gradients_switched_on(now.optimized):
                layers = find_neurons(self.model, now.optimized.values()).layers
            dynamics, trainable = self._standing.carried(now, self.layers, layers, self.dynamics, self.trainable)
            if self._standing.replaced(now):
                overwrite(previous := {}, snapshot(self.model))
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "layers": {
                name: {
                    "phi": moved.phi,
                    "delta_phi": moved.delta_phi,
                    "velocity": moved.velocity,
                    "trainable": trainable[name],
                }
                for name, moved in dynamics.items()
            },
            "previous": dict(previous),
            "policy": self.policy.state_dict(),
            "computed": {name: rows for name, rows in self._rows_computed().items() if name in dynamics},
        }

    @outside_inference_mode
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``. Load model and optimiser before: frozen rows are held as they are now.

        Raises FreezingError where the state is damaged or belongs to another model; then nothing has changed.
        """
        self._look_anew()
        check_state(state, self.layers, self._previous, fixed_tensors(self.model))
        self._load_policy(state.get("policy", {}))  # an empty dictionary is lost where a state was flattened
        self.epoch = state["epoch"]
        layers = {
            name: {
                key: tensor.cpu().clone()
                for key, tensor in state["layers"][name].items()
                if key in ("phi", "delta_phi", "velocity", "trainable")
            }
            for name in self.layers
        }
        self.dynamics = {
            name: Dynamics(layer["phi"], layer["delta_phi"], layer["velocity"]) for name, layer in layers.items()
        }
        # Buffers without a tensor are lost where a state was flattened.
        empty = {name: None for name, tensor in self._previous.items() if tensor is None}
        self._remember({**empty, **state["previous"]}, device_of(self.model))
        self._put_in_force({name: layer["trainable"] for name, layer in layers.items()})
        self._computed = {
            name: rows for name, rows in state.get("computed", {}).items() if name in self.hold.slicing.plans
        }

    @outside_inference_mode
    def detach(self) -> None:
        """Put model and optimiser back as they were; frozen neurons train again."""
        self._looking.remove()
        self.hold.remove()
        self.trainable, self._computed = everything(self.layers), {}

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
        if self.process_group is not None:
            parameters = {name for name, _ in self.model.named_parameters()}
            buffers = {name: tensor for name, tensor in tensors.items() if name not in parameters}
            own = {name: tensor for name, tensor in tensors.items() if name in parameters}
            tensors = {**own, **named_from_first(buffers, device_of(self.model), self.process_group)}
        overwrite(self._previous, tensors, device)

    def _study(self, now: Standing) -> Hold:
        """Look at the model, and return what can hold its rows; nothing is frozen by it yet."""
        anatomy = study(
            self.model,
            self._first_probe_input(),
            optimized=now.optimized.values(),
            exclude=self._exclude,
            definition=self.definition,
            attached=self._wrapped,
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
        )

    def _look_anew(self) -> None:
        """Take in what joined the optimiser, left it, or was replaced in the model since it was last looked at."""
        follow(self._previous, self.model)
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
        names = self.hold.replaced()
        if names:
            self._say(f"{', '.join(names)}: replaced in the model; trains wholly until step() takes it in")
            whole = everything(self.layers)
            self._put_in_force({**self.trainable, **{name: whole[name] for name in names}})

    def _say(self, note: str) -> None:
        self.notes.append(f"epoch {self.epoch + 1}: {note}")
        logger.warning(note)

    def _put_in_force(self, trainable: dict[str, Tensor]) -> None:
        self.trainable, self._computed = trainable, {}
        self.hold.put_in_force(trainable)

    def _chosen(self, dynamics: Mapping[str, Dynamics]) -> dict[str, Tensor]:
        def choose() -> dict[str, Tensor]:
            seen = {name: self._observation(dynamics[name], self.trainable[name]) for name in self.layers}
            chosen = self.policy.choose(seen, self.epoch + 1)
            return settle(chosen, type(self.policy).__name__, self.anatomy, dynamics)

        if self.process_group is None:
            return choose()
        return chosen_by_first(choose, {name: layer.neurons for name, layer in self.layers.items()}, self.process_group)

    def _check_agreement(self, what: str) -> None:
        if self.process_group is not None:
            now = self._standing.now(self.model, self.optimizer)
            names = [name for name, one in now.parameters.items() if id(one) in now.optimized]
            changed = f"{self._standing.replaced(now)} {names} {self._standing.differs(now)}"
            about = f"{self.epoch} {self.backward} {self.mu} {self.definition} {list(self.layers)} {changed}"
            phi = torch.cat([moved.phi for moved in self.dynamics.values()])
            tensors = (pack(self.trainable), phi.view(torch.uint8))
            contents = [about.encode(), *(bytes(tensor.tolist()) for tensor in tensors)]
            check_agreement(contents, self.process_group, what)

    def _rows_computed(self) -> dict[str, int]:
        """Return by layer how many rows the last backward pass computed, where that is known."""
        return {**self._computed, **self.hold.rows_computed()}

    def _load_policy(self, state: Mapping[str, Any]) -> None:
        before = self.policy.state_dict()
        try:
            self.policy.load_state_dict(state)
        except Exception as error:
            self.policy.load_state_dict(before)
            policy, reason = type(self.policy).__name__, " ".join(f"{type(error).__name__}: {error}".split())
            raise FreezingError(f"freezer state: policy {policy} does not take it over ({reason[:300]})") from error

    def _first_probe_input(self) -> Any:
        if isinstance(self.probe_loader, Iterator):
            raise FreezingError("probe_loader: can be read only once; give a list or a DataLoader, which starts anew")
        with undisturbed(self.model):
            batch = next(iter(self.probe_loader), None)
        if self.process_group is not None:
            # What the model does with its input may depend on it: all processes look at the same sample.
            batch = first_sample(batch, self.process_group)
        if batch is None:
            raise FreezingError("probe_loader: yields no batch; give it at least one input")
        return copied(first_input(batch), device_of(self.model))

    def _observation(self, moved: Dynamics, trainable: Tensor) -> Observation:
        return Observation(moved.phi.float(), moved.delta_phi.float(), moved.velocity.float(), trainable.clone())
