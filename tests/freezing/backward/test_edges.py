"""A model with frozen sets in force is still the model: copied, saved, hooked, checkpointed, wrapped, and put back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from frozen import Sets, freeze
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from neq_cli.freezing.backward.sliced import BackwardMode


@pytest.fixture(autouse=True)
def _sliced(double: None, force: Callable[[str], None]) -> None:
    """In tests that do not go through all kernels."""
    force("sliced")


HALF = torch.tensor([True, False] * 4)
NONE = torch.zeros(8, dtype=torch.bool)


def gradients(model: nn.Module, inputs: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(inputs).sin().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_rows(
    found: Mapping[str, Tensor | None], dense: Mapping[str, Tensor | None], sets: Mapping[str, Tensor]
) -> None:
    """All parameters are of layers whose neurons run along dimension 0."""
    for name, expected in dense.items():
        trainable = sets.get(name.rpartition(".")[0])
        if trainable is not None and not trainable.any():
            assert found[name] is None, name
            continue
        if trainable is not None:
            expected = torch.where(trainable.view(-1, *[1] * (expected.dim() - 1)), expected, 0)
        assert found[name] is not None, name
        torch.testing.assert_close(found[name], expected, msg=lambda text, name=name: f"{name}: {text}")


class Net(nn.Module):
    """One layer of each kind that changes class: convolution, norm, transposed, attention, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.attention, self.linear, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.up(torch.relu(self.second(torch.relu(self.norm(self.conv(images))))))
        tokens = hidden.flatten(2).permute(2, 0, 1)
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        return self.head(torch.tanh(self.linear(tokens.mean(0))))


IN_FORCE = {
    "conv": HALF, "norm": NONE, "second": NONE, "up": HALF, "attention.in_proj": HALF.repeat(3), "linear": HALF,
}  # fmt: skip


def images() -> Tensor:
    return torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(3))


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


# Copies and files.


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_torch])
def test_copies_are_stock(through: Callable[[nn.Module], nn.Module], mode: BackwardMode) -> None:
    model = Net()
    stock, expected = classes(model), gradients(model, images())
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    freeze(model, images(), IN_FORCE, mode)
    changed = [name for name, kind in classes(model).items() if kind is not stock[name]]
    assert changed == [name.removesuffix(".in_proj") for name in IN_FORCE]
    copied = through(model)
    assert classes(copied) == stock
    assert all("neq" not in key for module in copied.modules() for key in vars(module))
    for name, gradient in gradients(copied, images()).items():
        assert torch.equal(gradient, expected[name]), name
    # Nor has the original lost anything.
    assert gradients(model, images())["second.weight"] is None


def test_the_model_looks_and_is_stored_as_ever() -> None:
    model = Net()
    before = (
        repr(model),
        list(model.state_dict()),
        {name: type(module).__name__ for name, module in model.named_modules()},
    )
    freeze(model, images(), IN_FORCE)
    after = (
        repr(model),
        list(model.state_dict()),
        {name: type(module).__name__ for name, module in model.named_modules()},
    )
    assert after == before
    assert isinstance(model.conv, nn.Conv2d)
    assert isinstance(model.norm, nn.modules.batchnorm._BatchNorm)
    assert isinstance(model.attention, nn.MultiheadAttention)
    other = Net()
    other.load_state_dict(model.state_dict())
    model.load_state_dict(other.state_dict())


