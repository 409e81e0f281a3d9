"""A model is called with an item of the probe: by position, a mapping by keywords, anything else as its user says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neq_cli.errors import FreezingError
from neq_cli.freezing.model.observing import first_input, map_tensors

Call = Callable[[nn.Module, Any], Any]
"""Calls a model with an item of the probe, whatever that is."""


def inputs_of(item: Any, call: Call | None) -> Any:
    """Return what the model is called with: all of an item for a ``call``, else the first of (inputs, targets...)."""
    return item if call is not None else first_input(item)


def call_model(model: nn.Module, inputs: Any, call: Call | None) -> Any:
    """Return what ``model`` makes of ``inputs``.

    A mapping is passed as keywords, those that its forward takes; as it is where forward takes none of them.
    """
    if call is not None:
        return call(model, inputs)
    if isinstance(inputs, Mapping) and (taken := taken_keywords(model, inputs)):
        return model(**taken)
    return model(inputs)


def call_with_parameters(model: nn.Module, parameters: Mapping[str, Tensor], inputs: Any, call: Call | None) -> Any:
    """Return what ``model`` makes of ``inputs`` with these ``parameters``, by name, in the place of its own."""
    named = {f"model.{name}": parameter for name, parameter in parameters.items()}
    return functional_call(_Called(model, call), named, (inputs,))


def refused(model: nn.Module, inputs: Any, call: Call | None, error: Exception) -> FreezingError:
    """Return what to say where the model cannot be called with an item of the probe, because of ``error``."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    takes = f"forward of {type(model).__name__} takes {inspect.signature(model.forward)}"
    mend = "mend the call" if call is not None else "yield that, or give Freezer(..., call=lambda model, item: ...)"
    return FreezingError(f"probe_loader: {_told(inputs)} cannot be passed to the model ({reason}); {takes}; {mend}")


def has_no_shapes(model: nn.Module) -> bool:
    """Return whether ``model`` has lazy layers, whose shapes a first call tells."""
    tensors = (*model.parameters(), *model.buffers())
    return any(isinstance(one, (nn.UninitializedParameter, nn.UninitializedBuffer)) for one in tensors)


def give_shapes(model: nn.Module, inputs: Any, call: Call | None) -> None:
    """Call ``model`` once, in eval mode, so that its lazy layers have shapes.

    Their weights are drawn from torch's global generator then, as in a first step of training.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            call_model(model, map_tensors(torch.clone, inputs), call)
    except Exception as error:
        raise refused(model, inputs, call, error) from error
    finally:
        for module, training in modes.items():
            module.training = training


class _Called(nn.Module):
    """A model as it is called."""

    def __init__(self, model: nn.Module, call: Call | None) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, inputs: Any) -> Any:
        return call_model(self.model, inputs, self.call)


def taken_keywords(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of ``inputs`` the forward of ``model`` takes as keywords."""
    parameters = inspect.signature(model.forward).parameters
    taken = {key: value for key, value in inputs.items() if key in parameters}
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    names_none = all(one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL) for one in parameters.values())
    return dict(inputs) if takes_any and (taken or names_none) else taken


def _told(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return f"a tensor of shape {list(inputs.shape)}"
    if isinstance(inputs, Mapping):
        return f"a mapping with the keys {', '.join(map(str, inputs))}"
    if isinstance(inputs, (tuple, list)):
        return f"a {type(inputs).__name__} of {len(inputs)}"
    return f"a {type(inputs).__name__}"
