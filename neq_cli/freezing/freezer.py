"""One call per epoch: observe every neuron, ask the policy, and hold what is frozen until the next call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neq_cli.errors import FreezingError, did_you_mean
from neq_cli.freezing.anatomy import study
from neq_cli.freezing.backward import MODES, KernelUse, Mode, SlicedBackward
from neq_cli.freezing.dispatch import Dispatch
from neq_cli.freezing.equilibrium import Definition, Dynamics
from neq_cli.freezing.flops import Flops
from neq_cli.freezing.neurons import Layer
from neq_cli.freezing.observing import first_input, is_compiled, undisturbed, unwrap
from neq_cli.freezing.policies import NEq, Observation, Policy
from neq_cli.freezing.probe import copied, device_of, similarity, snapshot
from neq_cli.freezing.rows import RowKeeper

STATE_VERSION = 1


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

    Raises FreezingError where the optimiser mixes rows, the probe yields nothing, or the model owns no neurons.
    """

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
    ) -> None:
        if backward not in MODES:
            hint = did_you_mean(str(backward), MODES) or f"; use {', '.join(MODES)}"
            raise FreezingError(f"backward: {backward!r} is not a backward mode{hint}")
        self.model = unwrap(model)
        self.optimizer = optimizer
        self.probe_loader = probe_loader
        self.policy: Policy = NEq() if policy is None else policy
        self.mu: float = getattr(self.policy, "mu", 0.5)
        self.definition: Definition = getattr(self.policy, "definition", "paper")
        self.probe_autocast = probe_autocast
        self.epoch = 0

        self.anatomy = study(
            self.model,
            self._first_probe_input(),
            optimized=[parameter for group in optimizer.param_groups for parameter in group["params"]],
            exclude=exclude,
            definition=self.definition,
        )
        self.layers: dict[str, Layer] = self.anatomy.neurons.layers
        self.dynamics = {name: Dynamics.start(layer.neurons) for name, layer in self.layers.items()}
        self.trainable: dict[str, Tensor] = self._everything()
        self.keeper = RowKeeper(self.model, optimizer, self.layers, discard_momentum=self.definition == "reference")
        self.backward: Mode = backward
        self.dispatch = Dispatch() if dispatch is None else dispatch
        self.compiled = is_compiled(model) if compiled is None else compiled
        self.slicing = SlicedBackward(
            self.model,
            self.layers,
            self.anatomy.functional,
            self.anatomy.dense_because,
            backward,
            self.dispatch,
            compiled=self.compiled,
            attached=self.anatomy.trace.reentrant,
        )
        self.slicing.put_in_force(self.trainable)
        self._previous = snapshot(self.model)

    def step(self) -> dict[str, Observation]:
        """Observe the neurons, choose who trains next epoch, and hold the others from now on.

        Returns the observations by layer, in forward order; their ``trainable`` is the new set. Raises FreezingError
        where the policy answers with an unknown layer, a wrong shape or a wrong type; then nothing has changed.
        """
        phi = similarity(
            self.model,
            self._previous,
            self.layers,
            self.probe_loader,
            definition=self.definition,
            autocast=self.probe_autocast,
        )
        dynamics = {name: self.dynamics[name].next(phi[name], self.mu, self.definition) for name in self.layers}
        seen = {name: self._observation(dynamics[name], self.trainable[name]) for name in self.layers}
        trainable = self._settle(self.policy.choose(seen, self.epoch + 1), dynamics)
        self.epoch += 1
        self.dynamics = dynamics
        self._remember(snapshot(self.model, copy=False))
        self._put_in_force(trainable)
        return {name: self._observation(dynamics[name], trainable[name]) for name in self.layers}

    @property
    def bookkeeping_seconds(self) -> float:
        """Seconds spent so far within training steps: keeping frozen rows as they are, and timing kernels."""
        return self.keeper.seconds + self.dispatch.seconds

    def flops(self) -> Flops:
        """Return what one sample's back-propagation costs with the sets in force, in both accountings.

        What is executed depends on the kernels, which the first backward pass with these sets chooses: before it, the
        trainable rows are counted, after it, those that were computed.
        """
        computed = {name: plan.rows_computed() for name, plan in self.slicing.plans.items()}
        known = {name: rows for name, rows in computed.items() if rows is not None}
        return self.anatomy.flops(self.trainable, self.backward, rows_computed=known, compiled=self.compiled)

    def kernels(self) -> dict[str, KernelUse]:
        """Return for every layer with frozen neurons how its gradients are computed, and why."""
        return self.slicing.kernels(self.trainable)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next ``step()`` depends on; nested dictionaries of tensors and plain values only."""
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "layers": {
                name: {
                    "phi": moved.phi,
                    "delta_phi": moved.delta_phi,
                    "velocity": moved.velocity,
                    "trainable": self.trainable[name],
                }
                for name, moved in self.dynamics.items()
            },
            "previous": dict(self._previous),
            "policy": self.policy.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``. Load model and optimiser before: frozen rows are held as they are now."""
        if state.get("version") != STATE_VERSION:
            raise FreezingError(f"freezer state: version {state.get('version')} is not version {STATE_VERSION}")
        sizes = {name: len(layer["phi"]) for name, layer in state["layers"].items()}
        if sizes != {name: layer.neurons for name, layer in self.layers.items()}:
            odd = sorted(set(sizes) ^ set(self.layers)) or sorted(
                name for name, layer in self.layers.items() if sizes[name] != layer.neurons
            )
            raise FreezingError(f"freezer state: belongs to another model; layer {odd[0]!r} differs")
        for name, tensor in self._previous.items():
            if name not in state["previous"] or state["previous"][name].shape != tensor.shape:
                raise FreezingError(f"freezer state: belongs to another model; {name!r} differs")
        self.epoch = state["epoch"]
        self.dynamics = {
            name: Dynamics(layer["phi"].clone(), layer["delta_phi"].clone(), layer["velocity"].clone())
            for name, layer in state["layers"].items()
        }
        self._remember(state["previous"])
        self.policy.load_state_dict(state.get("policy", {}))  # an empty dictionary is lost where a state was flattened
        self._put_in_force({name: state["layers"][name]["trainable"].clone() for name in self.layers})

    def detach(self) -> None:
        """Put model and optimiser back as they were; frozen neurons train again."""
        self.keeper.remove()
        self.slicing.remove()
        self.trainable = self._everything()

    def _remember(self, tensors: Mapping[str, Tensor]) -> None:
        # In place: a second copy of the weights would double the probe's memory for a moment.
        for name, tensor in self._previous.items():
            tensor.copy_(tensors[name])

    def _put_in_force(self, trainable: dict[str, Tensor]) -> None:
        self.trainable = trainable
        self.slicing.put_in_force(trainable)
        if self.backward == "truncated":
            # What no error reaches has nothing to learn from: it is paused like what is frozen.
            reached = self.anatomy.reached(trainable, self.backward, compiled=self.compiled)
            trainable = {name: rows & (name in reached) for name, rows in trainable.items()}
        self.keeper.keep(trainable)

    def _everything(self) -> dict[str, Tensor]:
        return {name: torch.ones(layer.neurons, dtype=torch.bool, device="cpu") for name, layer in self.layers.items()}

    def _first_probe_input(self) -> Any:
        if isinstance(self.probe_loader, Iterator):
            raise FreezingError("probe_loader: can be read only once; give a list or a DataLoader, which starts anew")
        with undisturbed(self.model):
            batch = next(iter(self.probe_loader), None)
        if batch is None:
            raise FreezingError("probe_loader: yields no batch; give it at least one input")
        return copied(first_input(batch), device_of(self.model))

    def _settle(self, chosen: Mapping[str, Tensor], dynamics: Mapping[str, Dynamics]) -> dict[str, Tensor]:
        """Return the new sets: the policy's, but for what must train whatever it says."""
        trainable = self._everything()
        if not isinstance(chosen, Mapping):
            policy, kind = type(self.policy).__name__, type(chosen).__name__
            raise FreezingError(f"policy {policy}: answered {kind}; it must be a mapping of layers to bool tensors")
        for name, mask in chosen.items():
            self._check_choice(name, mask)
            if name not in self.anatomy.never_frozen:
                # A neuron whose similarity is unknown cannot be said to be still.
                trainable[name] = mask.detach().cpu() | dynamics[name].delta_phi.isnan()
        for tie in self.anatomy.neurons.ties:
            together = torch.stack([trainable[name] for name in tie]).any(0)
            trainable |= {name: together.clone() for name in tie}
        return trainable

    def _check_choice(self, name: str, mask: object) -> None:
        policy = type(self.policy).__name__
        if name not in self.layers:
            raise FreezingError(f"policy {policy}: chose for a layer {name!r} that the model does not have")
        expected = f"a bool tensor of [{self.layers[name].neurons}]"
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (self.layers[name].neurons,):
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise FreezingError(f"policy {policy}: answered {got} for layer {name!r}; it must be {expected}")

    def _observation(self, moved: Dynamics, trainable: Tensor) -> Observation:
        return Observation(moved.phi.float(), moved.delta_phi.float(), moved.velocity.float(), trainable.clone())