def test_an_averaged_model() -> None:
    model = Net()
    stock = classes(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze(model, images(), IN_FORCE, optimizer=optimizer)
    averaged = AveragedModel(model)
    assert classes(averaged.module) == stock
    for _ in range(2):
        gradients(model, images())
        optimizer.step()
        averaged.update_parameters(model)
    for name, parameter in averaged.module.named_parameters():
        assert torch.isfinite(parameter).all(), name
    assert torch.equal(averaged.module.conv.weight[~HALF], model.conv.weight[~HALF])
    assert not torch.equal(averaged.module.conv.weight[HALF], model.conv.weight[HALF])


def test_detach_gives_everything_back() -> None:
    model = Net()
    stock, dense = classes(model), gradients(model, images())
    dense = {name: gradient.clone() for name, gradient in dense.items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    for mode in ("exact", "truncated"):
        freezer = freeze(model, images(), IN_FORCE, mode)
        assert classes(model) != stock
        freezer.detach()
        assert classes(model) == stock
        assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
        assert all(torch.equal(gradient, dense[name]) for name, gradient in gradients(model, images()).items())
        assert freezer.kernels() == {}


# Sets that come and go.


def test_sets_that_change_back_and_forth(kernel: str) -> None:
    model = Net()
    reference, stock = copy.deepcopy(model), classes(model)
    freezer = freeze(model, images(), {})
    generator = torch.Generator().manual_seed(5)
    names = ["conv", "norm", "second", "up", "attention.in_proj", "linear"]
    for share in (0.5, 0.0, 1.0, 0.2, 0.9, 1.0, 0.0, 0.6):
        sets = {name: torch.rand(freezer.layers[name].neurons, generator=generator) >= share for name in names}
        freezer.policy = Sets(sets)
        freezer.step()
        found, dense = gradients(model, images()), gradients(reference, images())
        up, other = (one.pop("up.weight") for one in (found, dense))
        known = {**sets, "attention": sets["attention.in_proj"]}
        assert_rows(found, dense, known)
        if sets["up"].any():
            torch.testing.assert_close(up, other * sets["up"][None, :, None, None])
        else:
            assert up is None
        if share == 0.0:
            assert classes(model) == stock
    freezer.detach()


def test_two_models_at_once(kernel: str) -> None:
    first, second = Net(), Net()
    references = [copy.deepcopy(net) for net in (first, second)]
    sets = [{"conv": HALF, "linear": ~HALF}, {"conv": ~HALF, "norm": NONE, "attention.in_proj": torch.zeros(24) > 0}]
    freezers = [freeze(net, images(), one) for net, one in zip((first, second), sets, strict=True)]
    sets[1]["attention"] = sets[1].pop("attention.in_proj")
    for _ in range(2):
        for net, reference, one in zip((first, second), references, sets, strict=True):
            assert_rows(gradients(net, images()), gradients(reference, images()), one)
    freezers[0].detach()
    assert type(first.conv) is nn.Conv2d
    assert type(second.conv) is not nn.Conv2d
    assert_rows(gradients(second, images()), gradients(references[1], images()), sets[1])


# Forward passes that nobody differentiates.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_forward_pass_is_stock(
    context: Callable[[], Any], mode: BackwardMode, training: bool
) -> None:
    model = Net().train(training)
    reference = copy.deepcopy(model)
    freeze(model, images(), IN_FORCE, mode)
    with context():
        assert torch.equal(model(images()), reference(images()))
    assert torch.equal(model(images()), reference(images()))


# Layers that compute their output their own way.


class Scaled(nn.Conv2d):
    """Standardises its weight first."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight / self.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return nn.functional.conv2d(input, weight, self.bias)


class OwnConv(nn.Conv2d):
    """Overrides the inner function."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.tanh(), bias)


class Plain(nn.Conv2d):
    """Only adds a method."""

    def describe(self) -> str:
        return "plain"


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Subclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.scaled, self.own, self.plain = Plain(3, 8, 1), Scaled(8, 8, 1), OwnConv(8, 8, 1), Plain(8, 8, 1)
        self.patched, self.doubling, self.head = nn.Linear(8, 8), Doubling(8, 8), nn.Linear(8, 2)
        self.patched.forward = self.shifted

    def shifted(self, input: Tensor) -> Tensor:
        return nn.Linear.forward(self.patched, input) + 1

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.plain(torch.tanh(self.own(torch.tanh(self.scaled(torch.tanh(self.stem(images)))))))
        return self.head(torch.tanh(self.doubling(torch.tanh(self.patched(hidden.mean((2, 3)))))))


OWN_WAY = {"scaled": "Scaled", "own": "OwnConv", "patched": "Linear", "doubling": "Doubling"}


@pytest.mark.parametrize("mode", ["exact", "truncated"])
def test_subclasses_that_compute_their_own_way_are_dense_and_say_so(mode: BackwardMode) -> None:
    torch.manual_seed(1)
    model = Subclasses()
    torch.manual_seed(1)
    reference = Subclasses()
    sets = {**dict.fromkeys(OWN_WAY, HALF), "plain": HALF}
    freezer = freeze(model, images(), sets, mode)
    found, dense = gradients(model, images()), gradients(reference, images())
    if mode == "exact":
        assert_rows(found, dense, sets)
    for name, kind in OWN_WAY.items():
        use = freezer.kernels()[name]
        assert (use.kernel, use.rows_computed, use.reason) == ("dense", 8, f"{kind} computes its output its own way")
    assert freezer.kernels()["plain"].kernel == "sliced"
    assert model.plain.describe() == "plain"


def test_wholly_frozen_they_stop_computing() -> None:
    torch.manual_seed(1)
    model = Subclasses()
    torch.manual_seed(1)
    reference = Subclasses()
    sets = dict.fromkeys(("scaled", "own", "doubling"), NONE)
    freezer = freeze(model, images(), sets)
    given: list[str] = []
    for name in sets:  # whatever autograd computed would pass here
        for parameter in model.get_submodule(name).parameters():
            parameter.register_hook(lambda gradient, name=name: given.append(name))
    assert_rows(gradients(model, images()), gradients(reference, images()), sets)
    assert given == []
    assert all(use.kernel == "none" for use in freezer.kernels().values())
    # Their parameters are their own again once the forward pass is over.
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(RuntimeError):
        model.scaled(torch.randn(1, 5, 2, 2))
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.scaled.parameters())


