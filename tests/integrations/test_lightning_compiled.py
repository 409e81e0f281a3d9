"""Modules that torch.compile runs under Lightning's Trainer: compiled once, with the sets of the run without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neq_cli import NEq

pytest.importorskip("lightning.pytorch", reason="needs lightning; pip install 'neq[lightning]'")

from integrations.lightning_trainings import PROBE, Held, Net, batches, trainer_of
from torch._dynamo.backends.registry import lookup_backend

from neq_cli.integrations.lightning import NEqCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Lightning's advice on workers, devices and logging
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
MORE = torch._dynamo.config.recompile_limit + 2
"""Epochs, and so frozen sets, for which torch would not compile anew each time."""


@pytest.fixture(autouse=True)
def _by_rule() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Silent(Net):
    """Logs nothing: ``self.log`` breaks the graph of a training step that is compiled whole."""

    def __init__(self) -> None:
        super().__init__()
        self.net[3].p = 0.0  # drawn by other means where it is compiled

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class Unseen(Silent):
    """Compiles what no module tells of."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self.run = torch.compile(lambda inputs: self.net(inputs), backend=backend)

    def forward(self, inputs: Tensor) -> Any:
        return self.run(inputs)


def compiled(how: str, backend: Any) -> tuple[Any, dict[str, Any]]:
    """Return what fit is given, and the callback's options."""
    module: Any = Silent()
    if how == "module":
        return torch.compile(module, backend=backend), {}
    if how == "its net":
        module.net = torch.compile(module.net, backend=backend)
    elif how == "its net in place":
        module.net.compile(backend=backend)
    elif how == "what is not seen":
        return Unseen(backend), {"compiled": True}
    return module, {}


def train(path: Path, module: Any, **options: Any) -> tuple[dict[str, Any], Held]:
    callback = NEqCallback(PROBE, NEq(0.2), **options)
    held = Held(callback)
    trainer_of(path, held, callback, epochs=MORE).fit(module, batches())
    layers = callback.state_dict()["freezers"][0]["layers"]
    return {name.replace("_orig_mod.", ""): layer for name, layer in layers.items()}, held


@pytest.mark.parametrize("how", ["module", "its net", "its net in place", "what is not seen"])
def test_one_graph_serves_all_sets_and_they_are_those_of_the_run_without(tmp_path: Path, how: str) -> None:
    torch._dynamo.reset()
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    module, options = compiled(how, counting)
    found, held = train(tmp_path / "compiled", module, **options)
    assert len(graphs) == 1
    assert held.compared > 100
    assert held.moved > 100
    expected, _ = train(tmp_path / "eager", Silent())
    assert any(not bool(layer["trainable"].all()) for layer in expected.values()), "nothing froze"
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        assert torch.equal(found[name]["trainable"], layer["trainable"]), name
        torch.testing.assert_close(found[name]["velocity"], layer["velocity"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_by_inductor(tmp_path: Path) -> None:
    found, held = train(tmp_path / "compiled", torch.compile(Silent()))
    assert held.compared > 100
    expected, _ = train(tmp_path / "eager", Silent())
    for name, layer in expected.items():
        assert torch.equal(found[name]["trainable"], layer["trainable"]), name
