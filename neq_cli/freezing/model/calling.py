"""A model is called with an item of the probe: by position, a mapping by keywords, anything else as its user says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from neq_cli.errors import FreezingError
from neq_cli.freezing.model.observing import first_input

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
    if isinstance(inputs, Mapping) and (taken := _taken(model, inputs)):
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


class _Called(nn.Module):
    """A model as it is called."""

    def __init__(self, model: nn.Module, call: Call | None) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, inputs: Any) -> Any:
        return call_model(self.model, inputs, self.call)


def _taken(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    taken = {key: value for key, value in inputs.items() if key in parameters}
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return dict(inputs) if takes_any and (taken or len(parameters) == 1) else taken


def _told(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return f"a tensor of shape {list(inputs.shape)}"
    if isinstance(inputs, Mapping):
        return f"a mapping with the keys {', '.join(map(str, inputs))}"
    if isinstance(inputs, (tuple, list)):
        return f"a {type(inputs).__name__} of {len(inputs)}"
    return f"a {type(inputs).__name__}"