# Parameters that this optimiser does not hold.


def test_a_bias_that_another_optimiser_trains_keeps_its_whole_gradient(kernel: str) -> None:
    for elsewhere in ("2.bias", "2.weight"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
        reference = copy.deepcopy(model)
        mine = [parameter for name, parameter in model.named_parameters() if name != elsewhere]
        optimizer = torch.optim.SGD(mine, lr=0.1)
        own = {"2.bias": "2.weight", "2.weight": "2.bias"}[elsewhere]
        for trainable in (HALF, NONE):
            freezer = freeze(model, torch.randn(3, 4), {"2": trainable}, optimizer=optimizer)
            inputs = torch.randn(3, 4)
            found, dense = gradients(model, inputs), gradients(reference, inputs)
            torch.testing.assert_close(found[elsewhere], dense[elsewhere])
            if trainable.any():
                assert not found[own][~trainable].any()
                assert freezer.kernels()["2"].kernel == "dense"
                assert "optimiser" in freezer.kernels()["2"].reason
            else:
                assert found[own] is None
            freezer.detach()


class Mixed(nn.Module):
    """Every number of the bias is made of all of the original's."""

    def forward(self, original: Tensor) -> Tensor:
        return original.cumsum(0)


def test_a_bias_that_is_computed_from_something_else_keeps_its_whole_gradient(kernel: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    nn.utils.parametrize.register_parametrization(model[0], "bias", Mixed())
    reference, inputs = copy.deepcopy(model), torch.randn(3, 4)
    name = "0.parametrizations.bias.original"
    for trainable in (HALF, NONE):
        freezer = freeze(model, inputs, {"0": trainable})
        found, dense = gradients(model, inputs), gradients(reference, inputs)
        torch.testing.assert_close(found[name], dense[name])
        freezer.detach()


def test_a_bias_that_is_computed_element_by_element_is_the_neurons_own(kernel: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    reference, inputs = copy.deepcopy(model), torch.randn(3, 4)
    name = "0.parametrizations.bias.original"
    for trainable in (HALF, NONE):
        freezer = freeze(model, inputs, {"0": trainable})
        found, dense = gradients(model, inputs)[name], gradients(reference, inputs)[name]
        if not trainable.any():
            assert found is None
        else:
            torch.testing.assert_close(found[trainable], dense[trainable])
            assert not found[~trainable].any()
        freezer.detach()


def test_a_weight_that_is_passed_on_transposed_is_no_slice_of_itself(kernel: str) -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.tied, self.head = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(nn.functional.linear(torch.tanh(self.first(inputs)), self.tied.weight.t()))

    model, inputs = Transposed(), torch.randn(3, 8)
    reference = copy.deepcopy(model)
    freeze(model, inputs, {"tied": HALF})
    assert_rows(gradients(model, inputs), gradients(reference, inputs), {"tied": HALF})


# Activation checkpointing.

# Its reentrant form says so in every pass without gradients, the probe's too.
NO_GRADIENTS = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem, self.first, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=None)
        self.attention, self.linear, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 8), nn.Linear(8, 2)

    def block(self, hidden: Tensor) -> Tensor:
        return torch.relu(self.norm(self.first(torch.tanh(hidden))))

    def mix(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens + self.attention(tokens, tokens, tokens)[0])

    def forward(self, images: Tensor) -> Tensor:
        hidden = checkpoint(self.block, self.stem(images), use_reentrant=self.reentrant)
        tokens = checkpoint(self.mix, hidden.flatten(2).permute(2, 0, 1), use_reentrant=self.reentrant)
        return self.head(torch.tanh(tokens.mean(0)))


@NO_GRADIENTS
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.parametrize(
    "sets",
    [
        {"first": HALF, "norm": HALF, "attention.in_proj": HALF.repeat(3), "linear": HALF},
        {"stem": HALF, "first": HALF, "attention.in_proj": HALF.repeat(3) & (torch.arange(24) > 7)},
        {"norm": NONE, "linear": HALF},
    ],
)
def test_activation_checkpointing(sets: dict[str, Tensor], mode: BackwardMode, reentrant: bool, kernel: str) -> None:
    results = []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        model = Checkpointed(reentrant=reentrant)
        if not checkpointed:
            model.forward = lambda x, model=model: model.head(
                torch.tanh(model.mix(model.block(model.stem(x)).flatten(2).permute(2, 0, 1)).mean(0))
            )
        freeze(model, images(), sets, mode)
        results.append(gradients(model, images()))
    for name, gradient in results[1].items():
        torch.testing.assert_close(results[0][name], gradient, rtol=1e-11, atol=1e-12)
    if mode == "exact":
        torch.manual_seed(0)
        known = {key.removesuffix(".in_proj"): value for key, value in sets.items()}
        assert_rows(results[0], gradients(Checkpointed(reentrant=reentrant), images()), known)


@NO_GRADIENTS
@pytest.mark.parametrize(
    ("mode", "sets"),
    [
        ("exact", {"first": NONE, "norm": NONE}),  # a wholly frozen block still passes the error on
        ("exact", {"linear": NONE, "attention.in_proj": NONE.repeat(3)}),
        ("truncated", {"attention.in_proj": NONE.repeat(3)}),
    ],
)
@pytest.mark.parametrize("reentrant", [True, False])
def test_wholly_frozen_layers_in_checkpoints(mode: BackwardMode, sets: dict[str, Tensor], reentrant: bool) -> None:
    model = Checkpointed(reentrant=reentrant)
    reference = copy.deepcopy(model)
    freeze(model, images(), sets, mode)
    found = gradients(model, images())
    if mode == "exact":
        known = {key.removesuffix(".in_proj"): value for key, value in sets.items()}
        assert_rows(found, gradients(reference, images()), known)
    else:
        assert found["stem.weight"] is not None


@NO_GRADIENTS
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    ("mode", "sets"),
    [
        ("exact", {"stem": NONE}),  # nothing trains before the first block
        ("truncated", {"stem": NONE}),
        ("truncated", {"linear": NONE}),  # the second block's output is cut off
    ],
)
def test_frozen_layers_before_and_at_the_end_of_a_checkpoint(
    mode: BackwardMode, sets: dict[str, Tensor], reentrant: bool
) -> None:
    model = Checkpointed(reentrant=reentrant)
    reference = copy.deepcopy(model)
    freeze(model, images(), sets, mode)
    found, dense = gradients(model, images()), gradients(reference, images())
    if "stem" in sets:
        assert_rows(found, dense, sets)
    else:
        assert_rows(
            {n: g for n, g in found.items() if "head" in n}, {n: g for n, g in dense.items() if "head" in n}, {}
        )


