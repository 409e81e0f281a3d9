"""Activation checkpointing over equal blocks: what is computed again saves what the first pass saved, in every step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from frozen import freeze
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neq_cli import Freezer
from neq_cli.freezing.backward.dispatch import Dispatch
from neq_cli.freezing.backward.sliced import BackwardMode

pytestmark = [
    pytest.mark.usefixtures("double"),
    # The reentrant form says so in every pass without gradients, the probe's too.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(tokens)
        tokens = tokens + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return tokens + self.second(torch.relu(self.first(tokens)))


class Convolves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(8, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.Conv2d(12, 8, 1)

    def forward(self, images: Tensor) -> Tensor:
        return images + self.second(torch.relu(self.norm(self.first(images))))


class Stack(nn.Module):
    """Equal blocks between an embedding and an output layer; ``how``: reentrant, not so, or without checkpoints."""

    def __init__(self, block: Callable[[], nn.Module], embed: nn.Module) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = embed, nn.ModuleList(block() for _ in range(3)), nn.Linear(8, 3)
        self.how = "none"

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = block(hidden) if self.how == "none" else checkpoint(block, hidden, use_reentrant=self.how == "yes")
        return self.head(hidden.flatten(2).mean(2) if hidden.dim() == 4 else hidden.mean(1))


STACKS: dict[str, tuple[Callable[[], Stack], tuple[int, ...]]] = {
    "attention": (lambda: Stack(Attends, nn.Linear(8, 8)), (2, 5, 8)),
    "convolutions": (lambda: Stack(Convolves, nn.Conv2d(3, 8, 1)), (2, 3, 4, 4)),
}


def loss_of(outputs: Tensor) -> Tensor:
    return outputs.to(torch.get_default_dtype()).sin().sum()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}


def truncated(model: nn.Module, freezer: Freezer) -> nn.Module:
    """Return a plain copy of ``model`` whose layers pass errors by the trainable rows of their weights only."""
    reference = copy.deepcopy(model)
    for name, module in reference.named_modules():
        if name in freezer.trainable and isinstance(module, (nn.Linear, nn.Conv2d)):
            mask = freezer.trainable[name].view(-1, *[1] * (module.weight.dim() - 1))
            module.forward = _by_trainable_rows(module, mask)
    return reference


def _by_trainable_rows(module: nn.Module, mask: Tensor) -> Callable[[Tensor], Tensor]:
    own = copy.deepcopy(module).requires_grad_(False)

    def forward(inputs: Tensor) -> Tensor:
        own.weight.data = torch.where(mask, module.weight, 0).detach()
        constant = type(module).forward(own, inputs)
        # The value of the usual one; the input's gradient comes through the constant.
        return type(module).forward(module, inputs.detach()) + constant - constant.detach()

    return forward


def plain(model: nn.Module, freezer: Freezer) -> nn.Module:
    reference = truncated(model, freezer) if freezer.backward == "truncated" else copy.deepcopy(model)
    reference.how = "none"
    return reference


def sets_for(freezer: Freezer, mode: BackwardMode) -> dict[str, Tensor]:
    """Freeze about half of every layer; in truncated mode not attention's projections, for whose errors see others."""
    generator = torch.Generator().manual_seed(1)
    draws = {name: torch.rand(layer.neurons, generator=generator) for name, layer in freezer.layers.items()}
    return {name: draw >= 0.5 for name, draw in draws.items() if mode == "exact" or "proj" not in name}


def stack(name: str, mode: BackwardMode, reentrant: str) -> tuple[Stack, Tensor, Freezer]:
    make, shape = STACKS[name]
    model, inputs = make(), torch.randn(shape)
    freezer = freeze(model, inputs, {}, mode)
    sets = sets_for(freezer, mode)
    freezer.detach()
    freezer = freeze(model, inputs, sets, mode)
    model.how = reentrant
    return model, inputs, freezer


BOTH = pytest.mark.parametrize("reentrant", ["yes", "no"])
MODES = pytest.mark.parametrize("mode", ["exact", "truncated"])
# Convolutions of one position have a kernel of their own, for which "sliced" stands in elsewhere.
KERNELS = ("dense", "dense from the start", "sliced", "rounded")
BY_EACH_KERNEL = pytest.mark.parametrize("kernel", KERNELS, indirect=True)


@BOTH
@MODES
@pytest.mark.parametrize("name", STACKS)
def test_steps_are_those_of_plain_pytorch(
    name: str, mode: BackwardMode, reentrant: str, kernel: str, assert_gradients: Any
) -> None:
    model, inputs, freezer = stack(name, mode, reentrant)
    for _ in range(3):
        reference = plain(model, freezer)
        for net in (model, reference):
            net.zero_grad()
            loss_of(net(inputs)).backward()
        assert_gradients(freezer, gradients(model), gradients(reference))
        freezer.optimizer.step()
    assert {use.kernel for layer, use in freezer.kernels().items() if "norm" not in layer} <= {kernel, "sliced"}


@BOTH
@BY_EACH_KERNEL
@pytest.mark.parametrize("way", ["accumulated", "two at once", "never stepped", "kept"])
def test_other_loops(way: str, reentrant: str, kernel: str, assert_gradients: Any) -> None:
    model, inputs, freezer = stack("attention", "exact", reentrant)
    for _ in range(3):
        reference = plain(model, freezer)
        for net in (model, reference):
            net.zero_grad()
            if way == "two at once":  # two forward passes, then one backward pass
                (loss_of(net(inputs)) + loss_of(net(2 * inputs))).backward()
            elif way == "kept" and reentrant == "no":  # two backward passes through one graph
                loss = loss_of(net(inputs))
                loss.backward(retain_graph=True)
                loss.backward()
            else:
                for factor in (1, 2):
                    loss_of(net(factor * inputs)).backward()
        assert_gradients(freezer, gradients(model), gradients(reference))
        if way != "never stepped":
            freezer.optimizer.step()
    settled = set(freezer.hold.slicing.settled)
    assert settled == (set() if way == "never stepped" else set(freezer.dispatch.choices))


