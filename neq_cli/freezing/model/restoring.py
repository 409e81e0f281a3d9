"""A model is found again as it was, whatever ran in between: attributes, buffers, modes and what they change.

By hand, since ``state_dict()`` knows no attributes, and a deep copy is not the model that others hold.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neq_cli.freezing.rows.frozen_rows import bits

_CONTAINERS = (dict, OrderedDict, list, set)
_PLAIN = (Tensor, nn.Parameter)


@contextmanager
def found_again(model: nn.Module) -> Iterator[None]:
    """Find every module inside ``model`` afterwards as it was before.

    Modes go back through each module's own ``train``, where it has one: it may undo there what it did in ``eval``. Then
    every attribute is put back, among them buffers that a forward pass registered, replaced or took away, and what
    dictionaries, lists and sets held; then, to the bit, the values of buffers, of tensors that are attributes, and of
    the parameters that an own ``train`` may have changed, since adding and subtracting again rounds.
    """
    modules = list(model.modules())
    modes = {module: module.training for module in modules}
    attributes = [_attributes(module) for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    needs = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    tensors = {id(tensor): tensor for tensor in _that_may_change(model, modules)}
    values = [_value(tensor) for tensor in tensors.values()]
    with ExitStack() as stack:  # all of it, also where a module refuses to go back
        stack.callback(_need_gradients_again, needs)
        for put_back in (*values, *attributes):
            stack.callback(put_back)
        stack.callback(_back_to, modes)
        yield


def has_own_train(module: nn.Module) -> bool:
    """Return whether ``module`` does something of its own when its mode changes."""
    stock = nn.Module
    own = {"train", "eval"} & set(vars(module))
    return bool(own) or type(module).train is not stock.train or type(module).eval is not stock.eval


def changing(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that modules may change in ``train`` and ``eval``, or that a forward pass does."""
    return [
        parameter
        for module in model.modules()
        if has_own_train(module) or getattr(module, "max_norm", None) is not None  # an embedding scales rows it reads
        for parameter in module.parameters()
    ]


def install(model: nn.Module, tensors: Mapping[str, Tensor | None]) -> None:
    """Put ``tensors``, by qualified name, in the place of the model's own, wherever a module holds them.

    The buffers will be those of ``tensors``: others are taken away, missing ones registered. To be undone by
    ``found_again``.
    """
    own = dict(model.named_parameters())
    names = {id(tensor): name for name, tensor in [*own.items(), *model.named_buffers()]}
    parameters = {id(parameter): tensors.get(name, parameter) for name, parameter in own.items()}
    missing = {name: tensor for name, tensor in tensors.items() if name not in own}
    modules = dict(model.named_modules())
    for prefix, module in modules.items():
        for container in vars(module).values():
            # Recurrent layers have their weights in a list of their own beside the usual place.
            _exchange(container, parameters)
        for key, buffer in list(module._buffers.items()):
            # A buffer of several modules is named after the first.
            name = names.get(id(buffer), f"{prefix}.{key}" if prefix else key)
            if name in tensors:
                module._buffers[key] = tensors[name]
            elif buffer is not None:
                del module._buffers[key]
            missing.pop(name, None)
    for name, tensor in missing.items():
        owner = modules.get(name.rpartition(".")[0])
        if owner is not None:
            owner._buffers[name.rpartition(".")[2]] = tensor


def _exchange(container: Any, tensors: Mapping[int, Tensor | None]) -> None:
    if type(container) in (dict, OrderedDict):
        for key, value in container.items():
            container[key] = tensors.get(id(value), value)
    elif type(container) is list:
        container[:] = [tensors.get(id(value), value) for value in container]


def _need_gradients_again(needs: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, needed in needs:
        if parameter.requires_grad != needed:
            parameter.requires_grad_(needed)


def _back_to(modes: Mapping[nn.Module, bool]) -> None:
    # Modules come before those inside of them, whose modes they may change.
    for module, training in modes.items():
        if module.training != training and has_own_train(module):
            module.train(training)
    for module, training in modes.items():
        if module.training != training:
            module.training = training


def _attributes(module: nn.Module) -> Callable[[], None]:
    """Return what puts the attributes that ``module`` has now back, and what those that are containers hold."""
    kept = dict(vars(module))
    contents = [(value, type(value)(value)) for value in kept.values() if type(value) in _CONTAINERS]

    def put_back() -> None:
        present = vars(module)
        for key in [key for key in present if key not in kept]:
            del present[key]
        present.update(kept)
        for container, content in contents:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)

    return put_back


def _that_may_change(model: nn.Module, modules: list[nn.Module]) -> Iterator[Tensor]:
    yield from model.buffers()
    yield from changing(model)
    for module in modules:
        yield from (value for value in vars(module).values() if type(value) is Tensor)


def _value(tensor: Tensor) -> Callable[[], None]:
    """Return what gives ``tensor`` back the value, and the memory, that it has now."""
    if tensor.is_meta or isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        return lambda: None
    memory, kept = tensor.detach(), tensor.detach().clone()
    plain = type(tensor) in _PLAIN and tensor.layout is torch.strided
    plain = plain and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())

    @torch.no_grad()
    def put_back() -> None:
        if plain:
            if _place(tensor) != _place(memory):
                tensor.data = memory
            # Memory that several elements share can be compared, but not written.
            if torch.equal(bits(tensor), bits(kept)):
                return
        tensor.copy_(kept)

    return put_back


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