# Hooks, wrappers and functions around modules.


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_fire_as_ever() -> None:
    model = Net()
    reference = copy.deepcopy(model)
    freeze(model, images(), IN_FORCE)
    seen: dict[int, list[tuple[str, str]]] = {}
    for net in (model, reference):
        found = seen.setdefault(id(net), [])
        for name, module in net.named_children():
            module.register_forward_pre_hook(lambda *_, name=name, found=found: found.append((name, "before")))
            module.register_forward_hook(lambda *_, name=name, found=found: found.append((name, "after")))
            if name in ("conv", "second", "linear"):
                module.register_full_backward_hook(
                    lambda m, _, out, name=name, found=found: found.append((name, f"{out[0].square().sum():.3f}"))
                )
        gradients(net, images())
    assert seen[id(model)] == seen[id(reference)]
    assert any(word not in ("before", "after") for _, word in seen[id(model)])


def test_data_parallel_on_the_cpu_only_forwards() -> None:
    model = Net()
    reference = copy.deepcopy(model)
    wrapped = nn.DataParallel(model)
    if wrapped.device_ids:
        pytest.skip("there are devices to replicate on")
    sets = {"conv": HALF, "norm": NONE, "linear": HALF}
    freeze(wrapped, images(), sets)
    assert_rows(
        {name.removeprefix("module."): gradient for name, gradient in gradients(wrapped, images()).items()},
        gradients(reference, images()),
        sets,
    )


