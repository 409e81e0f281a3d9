"""Which memory format trains faster, channels_last or contiguous: timed on the model, which is left as it was.

Channels_last is chosen only where it is faster beyond the spread of the times: in a near tie, runs of the same recipe
would else train in different formats.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from neq_cli.freezing.model.observing import tensors_in, undisturbed
from neq_cli.training.machine.full_memory import out_of_memory
from neq_cli.training.machine.paired_ratio import PairedRatio, paired_ratio

_SECONDS = 0.5
"""What one timed step may take, about: the batch is made that small."""
_ROUNDS = 9
"""The interval of their ratios goes from the second to the last but one: a disturbed round decides nothing."""

Choice = tuple[bool, str]
"""Whether channels_last is taken, and why."""
Agree = Callable[[Callable[[], Choice]], Choice]
"""Returns what runs that are to train in one format have chosen; the first of them by what it is given."""


def faster_beyond_noise(milliseconds: tuple[float, float], ratio: PairedRatio) -> Choice:
    """Return what follows from the times of a step, contiguous and channels_last, and from the ratio of the rounds."""
    verdict = ", within noise" if ratio.is_noise else ""
    times = f"{milliseconds[1]:.4g} ms a step, contiguous {milliseconds[0]:.4g} ms"
    return ratio.high < 1, f"{times}, ratio {ratio.low:.3f} to {ratio.high:.3f}{verdict}"


def choose_layout(
    model: nn.Module,
    image_shape: tuple[int, int, int] | None,
    batch_size: int,
    *,
    autocast: torch.dtype | None,
    fixed: bool,
    agree: Agree | None = None,
) -> Choice:
    """Return whether channels_last is faster for ``model``, put into that format, and how that was found out.

    ``image_shape`` is [channels, height, width]; None where the model takes other things than images. ``fixed`` decides
    by rule, the same in every run: channels_last wherever two-dimensional convolutions of images run on a CPU or CUDA
    device. Else ``agree``, where there is one, says whether anything is to be timed.
    """
    device = next(model.parameters()).device
    if not any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules()):
        return False, "channels_last: auto, false (no two-dimensional convolution)"
    if image_shape is None:
        return False, "channels_last: auto, false (not timed: the model is not given images alone)"
    shape = image_shape
    if fixed:
        chosen, how = device.type in ("cpu", "cuda"), "by rule, as deterministic asks"
    else:

        def choose() -> Choice:
            return _choose(model, shape, batch_size, autocast)

        chosen, how = choose() if agree is None else agree(choose)
    model.to(memory_format=torch.channels_last if chosen else torch.contiguous_format)
    return chosen, f"channels_last: auto, {str(chosen).lower()} ({how})"


def _choose(
    model: nn.Module, image_shape: tuple[int, int, int], batch_size: int, autocast: torch.dtype | None
) -> Choice:
    try:
        plain, last = _timed(model, image_shape, batch_size, autocast)
    except Exception as error:
        if out_of_memory(error):  # nor would training fit
            raise
        # Some models want other inputs in training than images alone.
        return next(model.parameters()).device.type == "cuda", f"not timed: {type(error).__name__}"
    ratio = paired_ratio([after / before for before, after in zip(plain, last, strict=True)])
    return faster_beyond_noise((1e3 * statistics.median(plain), 1e3 * statistics.median(last)), ratio)


def _timed(
    model: nn.Module, image_shape: tuple[int, int, int], batch_size: int, autocast: torch.dtype | None
) -> tuple[list[float], list[float]]:
    """Return the seconds of a step forward and back, contiguous and channels_last, round by round."""
    device = next(model.parameters()).device
    formats = (torch.contiguous_format, torch.channels_last)
    seconds: tuple[list[float], list[float]] = ([], [])
    with undisturbed(model), torch.enable_grad():
        model.train()
        samples = min(2, batch_size)
        images = torch.zeros(batch_size, *image_shape, device=device).normal_()
        for _ in range(2):  # the first one warms up
            took = _step(model, images[:samples], autocast)
        samples = max(samples, min(batch_size, int(_SECONDS * samples / max(took, 1e-6))))
        for number in range(_ROUNDS + 1):  # the first one warms up
            # By turns which of the two comes first: what a machine does grows or fades within a round, too.
            for place in (0, 1) if number % 2 else (1, 0):
                model.to(memory_format=formats[place])
                took = _step(model, images[:samples].contiguous(memory_format=formats[place]), autocast)
                if number:
                    seconds[place].append(took)
        model.zero_grad(set_to_none=True)
    return seconds


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
