"""Which memory format trains faster, channels_last or contiguous: timed on the model, which is left as it was."""

from __future__ import annotations

import time

import torch
from torch import nn

from neq_cli.freezing.model.observing import tensors_in, undisturbed
from neq_cli.training.machine.full_memory import out_of_memory

_SECONDS = 1.0
"""What one timed step may take, about: the batch is made that small."""
_ROUNDS = 3


def choose_layout(
    model: nn.Module,
    image_shape: tuple[int, int, int] | None,
    batch_size: int,
    *,
    autocast: torch.dtype | None,
    fixed: bool,
) -> tuple[bool, str]:
    """Return whether channels_last is faster for ``model``, put into that format, and how that was found out.

    ``image_shape`` is [channels, height, width]; None where the model takes other things than images. ``fixed`` decides
    by rule, the same in every run: channels_last wherever two-dimensional convolutions of images run on a CPU or CUDA
    device.
    """
    device = next(model.parameters()).device
    if not any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules()):
        return False, "channels_last: auto, false (no two-dimensional convolution)"
    if image_shape is None:
        return False, "channels_last: auto, false (not timed: the model is not given images alone)"
    if fixed:
        chosen, how = device.type in ("cpu", "cuda"), "by rule, as deterministic asks"
    else:
        try:
            plain, last = _timed(model, image_shape, batch_size, autocast)
        except Exception as error:
            if out_of_memory(error):  # nor would training fit
                raise
            # Some models want other inputs in training than images alone.
            chosen, how = device.type == "cuda", f"not timed: {type(error).__name__}"
        else:
            chosen, how = last < plain, f"{1e3 * last:.4g} ms a step, contiguous {1e3 * plain:.4g} ms"
    model.to(memory_format=torch.channels_last if chosen else torch.contiguous_format)
    return chosen, f"channels_last: auto, {str(chosen).lower()} ({how})"


def _timed(
    model: nn.Module, image_shape: tuple[int, int, int], batch_size: int, autocast: torch.dtype | None
) -> tuple[float, float]:
    """Return the seconds of a step forward and back, contiguous and channels_last: the best of interleaved rounds."""
    device = next(model.parameters()).device
    formats = (torch.contiguous_format, torch.channels_last)
    best = [float("inf"), float("inf")]
    with undisturbed(model), torch.enable_grad():
        model.train()
        samples = min(2, batch_size)
        images = torch.zeros(batch_size, *image_shape, device=device).normal_()
        for _ in range(2):  # the first one warms up
            took = _step(model, images[:samples], autocast)
        samples = max(samples, min(batch_size, int(_SECONDS * samples / max(took, 1e-6))))
        for number in range(_ROUNDS + 1):
            for place, memory_format in enumerate(formats):
                model.to(memory_format=memory_format)
                took = _step(model, images[:samples].contiguous(memory_format=memory_format), autocast)
                best[place] = min(best[place], took) if number else best[place]
        model.zero_grad(set_to_none=True)
    return best[0], best[1]


def _step(model: nn.Module, images: torch.Tensor, autocast: torch.dtype | None) -> float:
    started = time.perf_counter()
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        outputs = model(images)
    total = torch.stack([output.float().square().mean() for output in tensors_in(outputs)]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    # Reading a number waits for the device.
    sum(float(parameter.grad.sum()) for parameter in list(model.parameters())[:1] if parameter.grad is not None)
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - started