def test_replicas_of_a_module_compute_the_same_rows(kernel: str) -> None:
    """What DataParallel makes of a module: a copy of its attributes, with plain tensors for parameters."""
    model = Net()
    reference = copy.deepcopy(model)
    freeze(model, images(), {"conv": HALF, "linear": HALF})
    for name in ("conv", "linear"):
        module = model.get_submodule(name)
        replica = module._replicate_for_data_parallel()
        for key, parameter in module._parameters.items():
            replica.__dict__.setdefault("_former_parameters", {})[key] = parameter
            setattr(replica, key, parameter.view_as(parameter))
        inputs = images() if name == "conv" else torch.randn(3, 8)
        replica(inputs).sum().backward()
        (dense,) = torch.autograd.grad(
            reference.get_submodule(name)(inputs).sum(), reference.get_submodule(name).weight
        )
        expected = torch.where(HALF.view(-1, *[1] * (dense.dim() - 1)), dense, 0)
        torch.testing.assert_close(module.weight.grad, expected)


@pytest.mark.parametrize("mode", ["exact", "truncated"])
def test_other_weights_that_are_put_in_for_a_call_are_no_neurons(mode: BackwardMode, kernel: str) -> None:
    """torch.func.functional_call, as in meta-learning: their gradients are whole, whatever is frozen."""
    for training in (True, False):
        model = Net().train(training)
        reference = copy.deepcopy(model)
        freeze(model, images(), IN_FORCE, mode)
        model.train(training)
        given = {name: (2 * parameter.detach()).requires_grad_() for name, parameter in model.named_parameters()}
        again = {name: parameter.detach().clone().requires_grad_() for name, parameter in given.items()}
        for net, parameters in ((model, given), (reference, again)):
            functional_call(net, parameters, (images(),)).sin().sum().backward()
        for name, parameter in again.items():
            assert torch.equal(given[name].grad, parameter.grad), name


def test_parameters_that_were_replaced_have_whole_gradients(kernel: str) -> None:
    """Until the Freezer looks again, they are not those whose rows it holds."""
    model = Net()
    freeze(model, images(), IN_FORCE)
    for name in ("conv", "second", "up", "norm"):
        module = model.get_submodule(name)
        module.weight = nn.Parameter(torch.randn_like(module.weight))
    reference = Net()
    reference.load_state_dict(model.state_dict())
    found, dense = gradients(model, images()), gradients(reference, images())
    for name in ("conv", "second", "up", "norm"):
        torch.testing.assert_close(found[f"{name}.weight"], dense[f"{name}.weight"], rtol=1e-11, atol=1e-12)


def test_outputs_may_be_overwritten(kernel: str) -> None:
    """In-place activations after frozen layers, as torchvision's models have them."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.second, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 2)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.conv(images)
            hidden += 1
            hidden = self.second(hidden.relu_()).relu_()
            return self.head(self.norm(hidden).relu_().mean((2, 3)))

    for trainable in (HALF, NONE):
        for training in (True, False):
            model = InPlace().train(training)
            reference = copy.deepcopy(model)
            sets = {"conv": HALF, "second": trainable, "norm": trainable}
            freeze(model, images(), sets)
            model.train(training)
            assert_rows(gradients(model, images()), gradients(reference, images()), sets)


def test_a_batch_without_samples(kernel: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(72, 8), nn.Linear(8, 2)
    )
    for mode in ("exact", "truncated"):
        for trainable in (HALF, NONE):
            freezer = freeze(model, images(), {"0": HALF, "2": trainable, "4": trainable}, mode)
            found = gradients(model, images()[:0])
            assert all(gradient is None or not gradient.any() for gradient in found.values())
            freezer.detach()
