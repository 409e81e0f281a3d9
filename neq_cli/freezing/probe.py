"""The probe compares old and new network over the probe set: how similar every neuron's output stayed (Eq. 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neq_cli.errors import FreezingError
from neq_cli.freezing.comparison import Comparison
from neq_cli.freezing.earlier import buffers_of, snapshot
from neq_cli.freezing.equilibrium import Definition
from neq_cli.freezing.model.calling import Call, call_model, inputs_of
from neq_cli.freezing.model.layers import RECURRENT, Layer
from neq_cli.freezing.model.observing import map_tensors, undisturbed, watch_calls
from neq_cli.freezing.model.restoring import changing, found_again, has_own_train, install
from neq_cli.freezing.processes.agreement import batches_together, named_from_first
from neq_cli.freezing.processes.sharding import UNDIVIDED, Sharding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def similarity(
    model: nn.Module,
    previous: Mapping[str, Tensor | None],
    layers: Mapping[str, Layer],
    batches: Iterable[Any],
    *,
    definition: Definition = "paper",
    autocast: torch.dtype | None = None,
    process_group: ProcessGroup | None = None,
    call: Call | None = None,
    sharding: Sharding = UNDIVIDED,
    idle: Any = None,
) -> dict[str, Tensor]:
    """Return phi of every layer between ``model`` and its ``previous`` parameters and buffers: float64, [neurons], CPU.

    ``batches`` yield inputs, or (inputs, targets...), or what ``call`` calls the model with. Memory beyond
    ``previous``: one batch of activations, and copies of the buffers and of the parameters that modules may change on
    their way to eval mode. Each batch finds the buffers as they are between epochs: what a forward pass makes of them
    is taken back.
    ``paper``: one cosine over all outputs of a neuron. ``reference``: the mean over samples of one cosine per sample
    (dimension 0 of a layer's output).
    A layer that the batches do not reach, or whose calls differ between the two networks, has phi NaN.

    ``process_group``: each process has a share of the batches, which may be none; the sums are added up over all, so
    that phi is what one process finds in all of them, up to rounding in float64. The buffers are process 0's.

    ``sharding``: how the model is divided over the group, where it is; ``previous`` are the parts here. Weights are
    gathered, in their own precision, for as long as a unit of the model runs, or all of a network's at once where they
    are factors in a forward pass or a module has a ``train`` of its own. Every process takes part in that: one whose
    batches are through runs on the inputs ``idle`` while others have some.
    """
    device = device_of(model)
    comparison = Comparison(per_sample=definition == "reference")
    seen = 0
    with undisturbed(model), torch.no_grad():
        buffers = buffers_of(model)
        if process_group is not None:
            # BatchNorm's statistics are each process's own since the last step.
            buffers = named_from_first(buffers, device, process_group)
        at_once = bool(sharding) and _needs_all_at_once(model, layers)
        # The model's own parameters stand where they are, but for sharded ones.
        networks = ((previous, previous, comparison.keep), (buffers, snapshot(model), comparison.compare))
        for batch in batches_together(batches, process_group if sharding else None):
            seen += batch is not None
            inputs = idle if batch is None else inputs_of(batch, call)
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                for tensors, weights, on_call in networks:
                    with _network(model, tensors, weights, sharding, at_once), ExitStack() as watching:
                        if batch is not None:
                            watched = watch_calls(layers.values(), dict(model.named_parameters()), on_call)
                            watching.enter_context(watched)
                        call_model(model, copied(inputs, device), call)
            comparison.end_batch()
    if process_group is not None:
        seen = comparison.add_up(layers, seen, device, process_group)
    if not seen:
        raise FreezingError("probe_loader: yields no batch; give it at least one input")
    return {name: comparison.phi(layer) for name, layer in layers.items()}


@contextmanager
def _network(
    model: nn.Module,
    tensors: Mapping[str, Tensor | None],
    weights: Mapping[str, Tensor | None],
    sharding: Sharding,
    at_once: bool,
) -> Iterator[None]:
    """Have ``tensors`` in the places of the model's own inside, and the gathered ``weights`` where it is sharded."""
    with sharding.stand_ins(weights, at_once=at_once) as stand_ins, found_again(model):
        install(model, {**_own(tensors, model), **stand_ins.parameters})
        stand_ins.take_over()
        model.eval()
        yield


def _needs_all_at_once(model: nn.Module, layers: Mapping[str, Layer]) -> bool:
    """Whether weights of a sharded model are asked for elsewhere than where its modules run."""
    by_memory = any(layer.use is not None or isinstance(layer.module, RECURRENT) for layer in layers.values())
    return by_memory or any(has_own_train(module) for module in model.modules())


def _own(tensors: Mapping[str, Tensor | None], model: nn.Module) -> dict[str, Tensor | None]:
    """Return ``tensors`` with copies of those that a forward pass, or a module on its way to eval mode, may change."""
    changed = {id(parameter) for parameter in changing(model)}
    kept = {name for name, parameter in model.named_parameters() if id(parameter) not in changed}
    return {
        name: tensor if tensor is None or name in kept else tensor.detach().clone() for name, tensor in tensors.items()
    }


def first_probe_input(
    model: nn.Module, loader: Iterable[Any], agreed: Callable[[Any], Any], call: Call | None = None
) -> Any:
    """Return the inputs of the probe's first batch, where the model is; ``agreed`` makes all processes' the same.

    Raises FreezingError where the probe yields nothing, or can be read only once.
    """
    if isinstance(loader, Iterator):
        raise FreezingError("probe_loader: can be read only once; give a list or a DataLoader, which starts anew")
    with undisturbed(model):
        batch = next(iter(loader), None)
    inputs = agreed(None if batch is None else inputs_of(batch, call))
    if inputs is None:
        raise FreezingError("probe_loader: yields no batch; give it at least one input")
    return copied(inputs, device_of(model))


def copied(inputs: Any, device: torch.device) -> Any:
    """Return copies of all tensors on ``device``: a model may overwrite its input in place."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True, copy=True), inputs)


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's parameters are."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
