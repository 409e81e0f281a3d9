"""What a model is, to the bit."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def everything(net: nn.Module) -> dict[str, Any]:
    """Return all that the modules of ``net`` hold: values, names in their order, tensors by identity and content."""
    found: dict[str, Any] = {}
    for name, module in net.named_modules():
        for key, value in vars(module).items():
            if not isinstance(value, (Tensor, dict)):
                found[f"{name} {key}"] = value
        found[f"{name} keys"] = (*vars(module), *module._buffers, *module._parameters, *module._modules)
        for key, tensor in {**vars(module), **module._parameters, **module._buffers}.items():
            if isinstance(tensor, Tensor):
                bits = tensor.detach().clone().numpy().tobytes()
                # Growing in place moves the memory itself.
                place = 0 if getattr(module, "way", None) == "in place" else tensor.data_ptr()
                found[f"{name} {key}"] = (id(tensor), place, tuple(tensor.shape), tensor.requires_grad, bits)
    return found
