"""Modules of a frozen front run as at inference while the model trains: in eval mode, batch norms folded."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from neq_cli.freezing.backward.swapping import OURS, Swapped, stands_aside, subclass

_FOLD, _DONE = f"{OURS}fold", f"{OURS}done"


class _Resting(Swapped):
    """A module of a frozen front that runs as at inference, also while the model trains."""

    takes_anything = True

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        if stands_aside():
            return super().forward(*arguments, **keywords)
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            return super().forward(*arguments, **keywords)
        finally:
            for module in training:
                module.training = True


class Fold:
    """A convolution's weight and bias with a batch normalisation by running statistics in them."""

    def __init__(self, convolution: nn.Module, norm: nn.Module) -> None:
        self.convolution, self.norm = cast(nn.Conv2d, convolution), cast(nn.BatchNorm2d, norm)
        self._made_of: list[tuple[Tensor, int]] = []
        self._made: tuple[Tensor, Tensor] | None = None

    def operands(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias, made anew where something that they are made of has changed."""
        convolution, norm = self.convolution, self.norm
        tensors = (convolution.weight, convolution.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        made_of = [(tensor, tensor._version) for tensor in tensors if tensor is not None]
        alike = len(made_of) == len(self._made_of) and all(
            one is other and version == before
            for (one, version), (other, before) in zip(made_of, self._made_of, strict=True)
        )
        if self._made is None or not alike:
            self._made, self._made_of = self._fold(), made_of
        return self._made

    @torch.no_grad()
    def _fold(self) -> tuple[Tensor, Tensor]:
        convolution, norm = self.convolution, self.norm
        scale = torch.rsqrt(cast(Tensor, norm.running_var) + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        bias = -cast(Tensor, norm.running_mean) * scale
        if convolution.bias is not None:
            bias = bias + convolution.bias * scale
        if norm.bias is not None:
            bias = bias + norm.bias
        return convolution.weight * scale.view(-1, *[1] * (convolution.weight.dim() - 1)), bias


class _Folded(Swapped):
    """A convolution of a frozen front that does what the batch normalisation after it would do at inference."""

    def forward(self, input: Tensor) -> Tensor:
        fold: Fold = vars(self)[_FOLD]
        vars(fold.norm).pop(_DONE, None)
        if stands_aside():
            return cast(Tensor, super().forward(input))
        output: Tensor = fold.convolution._conv_forward(input, *fold.operands())
        vars(fold.norm)[_DONE] = id(output)
        return output


class _Skipped(Swapped):
    """A batch normalisation that is folded into the convolution before it."""

    def forward(self, input: Tensor) -> Tensor:
        if vars(self).pop(_DONE, None) == id(input):
            return input
        return cast(Tensor, super().forward(input))


def swap_resting(module: nn.Module) -> None:
    """Have ``module`` and all in it run as at inference while the model trains, on top of what else it is."""
    module.__class__ = subclass(cast(Any, _Resting), cast(Any, type(module)))


def swap_folded(convolution: nn.Module, norm: nn.Module) -> None:
    """Have ``convolution`` do what batch ``norm`` after it does at inference, on top of what else it is."""
    vars(convolution)[_FOLD] = Fold(convolution, norm)
    convolution.__class__ = subclass(cast(Any, _Folded), cast(Any, type(convolution)))


def swap_skipped(norm: nn.Module) -> None:
    """Have batch ``norm`` leave alone what a folded convolution has done for it, on top of what else it is."""
    norm.__class__ = subclass(cast(Any, _Skipped), cast(Any, type(norm)))
