"""What is compiled is told of every second, from its first moment to its end; compilations in a row count as one."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
import torch
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler

from neq_cli.events import Compiling
from neq_cli.training.machine import compiling

ARGUMENTS = CallbackArgs(CallbackTrigger.DYNAMO, "0/0")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_EVERY", 0.02)
    monkeypatch.setattr(compiling, "_APART", 0.3)


def test_torch_tells_when_it_compiles() -> None:
    torch._dynamo.reset()
    told: list[Compiling] = []
    before = len(callback_handler.start_callbacks), len(callback_handler.end_callbacks)

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        time.sleep(0.2)  # what is shorter need not be told
        return module.forward

    with compiling.told(told.append):
        assert not told
        torch.compile(lambda tensor: tensor.sin() + 1, backend=backend)(torch.ones(3))
    assert told[-1].ended
    assert told[-1].seconds >= 0
    assert (len(callback_handler.start_callbacks), len(callback_handler.end_callbacks)) == before


def test_it_is_told_again_and_again_and_parts_count_as_one() -> None:
    told: list[Compiling] = []
    with compiling.told(told.append):
        began = time.monotonic()
        for _ in range(2):
            callback_handler.run_start_callbacks(ARGUMENTS)
            time.sleep(0.15)
            callback_handler.run_end_callbacks(ARGUMENTS)
        ended = time.monotonic()
        time.sleep(0.6)
        first = list(told)
        callback_handler.run_start_callbacks(ARGUMENTS)
        time.sleep(0.05)
        callback_handler.run_end_callbacks(ARGUMENTS)
    *during, end = first
    assert len(during) >= 4
    assert [one.ended for one in first] == [False] * len(during) + [True]
    seconds = [one.seconds for one in first]
    assert seconds[:-1] == sorted(seconds[:-1])
    assert seconds[0] < 0.15
    assert 0.3 <= end.seconds <= ended - began
    assert told[len(first)].seconds < 0.3  # another one, which begins at nothing
    assert told[-1].ended


def test_an_end_while_it_compiles_is_told_too() -> None:
    told: list[Compiling] = []
    with contextlib.suppress(KeyError), compiling.told(told.append):
        callback_handler.run_start_callbacks(ARGUMENTS)
        time.sleep(0.1)
        raise KeyError
    assert told[-1].ended
    count = len(told)
    time.sleep(0.1)
    assert len(told) == count
