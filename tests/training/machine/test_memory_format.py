from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from neq_cli.training.machine import memory_format as layout
from neq_cli.training.machine.memory_format import choose_layout


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, 2))


@pytest.mark.parametrize("faster", ["contiguous", "channels_last"])
def test_the_faster_one_is_chosen(monkeypatch: pytest.MonkeyPatch, faster: str) -> None:
    seen = []

    def step(model: nn.Module, images: torch.Tensor, autocast: torch.dtype | None) -> float:
        weight = next(model.parameters())
        form = "contiguous" if weight.is_contiguous() and images.is_contiguous() else "channels_last"
        seen.append(form)
        return 1.0 if form == faster else 2.0

    monkeypatch.setattr(layout, "_step", step)
    model = network()
    chosen, note = choose_layout(model, (3, 8, 8), 4, autocast=None, fixed=False)
    assert chosen == (faster == "channels_last")
    assert next(model.parameters()).is_contiguous() == (not chosen)
    assert note.startswith(f"channels_last: auto, {str(chosen).lower()} (")
    assert "1000 ms" in note
    assert "2000 ms" in note
    assert seen.count("channels_last") >= 2


def test_the_model_and_chance_are_left_as_they_were() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    model.eval()
    choose_layout(model, (3, 8, 8), 4, autocast=torch.bfloat16, fixed=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_rule_decides_where_runs_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_timed", lambda *_: pytest.fail("timed"))
    assert choose_layout(network(), (3, 8, 8), 4, autocast=None, fixed=True)[0]


def test_without_convolutions_there_is_nothing_to_choose() -> None:
    assert choose_layout(nn.Sequential(nn.Linear(3, 2)), (3, 8, 8), 4, autocast=None, fixed=False) == (
        False,
        "channels_last: auto, false (no two-dimensional convolution)",
    )


def test_a_model_that_takes_more_than_images_is_not_timed() -> None:
    class Needy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self.conv(images)

    assert choose_layout(Needy(), (3, 8, 8), 4, autocast=None, fixed=False) == (
        False,
        "channels_last: auto, false (not timed: TypeError)",
    )