def test_nothing_takes_force_within_a_backward_pass(assert_gradients: Any, force: Any) -> None:
    """As where an optimiser steps in a hook on a gradient."""
    force("dense")
    model, inputs, freezer = stack("attention", "exact", "no")
    reference = plain(model, freezer)
    settle = freezer.hold.slicing.settle
    handle = model.blocks[1].second.bias.register_post_accumulate_grad_hook(settle)
    for net in (model, reference):
        loss_of(net(inputs)).backward()
    handle.remove()
    assert_gradients(freezer, gradients(model), gradients(reference))
    assert freezer.hold.slicing.settled == {} != freezer.dispatch.choices
    settle()
    assert freezer.hold.slicing.settled == freezer.dispatch.choices


@BOTH
@pytest.mark.usefixtures("single")
def test_under_autocast(reentrant: str, kernel: str, assert_gradients: Any) -> None:
    for name in STACKS:
        model, inputs, freezer = stack(name, "exact", reentrant)
        for _ in range(2):
            reference = plain(model, freezer)
            for net in (model, reference):
                net.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    outputs = net(inputs)
                loss_of(outputs).backward()
            # Products of numbers of eight bits each, through three blocks.
            assert_gradients(freezer, gradients(model), gradients(reference), 2**-3)
            freezer.optimizer.step()


@pytest.fixture
def _process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@BOTH
@BY_EACH_KERNEL
@pytest.mark.usefixtures("_process_group")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_in_distributed_data_parallel(reentrant: str, kernel: str, assert_gradients: Any) -> None:
    make, shape = STACKS["attention"]
    model, inputs = make(), torch.randn(shape)
    # With the wrapper's own look at the graph; reentrant checkpoints need a graph that never changes.
    wrapped = nn.parallel.DistributedDataParallel(model, static_graph=reentrant == "yes")
    freezer = freeze(wrapped, inputs, 0.5)
    model.how = reentrant
    for _ in range(3):
        reference = plain(model, freezer)
        for net in (wrapped, reference):
            net.zero_grad()
            loss_of(net(inputs)).backward()
        assert_gradients(freezer, gradients(model), gradients(reference))
        freezer.optimizer.step()


@MODES
def test_compiled(mode: BackwardMode, assert_gradients: Any, force: Any) -> None:
    force("dense")
    torch._dynamo.reset()
    make, shape = STACKS["convolutions"]
    model, inputs = make(), torch.randn(shape)
    compiled = torch.compile(model, backend="aot_eager")
    freezer = freeze(compiled, inputs, 0.5, mode)
    model.how = "no"
    for _ in range(2):
        reference = plain(model, freezer)
        for net, of in ((compiled, model), (reference, reference)):
            of.zero_grad()
            loss_of(net(inputs)).backward()
        assert_gradients(freezer, gradients(model), gradients(reference))
        freezer.optimizer.step()


# A choice is one that forward passes go by from the next step on.


def test_a_choice_takes_force_between_steps(force: Any) -> None:
    force("dense")
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    inputs = torch.randn(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sets: Mapping[str, Tensor] = {"0": torch.arange(8) < 4}
    dispatch = Dispatch()
    freezer = freeze(model, inputs, sets, optimizer=optimizer, dispatch=dispatch)
    paths: list[str] = []
    model[0].register_forward_hook(lambda _, __, output: paths.append(type(output.grad_fn).__name__))
    for updates in (False, True, True):
        loss_of(model(inputs)).backward()
        if updates:
            optimizer.step()
    assert paths == ["SomeRowsBackward", "SomeRowsBackward", "AddmmBackward0"]
    assert freezer.kernels()["0"].kernel == "dense"
    # Other sets of the same kind know of it from the start, and so does a Freezer that is given the table.
    for again in (True, False):
        if again:
            freezer.step()
        else:
            freezer.detach()
            assert not any("settle" in repr(hook) for hook in optimizer._optimizer_step_post_hooks.values())
            freeze(model, inputs, sets, optimizer=optimizer, dispatch=dispatch)
        paths.clear()
        model(inputs)
        assert paths == ["AddmmBackward0"]


# Models as they come.


@BOTH
@BY_EACH_KERNEL
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_transformers_models(name: str, reentrant: str, kernel: str, assert_gradients: Any) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    if name == "bert":
        config = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=3, **small)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        model = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.LlamaConfig(vocab_size=20, max_position_embeddings=8, num_key_value_heads=1, **small)
        model = transformers.LlamaForCausalLM(config)
    model = model.double().train()
    reference = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant == "yes"})
    inputs = torch.randint(20, (2, 6))
    freezer = freeze(model, inputs, 0.5)
    for _ in range(2):
        reference.load_state_dict(model.state_dict())
        for net in (model, reference):
            net.zero_grad()
            loss_of(net(inputs).logits).backward()
        assert_gradients(freezer, gradients(model), gradients(reference))
        freezer.optimizer.step()
    assert sum(use.kernel in (kernel, "sliced") for use in freezer.kernels().values()) > 10
