"""An epoch's training step captured in a CUDA graph and replayed; frozen sets must not change meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from neq_cli.errors import TrainingError

Step = Callable[[Tensor, Any], Tensor]
"""One step on (inputs, targets): it returns the loss, and works only on memory that stays where it is."""

WARM_UP = 3
"""Steps run eagerly before the capture: in them kernels are chosen, optimiser state is born, memory settles."""


class Graph(Protocol):
    """What a capture leaves: a step that can be run again, without Python."""

    def replay(self) -> None:
        """Run the captured step on whatever its inputs hold now."""


Capture = Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]


class GraphedStep:
    """One epoch's ``step``: the first few run eagerly, then one is captured, and all that follow are replays.

    The eager ones are steps of the training like any other, so that nothing has to be undone. Batches of another shape
    than the captured one run eagerly too.
    """

    def __init__(self, step: Step, *, capture: Capture | None = None) -> None:
        self.step = step
        self.capture = captured if capture is None else capture
        self.eager_steps = 0
        self.inputs: Tensor | None = None
        self.targets: Tensor | None = None
        self.graph: Graph | None = None
        self.loss: Tensor | None = None

    def __call__(self, inputs: Any, targets: Any) -> Tensor:
        """Train on one batch, on the training device; returns the loss, which the next call may overwrite."""
        for what, value in (("inputs", inputs), ("targets", targets)):
            if not isinstance(value, Tensor):
                raise TrainingError(
                    f"cuda_graph: {what} must be one tensor, not {type(value).__name__}; set it to false"
                )
        if self.eager_steps < WARM_UP:
            self.eager_steps += 1
            return _aside(self.step, inputs, targets)
        if self.graph is None:
            self.inputs, self.targets = inputs.clone(), targets.clone()
            self.graph, self.loss = self.capture(self._captured)
        assert self.inputs is not None
        assert self.targets is not None
        assert self.loss is not None
        if (inputs.shape, targets.shape) != (self.inputs.shape, self.targets.shape):
            return self.step(inputs, targets)
        self.inputs.copy_(inputs, non_blocking=True)
        self.targets.copy_(targets, non_blocking=True)
        self.graph.replay()
        return self.loss

    def _captured(self) -> Tensor:
        assert self.inputs is not None
        return self.step(self.inputs, self.targets)


def _aside(step: Step, inputs: Tensor, targets: Tensor) -> Tensor:
    """Run ``step`` on another stream than the default one, as CUDA wants it before a capture."""
    if inputs.device.type != "cuda":
        return step(inputs, targets)
    current, side = torch.cuda.current_stream(inputs.device), _side_stream(inputs.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        loss = step(inputs, targets)
    current.wait_stream(side)
    return loss


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one for all steps and epochs: every stream keeps memory of its own, such as cuBLAS's workspaces."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def captured(step: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
    """Run ``step`` once into a CUDA graph; return that, and what the step returns at every replay."""
    graph = torch.cuda.CUDAGraph()
    # Only this thread is watched: another may be pinning the next batches' memory meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        loss = step()
    return graph, loss
