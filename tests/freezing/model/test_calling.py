"""Probes of any shape: a mapping, a list of images, and whatever a call takes."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neq_cli import Freezer
from neq_cli.errors import FreezingError


class Text(nn.Module):
    """Takes what a tokenizer gives, and gives the loss where it is given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(20, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, input_ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.words(input_ids)
        hidden = hidden if mask is None else hidden * mask.unsqueeze(-1)
        logits = self.head(torch.tanh(self.hidden(hidden.mean(1))))
        found = {"logits": logits}
        return found if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), **found}


class Images(nn.Module):
    """Takes a list of images of different sizes, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, images: list[Tensor]) -> Tensor:
        assert all(image.shape[0] == 3 for image in images)
        return torch.stack([self.head(torch.relu(self.body(image)).mean((1, 2))) for image in images])


class Denoiser(nn.Module):
    """Takes more than its inputs, by position."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.time, self.head = nn.Linear(4, 5), nn.Linear(1, 5), nn.Linear(5, 4)

    def forward(self, noisy: Tensor, step: Tensor, *, scale: float) -> Tensor:
        return self.head(torch.tanh(self.first(noisy) + scale * self.time(step[:, None].float())))


def freezer_of(model: nn.Module, items: Any, **options: Any) -> Freezer:
    return Freezer(model, torch.optim.SGD(model.parameters(), lr=0.5), items, **options)


def phi_after_a_step(freezer: Freezer, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    freezer.optimizer.step()
    freezer.step()
    return {name: moved.phi for name, moved in freezer.dynamics.items()}


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_mapping_is_passed_as_keywords_those_that_forward_takes(kind: type) -> None:
    ids, mask = torch.randint(20, (4, 7)), torch.ones(4, 7)
    found = []
    for items in (
        [kind({"input_ids": ids, "mask": mask, "labels": torch.tensor([0, 1, 2, 0]), "text": ["a", "b", "c", "d"]})],
        [ids],
    ):
        torch.manual_seed(0)
        model = Text()
        freezer = freezer_of(model, items)
        assert set(freezer.anatomy.may_freeze) == {"words", "hidden"}
        found.append(phi_after_a_step(freezer, model(ids)["logits"].square().sum()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_lists_of_images_are_looked_at_whole() -> None:
    images = [torch.randn(3, 6, 6), torch.randn(3, 5, 7)]
    model = Images()
    freezer = freezer_of(model, [(images, ["targets", "of", "both"])])
    phi = phi_after_a_step(freezer, model(images).square().sum())
    assert set(phi) == {"body", "head"}
    assert all(one.isfinite().all() for one in phi.values())
    assert freezer.anatomy.trace.elements["body"] == 4 * (4 * 4 + 3 * 5)  # of both images


def test_a_call_takes_whatever_an_item_is() -> None:
    noisy, steps = torch.randn(3, 4), torch.tensor([1, 5, 9])
    items = [{"latents": noisy, "at": steps}]
    model = Denoiser()

    def call(model: nn.Module, item: dict[str, Tensor]) -> Any:
        return model(item["latents"], item["at"], scale=0.1)

    freezer = freezer_of(model, items, call=call)
    phi = phi_after_a_step(freezer, model(noisy, steps, scale=0.1).square().sum())
    assert set(freezer.anatomy.may_freeze) == {"first", "time"}
    assert all((one < 1).any() for one in phi.values())
    assert freezer.flops().paper_dense == 2 * (4 * 5 + 5 + 5 * 4)  # of one sample


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (
        [{"ids": torch.ones(1, 2), "labels": torch.ones(1)}],
        {},
        r"probe_loader: a mapping with the keys ids, labels cannot be passed to the model \(TypeError: .*input_ids.*"
        r"; forward of Text takes \(input_ids.*; yield that, or give Freezer\(..., call=lambda model, item: ...\)",
    ),
    (
        [torch.ones(1, 2)],
        {"call": lambda model, item: model(item.ids)},
        r"a tensor of shape \[1, 2\].*; mend the call$",
    ),
    ([[["a text"]]], {}, r"probe_loader: a list of 1 cannot be passed to the model"),
]


@pytest.mark.parametrize(("items", "options", "said"), REFUSED)
def test_what_cannot_be_passed_is_one_line(items: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(FreezingError, match=said) as raised:
        freezer_of(Text(), items, **options)
    assert "\n" not in str(raised.value)
