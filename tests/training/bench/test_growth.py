"""How the cost of bookkeeping is measured: on a model whose size is told by arithmetic, with sets that are in force."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import distributed

from neq_cli.training.bench.growth import SHARES, SIZES, Rig, counted, main, transformer

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")


@pytest.mark.parametrize(("size", "about"), [("1M", 1e6), ("10M", 1e7), ("100M", 1e8), ("500M", 5e8)])
def test_sizes_are_what_they_are_called(size: str, about: float) -> None:
    width, depth = SIZES[size]
    block = 12 * width * width + 13 * width  # four maps with biases and two norms
    parameters = 512 * width + depth * block + 2 * width + 512 * width + 512
    assert abs(parameters / about - 1) < 0.03
    with torch.device("meta"):
        assert sum(one.numel() for one in transformer(width, depth).parameters()) == parameters


def test_half_of_every_layer_is_frozen_and_what_that_takes_is_told() -> None:
    rig = Rig(32, 2, batch=2, length=4, probe=3)
    found = rig.measured(rounds=1, steps=2)
    neurons = 2 * 11 * 32 + 2 * 32 + 512  # of each block, the embedding and the last norm, and the outputs
    assert (found["neurons"], found["layers"], found["processes"]) == (neurons, 2 * 6 + 3, 1)
    assert set(found["seconds"]) == {str(share) for share in SHARES}
    nothing, half = (found["seconds"][str(share)] for share in SHARES)
    assert 0 < nothing["rows"] < half["rows"] < half["step"]
    assert half["observation"] > half["two_forward_passes"] > 0
    assert found["exchanged_bytes"] == {}
    rig.policy.share = 0.5
    rig.freezer.step()
    frozen = {name: int((~rows).sum()) for name, rows in rig.freezer.trainable.items()}
    assert sum(frozen.values()) == (neurons - 512) / 2  # the output layer never freezes


def test_counting_leaves_operations_as_they_were() -> None:
    before = distributed.all_reduce, distributed.broadcast
    with counted():
        assert distributed.all_reduce is not before[0]
    assert (distributed.all_reduce, distributed.broadcast) == before


def test_one_line_says_what_was_measured_and_how(capsys: pytest.CaptureFixture[str]) -> None:
    main(["1M", "--rounds", "1", "--steps", "1", "--batch", "1", "--length", "4", "--probe", "2"])
    found = json.loads(capsys.readouterr().out)
    assert (found["size"], found["parameters"], found["probe"], found["rounds"]) == ("1M", 993_728, 2, 1)
