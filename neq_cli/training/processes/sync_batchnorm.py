"""BatchNorm over the batches of all processes; on the CPU too, where torch's own layer refuses to train."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from neq_cli.errors import RecipeValueError


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """Have the BatchNorm layers of ``model`` take mean and variance over all processes of the default group.

    Changes their class in place, so that names, parameters, buffers, hooks and shared layers stay; returns ``model``.
    All processes must run the same layers in the same order. Raises RecipeValueError for a layer that computes more
    than BatchNorm does.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    kinds = {name: _kind(layer, device) for name, layer in layers.items()}
    for name, kind in kinds.items():
        if kind is None:
            raise RecipeValueError(
                "sync_batchnorm",
                f"{name or 'the model'} is a {type(layers[name]).__name__}, which cannot be synchronised on "
                f"{device.type}, unlike torch's own BatchNorm; set it to false",
            )
    for name, layer in layers.items():
        layer.__class__ = kinds[name]  # type: ignore[assignment]
        cast(Any, layer).process_group = None
    return model


def _kind(layer: nn.Module, device: torch.device) -> type[nn.Module] | None:
    """Return what class ``layer`` shall have, None where that would change more than its statistics."""
    if type(layer) in _OWN.values():
        return type(layer)
    if type(layer).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward) or any(True for _ in layer.children()):
        return None
    if device.type == "cuda":
        return nn.SyncBatchNorm
    return next((own for stock, own in _OWN.items() if isinstance(layer, stock)), None)


class _Synchronised(_BatchNorm):
    """What ``torch.nn.SyncBatchNorm`` does, for any device, its sums made on the CPU, as by gloo.

    No subclass of it: DistributedDataParallel refuses those on the CPU.
    In eval mode each process is on its own, as with torch's: without running statistics a batch is scaled by itself.
    """

    process_group: Any

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size(self.process_group) == 1:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        return cast(Tensor, self._over_all(input))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _over_all(self, input: Tensor) -> Tensor:
        mean, variance, count = _statistics(input.detach(), self.process_group)
        if count < 2:
            raise ValueError(f"BatchNorm trains on more than one value per channel, got {tuple(input.shape)}")
        if self.track_running_stats:
            self._follow(mean, variance * (count / (count - 1)))
        normalised = _Normalised.apply(
            input, self.weight, self.bias, mean, variance, self.eps, count, self.process_group
        )
        return cast(Tensor, normalised)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Bring the running statistics nearer to those of a batch; ``variance`` is the unbiased one."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        new = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.mul_(1 - new).add_(mean, alpha=new)
        self.running_var.mul_(1 - new).add_(variance, alpha=new)


class _Synchronised1d(_Synchronised, nn.BatchNorm1d):
    """BatchNorm1d over all processes."""


class _Synchronised2d(_Synchronised, nn.BatchNorm2d):
    """BatchNorm2d over all processes."""


class _Synchronised3d(_Synchronised, nn.BatchNorm3d):
    """BatchNorm3d over all processes."""


_OWN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _Synchronised1d,
    nn.BatchNorm2d: _Synchronised2d,
    nn.BatchNorm3d: _Synchronised3d,
}


def _statistics(input: Tensor, group: Any) -> tuple[Tensor, Tensor, float]:
    """Return mean and biased variance per channel over all processes, and how many values each is of."""
    channels = input.shape[1]
    values = _wide(input)
    if len(input):
        variance, mean = torch.var_mean(values, _others(values), correction=0)
    else:
        mean = variance = values.new_zeros(channels)
    own = torch.cat([mean.cpu(), variance.cpu(), torch.tensor([input.numel() // channels])]).double()
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group)
    every = torch.stack(gathered)
    means, variances, counts = every[:, :channels], every[:, channels:-1], every[:, -1:]
    count = counts.sum()
    shared = (counts * means).sum(0) / count
    # What each process's values vary, and what its mean differs: no difference of large squares.
    spread = (counts * (variances + (means - shared).square())).sum(0) / count
    return shared.to(values), spread.to(values), float(count)


class _Normalised(torch.autograd.Function):
    """BatchNorm by statistics that depend on the input of every process."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        count: float,
        group: Any,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, mean, torch.rsqrt(variance + eps))
        ctx.count, ctx.group = count, group
        scale, shift = (None if tensor is None else tensor.to(mean) for tensor in (weight, bias))
        return nn.functional.batch_norm(input, mean, variance, scale, shift, training=False, eps=eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, scale = ctx.saved_tensors
        grad, shape = _wide(grad_output), (-1, *[1] * (input.dim() - 2))
        normalised = (_wide(input) - mean.view(shape)) * scale.view(shape)
        sums = torch.stack([grad.sum(_others(grad)), (grad * normalised).sum(_others(grad))])
        grad_input = grad_weight = grad_bias = None
        if weight is not None and ctx.needs_input_grad[1]:
            grad_weight = sums[1].to(weight.dtype)
        if weight is not None and ctx.needs_input_grad[2]:
            grad_bias = sums[0].to(weight.dtype)
        if ctx.needs_input_grad[0]:
            total = sums.to("cpu", copy=True)
            dist.all_reduce(total, group=ctx.group)
            along, across = (total / ctx.count).to(sums)
            # Mean and variance depend on the input too: what of the gradient goes along with them has no effect.
            grad_input = grad - along.view(shape) - normalised * across.view(shape)
            grad_input = grad_input * (scale if weight is None else scale * weight.to(scale)).view(shape)
            grad_input = grad_input.to(input.dtype)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _others(tensor: Tensor) -> list[int]:
    return [dimension for dimension in range(tensor.dim()) if dimension != 1]
